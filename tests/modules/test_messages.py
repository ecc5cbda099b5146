"""Every error that mmvq and mmvq_kernels raise: where, the rule, what came, what to do.

The last test reads the sources, so that no `raise` can be added without a case here.
"""

from __future__ import annotations

import ast
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import mmvq
import mmvq_kernels as kernels
from mmvq import onnx
from mmvq.compat import cmg, vector_quantize_pytorch
from mmvq.pretrained import _adapter
from mmvq_kernels.messages import message

z = torch.zeros(2, 5, 4)
nan = torch.full((2, 5, 4), torch.nan)
codes = torch.zeros(8, 4)
whole: Any = torch.ones(2, 5, dtype=torch.bool)
both = {"audio": z, "video": z}
anything: Any = None


@dataclass(frozen=True)
class Case:
    """A call, and all that it must say."""

    call: Callable[[], object]
    kind: type[Exception]
    rule: str
    came: str
    hint: str

    @property
    def text(self) -> str:
        return f"{self.rule}.\n  {self.came}\n  Hint: {self.hint}."


def quantizer(**options: Any) -> mmvq.MultiModalEMAQuantizer:
    return mmvq.MultiModalEMAQuantizer(4, 8, **options)


def checked(call: Callable[[], object]) -> Callable[[], object]:
    """The call under MMVQ_CHECK=1."""

    def run() -> object:
        with patch.dict(os.environ, MMVQ_CHECK="1"):
            return call()

    return run


def ema(**changes: Any) -> Callable[[], object]:
    arguments = {
        "codes": codes.clone(),
        "sums": codes.clone(),
        "counts": torch.ones(8),
        "batch_sums": codes,
        "batch_counts": torch.ones(8),
        "decay": 0.9,
    }
    return lambda: kernels.ema_update_(**{**arguments, **changes})


def triton() -> object:
    with patch("importlib.util.find_spec", lambda name: None):
        return kernels.nearest_code(codes, codes, backend="triton")


def without_the_hub() -> object:
    _adapter.cache_clear()
    with patch.dict(sys.modules, {"huggingface_hub": None}):
        return mmvq.CLUBEstimator(4, 4).save_pretrained("nowhere")


def without_matplotlib() -> object:
    with patch.dict(sys.modules, {"matplotlib.figure": None}):
        return mmvq.figures.plot_usage({})


