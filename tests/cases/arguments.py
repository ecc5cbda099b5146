"""Arguments of modules."""

from __future__ import annotations

from typing import Any

from cases.form import Call, Case, of_each, quantizer, refused

import mmvq


def number(where: str, name: str, span: str, *calls: Call) -> Case:
    return refused(ValueError, f"{where}: {name} must be a finite number {span}", *calls)


def integer(where: str, name: str, low: int, *calls: Call) -> Case:
    return refused(ValueError, f"{where}: {name} must be an int of at least {low}", *calls)


def choice(where: str, name: str, choices: str, *calls: Call) -> Case:
    return refused(ValueError, f"{where}: {name} must be one of {choices}", *calls)


QUANTIZER, CODEBOOK, CPC = "MultiModalEMAQuantizer", "EMACodebook", "CrossCPC"
CLUB, COMMITMENT = "CLUBEstimator", "CrossModalCommitmentLoss"


def commitment(beta: Any = 0.25, cross_ratio: Any = 0.5, **options: Any) -> Call:
    return lambda: mmvq.CrossModalCommitmentLoss(beta, cross_ratio, **options)


def club(x_dim: Any = 4, *rest: Any, **options: Any) -> Call:
    return lambda: mmvq.CLUBEstimator(x_dim, 4, *rest, **options)


def cpc(**options: Any) -> Call:
    return lambda: mmvq.CrossCPC(4, **options)


def book(dim: Any = 4, codebook_size: Any = 8, **options: Any) -> Call:
    return lambda: mmvq.EMACodebook(dim, codebook_size, **options)


def built(**options: Any) -> Call:
    return lambda: quantizer(**options)


ARGUMENTS = [
    integer(QUANTIZER, "dim", 1, lambda: mmvq.MultiModalEMAQuantizer(-4, 8)),
    integer(QUANTIZER, "codebook_size", 1, lambda: mmvq.MultiModalEMAQuantizer(4, 0)),
    integer(CODEBOOK, "dim", 1, book(dim=0)),
    integer(CODEBOOK, "codebook_size", 1, book(codebook_size=8.0)),
    integer(CODEBOOK, "groups", 1, book(groups=-1)),
    integer(CODEBOOK, "reset_after", 1, built(reset_after=True), built(reset_after=0)),
    integer(CLUB, "x_dim", 1, club(0)),
    integer(CLUB, "hidden_dim", 1, club(4, "a")),
    integer(CPC, "num_steps", 1, cpc(num_steps=0)),
    integer(CPC, "first_step", 0, cpc(first_step=-1)),
    number(CODEBOOK, "decay", "from 0 to 1", built(decay=1.5), built(decay="0.9")),
    number(CODEBOOK, "eps", "from 0 to 1", built(eps=float("nan"))),
    number(QUANTIZER, "partner_weight", "from 0 to 1", built(partner_weight=-0.5)),
    number(COMMITMENT, "beta", "at least 0", commitment(float("inf"))),
    number(COMMITMENT, "cross_ratio", "at least 0", commitment(cross_ratio=-1)),
    number(
        COMMITMENT,
        "cross_ratio[('audio', 'video')]",
        "at least 0",
        commitment(cross_ratio={("audio", "video"): -1}),
    ),
    number(CLUB, "logvar_bound", "from 1e-06 to 1e+06", club(logvar_bound=0)),
    number(CPC, "temperature", "from 1e-06 to 1e+06", cpc(temperature=0)),
    number(CPC, "self_weight", "at least 0", cpc(self_weight=-1)),
    choice(CODEBOOK, "reset_rule", "'all', 'any'", built(reset_rule="x")),
    choice(CODEBOOK, "init", "'kmeans', 'samples', 'uniform'", built(init="x")),
    choice(QUANTIZER, "gradient", "'straight_through', 'rotation'", built(gradient="x")),
    choice(QUANTIZER, "update", "'auto', 'manual'", built(update="x")),
    choice(QUANTIZER, "partner", "'attention', 'aligned', 'none'", built(partner="x")),
    choice(COMMITMENT, "reduction", "'mean', 'sum'", commitment(reduction="x")),
    choice(CLUB, "negatives", "'all', 'shuffled'", club(negatives="x")),
    choice(CPC, "normalize_over", "'targets', 'contexts', 'both'", cpc(normalize_over="x")),
    *(
        refused(
            ValueError,
            f"{where}: modalities must be one or more names, each given once",
            *of_each(make, (), ("a", "a"), "audio", ("audio", 3), ("audio", ""), 2, None),
        )
        for where, make in (
            (QUANTIZER, lambda given: quantizer(modalities=given)),
            (CPC, lambda given: mmvq.CrossCPC(4, given)),
        )
    ),
    refused(
        ValueError,
        "CrossCPC: modalities name submodules and parameters: no dot, and no attribute of "
        "nn.ModuleDict or nn.ParameterDict",
        *of_each(
            lambda given: mmvq.CrossCPC(4, given),
            *(("left.arm", "audio"), ("audio", "type"), ("copy",), ("training",)),
        ),
    ),
    refused(
        TypeError,
        "MultiModalEMAQuantizer: commitment must be a callable (features, codes, masks) -> loss, "
        "or None",
        *(built(commitment=given) for given in ("mean", 0.25, mmvq.CrossModalCommitmentLoss)),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer: cross_ratio must pair the quantizer's modalities",
        built(commitment=mmvq.CrossModalCommitmentLoss(1, {("audio", "text"): 0.5})),
    ),
    refused(
        ValueError,
        "MultiModalEMAQuantizer: update_from must name one or more of the modalities",
        *(built(update_from=given) for given in (["text"], [], 0)),
    ),
    refused(
        ValueError,
        "EMACodebook: update_from must hold one or more group numbers from 0 to 1",
        *(book(groups=2, update_from=given) for given in ([2], [], 0)),
    ),
    refused(
        ValueError,
        'CLUBEstimator: gather=True needs negatives="all"',
        club(negatives="shuffled", gather=True),
    ),
    refused(
        ValueError,
        "CrossModalCommitmentLoss: cross_ratio must be a number, or map pairs of modalities to "
        "numbers",
        *(
            commitment(cross_ratio=ratio)
            for ratio in ({"audio": 0.5}, {("audio", "audio"): 0.5}, {("a", "b", "c"): 0.5})
        ),
    ),
]
