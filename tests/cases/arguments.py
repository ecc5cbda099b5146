"""Arguments of modules."""

from __future__ import annotations

from cases.form import Case, anything, choice, integer, number, quantizer

import mmvq

ARGUMENTS = [
    integer("MultiModalEMAQuantizer", "dim", 1, "-4", lambda: mmvq.MultiModalEMAQuantizer(-4, 8)),
    integer(
        "MultiModalEMAQuantizer",
        "codebook_size",
        1,
        "0",
        lambda: mmvq.MultiModalEMAQuantizer(4, 0),
    ),
    integer("EMACodebook", "dim", 1, "0", lambda: mmvq.EMACodebook(0, 8)),
    integer("EMACodebook", "size", 1, "8.0", lambda: mmvq.EMACodebook(4, anything or 8.0)),
    integer("EMACodebook", "groups", 1, "-1", lambda: mmvq.EMACodebook(4, 8, groups=-1)),
    integer("EMACodebook", "reset_after", 1, "True", lambda: quantizer(reset_after=True)),
    integer("CLUBEstimator", "x_dim", 1, "0", lambda: mmvq.CLUBEstimator(0, 4)),
    integer(
        "CLUBEstimator", "hidden_dim", 1, "'a'", lambda: mmvq.CLUBEstimator(4, 4, anything or "a")
    ),
    integer("CrossCPC", "num_steps", 1, "0", lambda: mmvq.CrossCPC(4, num_steps=0)),
    integer("CrossCPC", "first_step", 0, "-1", lambda: mmvq.CrossCPC(4, first_step=-1)),
    number("EMACodebook", "decay", "from 0 to 1", "1.5", lambda: quantizer(decay=1.5)),
    number("EMACodebook", "eps", "from 0 to 1", "nan", lambda: quantizer(eps=float("nan"))),
    number("EMACodebook", "decay", "from 0 to 1", "'0.9'", lambda: quantizer(decay="0.9")),
    number(
        "MultiModalEMAQuantizer",
        "partner_weight",
        "from 0 to 1",
        "-0.5",
        lambda: quantizer(partner_weight=-0.5),
    ),
    number(
        "CrossModalCommitmentLoss",
        "beta",
        "at least 0",
        "inf",
        lambda: mmvq.CrossModalCommitmentLoss(float("inf")),
    ),
    number(
        "CrossModalCommitmentLoss",
        "cross_ratio",
        "at least 0",
        "-1",
        lambda: mmvq.CrossModalCommitmentLoss(cross_ratio=-1),
    ),
    number(
        "CrossModalCommitmentLoss",
        "cross_ratio[('audio', 'video')]",
        "at least 0",
        "-1",
        lambda: mmvq.CrossModalCommitmentLoss(cross_ratio={("audio", "video"): -1}),
    ),
    number(
        "CLUBEstimator",
        "logvar_bound",
        "from 1e-06 to 1e+06",
        "0",
        lambda: mmvq.CLUBEstimator(4, 4, logvar_bound=0),
    ),
    number(
        "CrossCPC",
        "temperature",
        "from 1e-06 to 1e+06",
        "0",
        lambda: mmvq.CrossCPC(4, temperature=0),
    ),
    number("CrossCPC", "self_weight", "at least 0", "-1", lambda: mmvq.CrossCPC(4, self_weight=-1)),
    choice("EMACodebook", "reset_rule", "'all', 'any'", lambda: quantizer(reset_rule="x")),
    choice("EMACodebook", "init", "'kmeans', 'samples', 'uniform'", lambda: quantizer(init="x")),
    choice(
        "MultiModalEMAQuantizer",
        "gradient",
        "'straight_through', 'rotation'",
        lambda: quantizer(gradient="x"),
    ),
    choice("MultiModalEMAQuantizer", "update", "'auto', 'manual'", lambda: quantizer(update="x")),
    choice(
        "CrossModalCommitmentLoss",
        "reduction",
        "'mean', 'sum'",
        lambda: mmvq.CrossModalCommitmentLoss(reduction=anything or "x"),
    ),
    choice(
        "CLUBEstimator",
        "negatives",
        "'all', 'shuffled'",
        lambda: mmvq.CLUBEstimator(4, 4, negatives=anything or "x"),
    ),
    choice(
        "CrossCPC",
        "normalize_over",
        "'targets', 'contexts', 'both'",
        lambda: mmvq.CrossCPC(4, normalize_over=anything or "x"),
    ),
    Case(
        lambda: quantizer(partner="x"),
        ValueError,
        "MultiModalEMAQuantizer: partner must be one of 'attention', 'aligned', 'none'",
        "partner: 'x'",
        "pick one, or pass a callable (z_a, others, masks) -> r",
    ),
    *(
        Case(
            lambda make=make, given=given: make(given),
            ValueError,
            f"{where}: modalities must be one or more names, each given once",
            f"modalities: {given!r}",
            'pass a tuple of strings such as ("audio", "video")',
        )
        for where, make in (
            ("MultiModalEMAQuantizer", lambda given: quantizer(modalities=given)),
            ("CrossCPC", lambda given: mmvq.CrossCPC(4, given)),
        )
        for given in ((), ("audio", "audio"), "audio", ("audio", 3), ("audio", ""), 2, None)
    ),
    *(
        Case(
            lambda given=given: mmvq.CrossCPC(4, given),
            ValueError,
            "CrossCPC: modalities name submodules and parameters: no dot, and no attribute of "
            "nn.ModuleDict or nn.ParameterDict",
            f"modalities: {given!r}",
            'rename it, "left.arm" to "left_arm" or "type" to "kind"',
        )
        for given in (("left.arm", "audio"), ("audio", "type"), ("copy",), ("training",))
    ),
    *(
        Case(
            lambda given=given: quantizer(commitment=given),
            TypeError,
            "MultiModalEMAQuantizer: commitment must be a callable (features, codes, masks) -> "
            "loss, or None",
            f"commitment: {came}",
            "pass CrossModalCommitmentLoss(...)",
        )
        for given, came in (
            ("mean", "'mean'"),
            (0.25, "0.25"),
            (mmvq.CrossModalCommitmentLoss, "CrossModalCommitmentLoss"),
        )
    ),
    Case(
        lambda: quantizer(commitment=mmvq.CrossModalCommitmentLoss(1, {("audio", "text"): 0.5})),
        ValueError,
        "MultiModalEMAQuantizer: cross_ratio must pair the quantizer's modalities",
        "cross_ratio: {('audio', 'text'): 0.5}   modalities: ('audio', 'video')",
        "name only these; a pair that is left out is 0",
    ),
    *(
        Case(
            lambda given=given: quantizer(update_from=given),
            ValueError,
            "MultiModalEMAQuantizer: update_from must name one or more of the modalities",
            f"update_from: {given!r}   modalities: ('audio', 'video')",
            "pass None to update from all",
        )
        for given in (["text"], [], 0)
    ),
    *(
        Case(
            lambda given=given: mmvq.EMACodebook(4, 8, groups=2, update_from=given),
            ValueError,
            "EMACodebook: update_from must hold one or more group numbers from 0 to 1",
            f"update_from: {given!r}   groups: 2",
            "pass None to update from all groups",
        )
        for given in ([2], [], 0)
    ),
]