def from_config(config: object, **options: Any) -> Callable[[], object]:
    """`CLUBEstimator.from_pretrained` of a folder with this config.json."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder:
            if config is not None:
                Path(folder, "config.json").write_text(json.dumps(config))
            return mmvq.CLUBEstimator.from_pretrained(folder, **options)

    return run


CONFIG = {"class": "CLUBEstimator", "version": 1, "arguments": {}, "pass_again": {}}
BUFFERS = {
    "embed": torch.ones(1, 8, 4),
    "embed_avg": torch.ones(1, 8, 4),
    "cluster_size": torch.ones(1, 8),
    "initted": torch.tensor(True),
}


def foreign(rule: str, hint: str, source: Any, kind: str, embed: str = "float32[1, 8, 4]") -> Case:
    return Case(
        lambda: vector_quantize_pytorch.load(source),
        ValueError,
        f"vector_quantize_pytorch.load: {rule}",
        f"source: {kind}   embed: {embed}",
        hint,
    )


def like_theirs(**attributes: Any) -> torch.nn.Module:
    """A module with their buffers, and attributes of theirs."""
    module = torch.nn.Module()
    for name, x in BUFFERS.items():
        module.register_buffer(name, x.clone())
    for name, value in {"decay": 0.8, "eps": 1e-5, **attributes}.items():
        setattr(module, name, value)
    return module


def split(call: Callable[[], object]) -> Callable[[], object]:
    """The call on rank 0 of two, of which rank 1 has another T."""

    def exchange(numbers: list[int], *_: object) -> list[list[int]]:
        return [numbers, [*numbers[:-1], numbers[-1] + 1]]

    def run() -> object:
        with (
            patch("mmvq.distributed.world_size", lambda group: 2),
            patch("mmvq.distributed.exchange", exchange),
        ):
            return call()

    return run


def number(where: str, name: str, span: str, came: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be a finite number {span}"
    return Case(call, ValueError, rule, f"{name}: {came}", f"pass a number {span}")


def integer(where: str, name: str, low: int, came: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be an int of at least {low}"
    return Case(call, ValueError, rule, f"{name}: {came}", f"pass a Python int, {low} or more")


def choice(where: str, name: str, choices: str, call: Callable[[], object]) -> Case:
    rule = f"{where}: {name} must be one of {choices}"
    return Case(call, ValueError, rule, f"{name}: 'x'", "pick one")


def finite(where: str, call: Callable[[], object], name: str = "audio") -> Case:
    hint = "look for a division by zero or an overflow upstream"
    came = f"{name}: float32[2, 5, 4]"
    return Case(checked(call), ValueError, f"{where}: {name} must be finite", came, hint)


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
            "CrossCPC: modalities name submodules: no dot, and no attribute of nn.ModuleDict",
            f"modalities: {given!r}",
            'rename it, "left.arm" to "left_arm" or "type" to "kind"',
        )
        for given in (("left.arm", "audio"), ("audio", "type"))
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

FEATURES = [
    Case(
        lambda: quantizer()(anything or z),
        TypeError,
        "MultiModalEMAQuantizer: features must be a non-empty mapping from modality to tensor",
        "features: float32[2, 5, 4]",
        'pass {"audio": z_audio, "video": z_video}',
    ),
    Case(
        lambda: mmvq.CrossCPC(4)({}),
        TypeError,
        "CrossCPC: features must be a non-empty mapping from modality to tensor",
        "features: {}",
        'pass {"audio": z_audio, "video": z_video}',
    ),
    Case(
        lambda: quantizer()(both, whole),
        TypeError,
        "MultiModalEMAQuantizer: masks must be a mapping from modality to mask, or None",
        "masks: bool[2, 5]",
        'pass {"audio": mask_audio}; a modality without a mask is valid throughout',
    ),
    Case(
        lambda: quantizer()({"audio": z, "text": z}),
        ValueError,
        "MultiModalEMAQuantizer: features may name only 'audio', 'video'",
        "unknown: ['text']",
        "use the names that the module was built with",
    ),
    Case(
        lambda: quantizer()({"audio": z}, {"video": whole}),
        ValueError,
        "MultiModalEMAQuantizer: masks may name only 'audio'",
        "unknown: ['video']",
        "give a mask only to a modality whose features come in the same call",
    ),
    Case(
        lambda: quantizer()({"audio": z.long()}),
        TypeError,
        "MultiModalEMAQuantizer: features['audio'] must be a floating point tensor",
        "features['audio']: int64[2, 5, 4]",
        "convert it with .float()",
    ),
    Case(
        lambda: quantizer()({"audio": anything or z.numpy()}),
        TypeError,
        "MultiModalEMAQuantizer: features['audio'] must be a floating point tensor",
        "features['audio']: ndarray",
        "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
    ),
    *(
        Case(
            lambda x=x: quantizer()({"audio": x}),
            ValueError,
            "MultiModalEMAQuantizer: features['audio'] must be [B, T, 4] or [B, 4]",
            f"features['audio']: {came}",
            hint,
        )
        for x, came, hint in (
            (
                z[..., :3],
                "float32[2, 5, 3]",
                "project its last dimension to 4, or build the module with dim=3",
            ),
            (z.mT, "float32[2, 4, 5]", "if it is [B, 4, T], pass its transpose(1, 2)"),
            (z[None], "float32[1, 2, 5, 4]", "reshape or pool it to batch, time and width"),
        )
    ),
    Case(
        lambda: mmvq.CrossModalCommitmentLoss()({"audio": z[0, 0]}, {"audio": z[0, 0]}),
        ValueError,
        "CrossModalCommitmentLoss: features['audio'] must be [B, T, D] or [B, D]",
        "features['audio']: float32[4]",
        "reshape or pool it to batch, time and width",
    ),
    Case(
        lambda: quantizer()({"audio": z, "video": z.to("meta")}),
        ValueError,
        "MultiModalEMAQuantizer: all features must be on one device, and the module too",
        "audio: 'cpu'   video: 'meta'   the module: 'cpu'",
        "move them with .to(device)",
    ),
    Case(
        lambda: mmvq.CrossCPC(4)({"audio": z, "video": z.to("meta")}),
        ValueError,
        "CrossCPC: all features must be on one device, and the module too",
        "audio: 'cpu'   video: 'meta'",
        "move them with .to(device)",
    ),
    *(
        Case(
            lambda mask=mask: quantizer()(both, {"video": mask}),
            ValueError,
            "MultiModalEMAQuantizer: masks['video'] must be a bool tensor shaped as its features "
            "without D, on their device",
            f"mask: {came}   features: float32[2, 5, 4]",
            "pass True where a segment is valid, False where it is padding",
        )
        for mask, came in (
            (whole.float(), "float32[2, 5]"),
            (whole[:, :3], "bool[2, 3]"),
            ([True], "[True]"),
            (whole.to("meta"), "bool[2, 5] on meta"),
        )
    ),
    Case(
        lambda: quantizer()({"audio": z, "video": z[:1]}),
        ValueError,
        "MultiModalEMAQuantizer: all modalities must have the same batch size",
        "audio: 2   video: 1",
        "pass clips of one batch; leave out a modality that is missing, or mask it",
    ),
    *(
        Case(
            call,
            ValueError,
            f"{where}: all modalities must have the same number of segments T",
            "audio: 5   video: 3",
            "resample them to one time grid, or pad and mask the shorter" + otherwise,
        )
        for where, call, otherwise in (
            (
                "MultiModalEMAQuantizer",
                lambda: quantizer(partner="aligned")({"audio": z, "video": z[:, :3]}),
                '; or build it with partner="attention"',
            ),
            (
                "CrossModalCommitmentLoss",
                lambda: quantizer()({"audio": z, "video": z[:, :3]}),
                "; or drop the cross term with cross_ratio=0",
            ),
            ("CrossCPC", lambda: mmvq.CrossCPC(4)({"audio": z, "video": z[:, :3]}), ""),
        )
    ),
]

MODULES = [
    Case(
        split(lambda: mmvq.CrossCPC(4, gather=True)(both)),
        ValueError,
        "CrossCPC: T must be the same on all ranks",
        "T of this rank: 5   ranks_unlike_rank_0: [1]",
        "pass zeros with a mask of False for what a rank lacks",
    ),
    Case(
        lambda: mmvq.CLUBEstimator(4, 4, negatives="shuffled", gather=True),
        ValueError,
        'CLUBEstimator: gather=True needs negatives="all"',
        "negatives: 'shuffled'   gather: True",
        "leave one of the two at its default",
    ),
    *(
        Case(
            lambda call=call, x=x: call(x),
            ValueError,
            f"{where}: x must be [..., 4], on the device of the codebook",
            f"x: {came}   codebook: float32[8, 4]",
            "project its last dimension to 4; move it with .to(device)",
        )
        for where, call in (
            ("MultiModalEMAQuantizer.encode", lambda x: quantizer().encode(x)),
            ("EMACodebook.search", lambda x: mmvq.EMACodebook(4, 8).search(x)),
        )
        for x, came in (
            (z[..., :3], "float32[2, 5, 3]"),
            (z.sum(), "float32[]"),
            (z.to("meta"), "float32[2, 5, 4] on meta"),
        )
    ),
    Case(
        lambda: quantizer().encode({"audio": z}),
        TypeError,
        "MultiModalEMAQuantizer.encode: x must be a floating point tensor",
        "x: {'audio': float32[2, 5, 4]}",
        "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
    ),
    Case(
        lambda: mmvq.EMACodebook(4, 8).accumulate(z.long(), torch.zeros(2, 5, dtype=torch.long)),
        TypeError,
        "EMACodebook.accumulate: values must be a floating point tensor",
        "values: int64[2, 5, 4]",
        "convert it with .float()",
    ),
    Case(
        lambda: mmvq.EMACodebook(4, 8).accumulate(z, torch.zeros(10, dtype=torch.long)),
        ValueError,
        "EMACodebook.accumulate: values must be [..., 4], indices and groups [...]",
        "values: float32[2, 5, 4]   indices: int64[10]   groups: int64[10]",
        "pass the indices that search(x) returned",
    ),
    Case(
        lambda: mmvq.EMACodebook(8, 4, init="kmeans").initialize(z),
        ValueError,
        "EMACodebook.initialize: values must be [..., 8], groups and usable [...]",
        "values: float32[2, 5, 4]   groups: int64[2, 5]   usable: bool[2, 5]",
        "give each vector one group, and one True or False",
    ),
    *(
        Case(
            lambda call=call, given=given: call(given),
            TypeError,
            f"{where}: {name} must be an int64 tensor",
            f"{name}: {came}",
            hint,
        )
        for where, name, hint, call in (
            (
                "MultiModalEMAQuantizer.decode",
                "indices",
                "pass what encode returned, of one modality",
                lambda given: quantizer().decode(given),
            ),
            (
                "EMACodebook.accumulate",
                "indices",
                "pass the indices that search(x) returned",
                lambda given: mmvq.EMACodebook(4, 8).accumulate(z, given),
            ),
        )
        for given, came in (
            (torch.zeros(2, 5, dtype=torch.int32), "int32[2, 5]"),
            ({"audio": whole}, "{'audio': bool[2, 5]}"),
            ([0, 1], "[0, 1]"),
        )
    ),
    *(
        Case(call, IndexError, f"{where}: {name} must be below {size}", f"largest: {size}", hint)
        for where, name, size, hint, call in (
            (
                "MultiModalEMAQuantizer.decode",
                "indices",
                8,
                "pass what encode returned, of one modality",
                lambda: quantizer().decode(torch.tensor([0, 8])),
            ),
            (
                "EMACodebook.accumulate",
                "indices",
                8,
                "pass the indices that search(x) returned",
                lambda: mmvq.EMACodebook(4, 8).accumulate(codes, torch.arange(1, 9)),
            ),
            (
                "EMACodebook.accumulate",
                "groups",
                1,
                "number the groups from 0",
                lambda: mmvq.EMACodebook(4, 8).accumulate(
                    codes, torch.arange(8), torch.ones(8, dtype=torch.long)
                ),
            ),
        )
    ),
    Case(
        lambda: mmvq.update_codebooks({"a": quantizer()}),  # type: ignore[arg-type]
        TypeError,
        "update_codebooks: modules must be an nn.Module, or several",
        "modules: ['a']",
        "pass the model that holds the quantizers, or a list of them",
    ),
    *(
        Case(
            lambda r=r: quantizer(partner=lambda z_a, others, masks: r)(both),
            ValueError,
            "MultiModalEMAQuantizer: the partner callable must return a tensor shaped as z_a",
            f"z_a: float32[2, 5, 4]   r: {came}",
            "return [B, T, D], and z_a itself where there is no partner",
        )
        for r, came in ((z[:1], "float32[1, 5, 4]"), (None, "None"))
    ),
    *(
        Case(
            lambda ratio=ratio: mmvq.CrossModalCommitmentLoss(cross_ratio=ratio),
            ValueError,
            "CrossModalCommitmentLoss: cross_ratio must be a number, or map pairs of modalities to "
            "numbers",
            f"cross_ratio: {ratio!r}",
            'pass {("audio", "video"): 0.5} to pull audio towards the codes of video',
        )
        for ratio in ({"audio": 0.5}, {("audio", "audio"): 0.5}, {("a", "b", "c"): 0.5})
    ),
    *(
        Case(
            lambda given=given: mmvq.CrossModalCommitmentLoss()(both, given),
            ValueError,
            "CrossModalCommitmentLoss: codes must have the names and shapes of features",
            "features: {'audio': float32[2, 5, 4], 'video': float32[2, 5, 4]}   codes: " + came,
            "pass the code of every feature, codebook[indices]",
        )
        for given, came in (
            ({"audio": z}, "{'audio': float32[2, 5, 4]}"),
            (
                {"audio": z, "video": codes},
                "{'audio': float32[2, 5, 4], 'video': float32[8, 4]}",
            ),
            (z, "float32[2, 5, 4]"),
            ({"audio": z, "video": [0]}, "{'audio': float32[2, 5, 4], 'video': [0]}"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.CrossModalCodeMatchingLoss()(both, given),
            ValueError,
            f"CrossModalCodeMatchingLoss: the codebook of {name!r} must be [L, 4], floating point, "
            "on the device of the features",
            f"features: float32[2, 5, 4]   codebook: {came}",
            "pass quantizer.codebook, or one codebook for each modality",
        )
        for given, name, came in (
            (codes[:, :3], "audio", "float32[8, 3]"),
            (codes.long(), "audio", "int64[8, 4]"),
            (codes.to("meta"), "audio", "float32[8, 4] on meta"),
            ({"audio": codes}, "video", "None"),
            (anything or quantizer(), "audio", "MultiModalEMAQuantizer"),
        )
    ),
    Case(
        lambda: mmvq.CrossModalCodeMatchingLoss()(both, {"audio": codes, "video": codes[:7]}),
        ValueError,
        "CrossModalCodeMatchingLoss: codebooks must have the same size, as they are tied by index",
        "audio: float32[8, 4]   video: float32[7, 4]",
        "build them with one size",
    ),
    *(
        Case(
            lambda x=x, y=y: mmvq.CLUBEstimator(4, 3)(x, y),
            ValueError,
            "CLUBEstimator: x must be [B, T, 4] and y [B, T, 3], or both without T",
            came,
            "give both one B and T; swap them if they came reversed: q predicts y",
        )
        for x, y, came in (
            (z[..., :3], z, "x: float32[2, 5, 3]   y: float32[2, 5, 4]"),
            (z, z[:1, :, :3], "x: float32[2, 5, 4]   y: float32[1, 5, 3]"),
            (z[0, 0], z[0, 0, :3], "x: float32[4]   y: float32[3]"),
        )
    ),
    *(
        Case(
            lambda call=call: call(mmvq.CLUBEstimator(4, 4)),
            TypeError,
            f"CLUBEstimator: {name} must be a floating point tensor",
            f"{name}: ndarray",
            "pass one tensor, as torch.from_numpy(...).float(); leave out a missing one",
        )
        for name, call in (
            ("x", lambda club: club(z.numpy(), z)),
            ("y", lambda club: club.log_likelihood(z, z.numpy())),
            ("x", lambda club: club.learning_loss(z.numpy(), z)),
        )
    ),
    *(
        Case(
            lambda mask=mask: mmvq.CLUBEstimator(4, 4).learning_loss(z, z, mask),
            ValueError,
            "CLUBEstimator: mask must be a bool tensor shaped as its features without D, on their "
            "device",
            f"mask: {came}   features: float32[2, 5, 4]",
            "pass True where a segment is valid, False where it is padding",
        )
        for mask, came in (
            (whole.float(), "float32[2, 5]"),
            (whole[:1], "bool[1, 5]"),
            ([True], "[True]"),
        )
    ),
    Case(
        lambda: mmvq.CrossCPC(4, num_steps=4, first_step=2, min_context=2)(both),
        ValueError,
        "CrossCPC: T must be at least min_context + first_step + num_steps - 1",
        "T: 5   min_context: 2   first_step: 2   num_steps: 4",
        "pass longer clips, or predict fewer steps ahead",
    ),
    *(
        Case(
            lambda start=start: mmvq.CrossCPC(4, min_context=2)(both, start=start),
            ValueError,
            'CrossCPC: start must lie in [2, 4], or be "all" or None',
            f"start: {start!r}",
            "it counts the observed segments",
        )
        for start in (1, 5, 2.5, "some")
    ),
    finite("MultiModalEMAQuantizer", lambda: quantizer()({"audio": nan})),
    finite(
        "CrossModalCommitmentLoss",
        lambda: mmvq.CrossModalCommitmentLoss()({"audio": nan}, {"audio": z}),
    ),
    finite(
        "CrossModalCodeMatchingLoss",
        lambda: mmvq.CrossModalCodeMatchingLoss()({"audio": nan}, codes),
    ),
    finite("CrossCPC", lambda: mmvq.CrossCPC(4)({"audio": nan})),
    finite("CLUBEstimator", lambda: mmvq.CLUBEstimator(4, 4)(nan, z), "x"),
    finite("CLUBEstimator", lambda: mmvq.CLUBEstimator(4, 4)(z, nan), "y"),
]

KERNELS = [
    Case(
        lambda: kernels.code_log_probabilities(z, codes[:, :3]),
        ValueError,
        "code_log_probabilities: x [B, T, D] and codebook [L, D] must share their last dimension",
        "x: float32[2, 5, 4]   codebook: float32[8, 3]",
        "give every clip a time axis and project it to the codebook's width",
    ),
    Case(
        lambda: kernels.code_log_probabilities(z, codes[:0]),
        ValueError,
        "code_log_probabilities: codebook must hold at least one code",
        "codebook: float32[0, 4]",
        "build the codebook with size >= 1",
    ),
    *(
        Case(
            lambda mask=mask: kernels.code_log_probabilities(z, codes, mask),
            ValueError,
            "code_log_probabilities: mask must be bool [B, T]",
            f"x: float32[2, 5, 4]   mask: {came}",
            "give every segment one entry, True where it is valid",
        )
        for mask, came in (
            (torch.ones(2, 4, dtype=torch.bool), "bool[2, 4]"),
            (torch.ones(2, 5), "float32[2, 5]"),
        )
    ),
    Case(
        lambda: kernels.nearest_code(codes.long(), codes),
        TypeError,
        "nearest_code: x and codebook must be floating point",
        "x: int64[8, 4]   codebook: float32[8, 4]",
        "convert with .float()",
    ),
    Case(
        lambda: kernels.nearest_code(torch.zeros(800, 256), torch.zeros(400, 128)),
        ValueError,
        "nearest_code: x [N, D] and codebook [L, D] must share their last dimension",
        "x: float32[800, 256]   codebook: float32[400, 128]",
        "flatten x to two dimensions and project it to the codebook's width",
    ),
    Case(
        lambda: kernels.nearest_code(codes, codes[:0]),
        ValueError,
        "nearest_code: codebook must hold at least one code",
        "codebook: float32[0, 4]",
        "build the codebook with size >= 1",
    ),
    Case(
        lambda: kernels.nearest_code(codes, codes, precision=anything or "half"),
        ValueError,
        'nearest_code: precision must be "exact" or "fast"',
        "precision: 'half'",
        'leave it at "exact" unless a wrong code now and then is fine',
    ),
    *(
        Case(
            lambda values=values, indices=indices: kernels.code_statistics(values, indices, 8),
            TypeError,
            "code_statistics: values must be floating point and indices int64",
            came,
            "pass the indices that nearest_code returned",
        )
        for values, indices, came in (
            (codes, torch.ones(8), "values: float32[8, 4]   indices: float32[8]"),
            (codes.int(), torch.arange(8), "values: int32[8, 4]   indices: int64[8]"),
        )
    ),
    Case(
        lambda: kernels.code_statistics(codes, torch.arange(7), 8),
        ValueError,
        "code_statistics: values [N, D] and indices [N] must have the same N",
        "values: float32[8, 4]   indices: int64[7]",
        "flatten batch and time of both in the same order",
    ),
    *(
        Case(
            lambda groups=groups: kernels.code_statistics(
                codes, torch.arange(8), 8, groups=groups, num_groups=2
            ),
            ValueError,
            "code_statistics: groups must be int64 with one entry for each index",
            f"groups: {came}   indices: int64[8]",
            "give every row the number of its group",
        )
        for groups, came in (
            (torch.zeros(8), "float32[8]"),
            (torch.zeros(7, dtype=torch.long), "int64[7]"),
        )
    ),
    *(
        Case(
            lambda given=given: kernels.code_statistics(codes, torch.arange(8), **given),
            IndexError,
            f"code_statistics: {name} must be below {size}",
            f"largest: {largest}",
            hint,
        )
        for name, size, largest, hint, given in (
            ("indices", 7, 7, "pass num_codes=L of the codebook", {"num_codes": 7}),
            (
                "groups",
                2,
                3,
                "pass num_groups=G",
                {"num_codes": 8, "groups": torch.full((8,), 3), "num_groups": 2},
            ),
        )
    ),
    Case(
        ema(counts=torch.ones(7)),
        ValueError,
        "ema_update_: codes, sums and batch_sums must be [L, D], counts and batch_counts [L]",
        "codes: float32[8, 4]   sums: float32[8, 4]   batch_sums: float32[8, 4]   "
        "counts: float32[7]   batch_counts: float32[8]",
        "take the batch's from code_statistics(values, indices, num_codes=L)",
    ),
    Case(
        ema(dead=torch.ones(8, dtype=torch.bool)),
        ValueError,
        "ema_update_: dead [L] and replacement [L, D] must be given together",
        "codes: float32[8, 4]   dead: bool[8]   replacement: None",
        "give both to reset codes, neither to keep all",
    ),
    *(
        Case(
            call,
            ValueError,
            f"{where}: backend must be one of 'auto', 'torch', 'triton'",
            "backend: 'cuda'",
            'use backend="auto" to let the library choose',
        )
        for where, call in (
            ("reason_unavailable", lambda: kernels.reason_unavailable("cuda")),
            (
                "nearest_code",
                lambda: kernels.nearest_code(codes, codes, backend=anything or "cuda"),
            ),
            ("ema_update_", ema(backend="cuda")),
        )
    ),
    Case(
        triton,
        RuntimeError,
        "nearest_code: the triton backend cannot run because triton is not installed "
        "(pip install 'mmvq[triton]')",
        "backend: 'triton'",
        'use backend="auto"',
    ),
]

COMPAT = [
    Case(
        lambda: cmg.load_checkpoint(os.devnull),
        ValueError,
        "load_checkpoint: the file must be a whole checkpoint of tensors and plain containers",
        f"path: {os.devnull!r}   error: ''",
        "pass a DCID-model-{epoch}.pt of the release, untouched",
    ),
    *(
        Case(
            lambda given=given: cmg.CMGQuantizer(4, 8, given),
            ValueError,
            "CMGQuantizer: modalities must be two or three different names",
            f"modalities: {given!r}",
            "the release has no other case; mmvq's own modules take any number",
        )
        for given in (("audio",), "avt")
    ),
    *(
        Case(
            lambda given=given: cmg.CMGQuantizer(4, 8)(given),
            ValueError,
            "CMGQuantizer: features must hold a tensor [B, T, 4] for each of ('audio', 'video'), "
            "of one shape",
            f"features: {came}",
            "the release takes complete sets only; cut all modalities to the same T",
        )
        for given, came in (
            ({"audio": z}, "{'audio': float32[2, 5, 4]}"),
            (z, "float32[2, 5, 4]"),
            (
                {"audio": z, "video": z[:, :3]},
                "{'audio': float32[2, 5, 4], 'video': float32[2, 3, 4]}",
            ),
        )
    ),
    Case(
        lambda: cmg.CMGCrossCPC(4)(both, start=4),
        ValueError,
        "CMGCrossCPC: start must lie in [1, T - K - 1]",
        "T: 5   K: 1   start: 4",
        "T must be at least K + 2 = 3; leave start out to have it drawn",
    ),
]


def without_onnx() -> object:
    with patch.object(onnx, "find_spec", lambda name: None):
        return onnx.translation_table()


PRETRAINED = [
    Case(
        without_onnx,
        ImportError,
        "mmvq.onnx: ONNX needs onnx and onnxscript",
        "missing: ['onnx', 'onnxscript']",
        "pip install 'mmvq[onnx]'",
    ),
    Case(
        without_the_hub,
        ImportError,
        "mmvq: the Hub's methods need huggingface_hub and safetensors",
        "missing: 'huggingface_hub'",
        "pip install 'mmvq[hub]'",
    ),
    *(
        Case(
            from_config(config),
            ValueError,
            "CLUBEstimator.from_pretrained: there must be a config.json as save_pretrained writes "
            "it",
            f"config: {config!r}",
            "check the folder or the repo's name, or save the module again",
        )
        for config in (None, {}, {"x_dim": 4}, {**CONFIG, "version": "1"})
    ),
    *(
        Case(
            lambda source=source: mmvq.CLUBEstimator.from_pretrained(source, local_files_only=True),
            FileNotFoundError,
            "CLUBEstimator.from_pretrained: source must be a folder that save_pretrained wrote, or "
            "a repo on the Hub",
            f"source: {source!r}",
            'check the path: the folder, not a file in it; a repo is named "user/name"',
        )
        for source in ("/no/such/folder", "./nor", "or/that", os.devnull)
    ),
    Case(
        from_config({**CONFIG, "class": "CrossCPC"}),
        ValueError,
        "CLUBEstimator.from_pretrained: the file is of another class",
        "found: 'CrossCPC'",
        "call from_pretrained of CrossCPC",
    ),
    Case(
        from_config({**CONFIG, "version": 2}),
        ValueError,
        "CLUBEstimator.from_pretrained: the state is of version 2, this mmvq knows up to 1",
        "version: 2",
        "install the mmvq that saved it",
    ),
    Case(
        from_config({**CONFIG, "pass_again": {"a": "A", "b": "B", "c": "C"}}, c=1),
        ValueError,
        "CLUBEstimator.from_pretrained: config.json cannot hold a, b",
        "a: 'A'   b: 'B'",
        "pass a=..., b=... to from_pretrained",
    ),
]

FOREIGN = [
    *(
        foreign(
            "the source must hold embed [1, L, D], embed_avg, cluster_size and initted",
            "pass a VectorQuantize, its _codebook, or the state_dict of either",
            source,
            "dict",
            embed,
        )
        for source, embed in (
            ({}, "None"),
            ({**BUFFERS, "embed": codes}, "float32[8, 4]"),
            ({**BUFFERS, "embed": 1.0}, "1.0"),
            ({**BUFFERS, "cluster_size": torch.ones(1, 7)}, "float32[1, 8, 4]"),
        )
    ),
    foreign(
        "the source must hold embed [1, L, D], embed_avg, cluster_size and initted",
        "pass a VectorQuantize, its _codebook, or the state_dict of either",
        "file.pt",
        "str",
        "None",
    ),
    foreign(
        "the source must hold embed [1, L, D], embed_avg, cluster_size and initted",
        "pass a VectorQuantize, its _codebook, or the state_dict of either",
        nn.Linear(4, 8),
        "Linear",
        "None",
    ),
    foreign(
        "several codebooks do not fit into one quantizer",
        "load them one by one: {name: buffer[h : h + 1] for each of the four buffers}",
        {name: x.expand(2, *x.shape[1:]) if x.ndim else x for name, x in BUFFERS.items()},
        "dict",
        "float32[2, 8, 4]",
    ),
    foreign(
        "a quantizer has no heads",
        "pass the _codebook alone, and split the features into heads before the quantizer",
        like_theirs(heads=2),
        "Module",
    ),
    foreign(
        "a quantizer has no projections (codebook_dim must equal dim)",
        "pass the _codebook alone, and keep project_in and project_out around the quantizer",
        {**BUFFERS, "project_in.0.weight": codes},
        "dict",
    ),
    foreign(
        "the codes must be for Euclidean distance, not for cosine similarity",
        "train a quantizer anew, on features of unit length",
        like_theirs(use_cosine_sim=True),
        "Module",
    ),
    foreign(
        "affine codes change with every batch, and a quantizer's do not",
        "train with affine_param=False first",
        {**BUFFERS, "codebook_mean": torch.zeros(1, 1, 4)},
        "dict",
    ),
    foreign(
        "the codebook has not been initialized yet",
        "train it first, or build a MultiModalEMAQuantizer, whose default is k-means too",
        {**BUFFERS, "initted": torch.tensor(False)},
        "dict",
    ),
    Case(
        lambda: vector_quantize_pytorch.load({**BUFFERS, "embed": torch.full((1, 8, 4), 1.5)}),
        ValueError,
        "vector_quantize_pytorch.load: embed must be the moving average embed_avg / cluster_size",
        "largest_difference: 0.5",
        "learnable or cosine codes are not: train a quantizer anew",
    ),
    Case(
        lambda: vector_quantize_pytorch.load(
            {**BUFFERS, "embed_avg": torch.full((1, 8, 4), torch.nan)}
        ),
        ValueError,
        "vector_quantize_pytorch.load: embed must be the moving average embed_avg / cluster_size",
        "largest_difference: nan",
        "learnable or cosine codes are not: train a quantizer anew",
    ),
]

HEALTH = [
    Case(
        lambda: mmvq.CodebookMonitor(nn.Linear(4, 4)),  # type: ignore[arg-type]
        TypeError,
        "CodebookMonitor: quantizer must be a MultiModalEMAQuantizer",
        "quantizer: Linear",
        "pass the module itself: not the model around it, and before torch.compile",
    ),
    Case(
        lambda: onnx.export(nn.Linear(4, 4), "file.onnx"),  # type: ignore[arg-type]
        TypeError,
        "mmvq.onnx.export: quantizer must be a MultiModalEMAQuantizer",
        "quantizer: Linear",
        "pass the module itself: not the model around it, and before torch.compile",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), "runs"),  # type: ignore[arg-type]
        TypeError,
        "CodebookMonitor: log must be a callable (name, value, step), a SummaryWriter, or None",
        "log: 'runs'",
        "pass print to try it",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), club=nn.Linear(4, 4)),
        TypeError,
        "CodebookMonitor: club must be or hold a CLUBEstimator",
        "club: Linear",
        "leave it out if there is none to watch",
    ),
    Case(
        lambda: mmvq.CodebookMonitor(quantizer(), every=0),
        ValueError,
        "CodebookMonitor: every must be an int of at least 1",
        "every: 0",
        "pass a Python int, 1 or more",
    ),
    Case(
        lambda: mmvq.functional.code_agreement({"audio": whole.long(), "video": whole[:1].long()}),
        ValueError,
        "code_agreement: the indices of all modalities must have one shape [B, T]",
        "indices: {'audio': int64[2, 5], 'video': int64[1, 5]}",
        "give modalities of one time grid; positions of different grids do not pair",
    ),
    *(
        Case(
            lambda counts=counts: mmvq.functional.code_usage(counts),
            ValueError,
            "code_usage: counts must hold a tensor [L] for each modality, of one L",
            f"counts: {came}",
            "pass quantizer.usage().counts; torch.bincount makes them of indices",
        )
        for counts, came in (
            ({}, "{}"),
            ({"audio": whole, "video": whole}, "{'audio': bool[2, 5], 'video': bool[2, 5]}"),
            ({"a": codes[0], "b": z[0, 0, :3]}, "{'a': float32[4], 'b': float32[3]}"),
        )
    ),
    *(
        Case(
            lambda given=given: mmvq.figures.plot_codes(codes, given),
            TypeError,
            "plot_codes: counts must map one or more modalities to tensors [L]",
            f"counts: {came}",
            "pass quantizer.usage().counts",
        )
        for given, came in ((anything or quantizer().usage(), "CodeUsage"), ({}, "dict"))
    ),
    Case(
        without_matplotlib,
        ImportError,
        "mmvq.figures: pictures need matplotlib, which is not installed",
        "missing: 'matplotlib.figure'",
        "pip install matplotlib",
    ),
]

CASES = PRETRAINED + FOREIGN + ARGUMENTS + FEATURES + MODULES + KERNELS + COMPAT + HEALTH


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule.replace(": ", "-"))
def test_message(case: Case) -> None:
    with pytest.raises(case.kind) as error:
        case.call()
    assert type(error.value) is case.kind
    assert str(error.value) == case.text


def test_values_are_looked_at_only_when_asked() -> None:
    loss = quantizer()({"audio": nan, "video": z}).loss
    assert loss.isnan()
    with patch.dict(os.environ, MMVQ_CHECK="1"):
        quantizer()(both)  # finite: nothing to say
        masked = torch.zeros(2, 5, dtype=torch.bool)
        quantizer()({"audio": nan}, {"audio": masked})  # padding is never read
    with patch.dict(os.environ, MMVQ_CHECK="0"):
        quantizer()({"audio": nan})


def test_the_form_of_a_message() -> None:
    text = message("f", "x must be y", hint="do z", x=z.to("meta"), name="a", none=None, n=0.5)
    assert text == (
        "f: x must be y.\n  x: float32[2, 5, 4] on meta   name: 'a'   none: None   n: 0.5\n"
        "  Hint: do z."
    )
    text = message("f", "r", hint="h", kind=Tensor, module=nn.Linear(1, 1), many={"a": [z, (1,)]})
    assert "kind: Tensor   module: Linear   many: {'a': [float32[2, 5, 4], (1,)]}\n" in text


def test_every_raise_has_a_case() -> None:
    """Each `raise` statement of the two packages is where one of the cases ends."""
    paths = [
        path
        for package in (mmvq, kernels)
        for path in Path(package.__file__ or "").parent.rglob("*.py")
    ]
    raises = {
        (path.name, path.parent.name, node.lineno)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    }
    reached = set()
    for case in CASES:
        with pytest.raises(case.kind) as error:
            case.call()
        end = error.traceback[-1]
        path = Path(end.path)
        reached.add((path.name, path.parent.name, end.lineno + 1))
    assert raises == reached
