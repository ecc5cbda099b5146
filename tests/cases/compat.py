"""`mmvq.compat`: released checkpoints and modules, and codebooks of vector-quantize-pytorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import chdir
from typing import Any

import torch
from cases.form import Call, Case, both, codes, of_each, refused, z

from mmvq.compat import cmg, vector_quantize_pytorch


def from_file(content: Any, load: Callable[[str], object]) -> Call:
    """`load` of a file, in the current folder, that holds this."""

    def run() -> object:
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            torch.save(content, "file.pt")
            return load("file.pt")

    return run


BUFFERS = {
    "embed": torch.ones(1, 8, 4),
    "embed_avg": torch.ones(1, 8, 4),
    "cluster_size": torch.ones(1, 8),
    "initted": torch.tensor(True),
}


ENDLESS: dict[str, Any] = {}
ENDLESS["again"] = ENDLESS


def foreign(rule: str, *sources: Any, hint: str = "") -> Case:
    where = "vector_quantize_pytorch.load"
    calls = of_each(vector_quantize_pytorch.load, *sources)
    return refused(ValueError, f"{where}: {rule}", *calls, hint=hint)


def like_theirs(**attributes: Any) -> torch.nn.Module:
    """A module with their buffers, and attributes of theirs."""
    module = torch.nn.Module()
    for name, x in BUFFERS.items():
        module.register_buffer(name, x.clone())
    for name, value in {"decay": 0.8, "eps": 1e-5, **attributes}.items():
        setattr(module, name, value)
    return module


CMG: dict[str, Callable[[Any], torch.nn.Module]] = {
    "CMGQuantizer": lambda names: cmg.CMGQuantizer(4, 8, names),
    "CMGCrossCPC": lambda names: cmg.CMGCrossCPC(4, names),
}
UNREADABLE = "the file must be a whole checkpoint of tensors and plain containers"

COMPAT = [
    refused(
        ValueError,
        f"load_checkpoint: {UNREADABLE}",
        lambda: cmg.load_checkpoint(os.devnull),
    ),
    refused(
        ValueError,
        "load_checkpoint: the file must hold a dict of parts",
        from_file([1], cmg.load_checkpoint),
    ),
    refused(
        ValueError,
        "load_checkpoint: the file must have Encoder_parameters of two or three modalities",
        from_file({"epoch": 1}, cmg.load_checkpoint),
    ),
    *(
        refused(
            ValueError,
            f"{where}: modalities must be two or three different names",
            *of_each(make, ("audio",), tuple("abcd"), ("audio", "audio"), "avt"),
        )
        for where, make in CMG.items()
    ),
    *(
        refused(
            ValueError,
            f"{where}: features must hold a tensor [B, T, 4] for each of ('audio', 'video'), "
            "of one shape",
            *of_each(
                lambda given, make=make: make(("audio", "video"))(given),
                {"audio": z},
                {"audio": z, "video": z[:, :3]},
                {"audio": z[..., :3], "video": z[..., :3]},
                {"audio": z[0], "video": z[0]},
                z,
            ),
        )
        for where, make in CMG.items()
    ),
    refused(
        ValueError,
        "CMGCrossCPC: start must lie in [1, T - K - 1]",
        lambda: cmg.CMGCrossCPC(4)({m: x[:, :2] for m, x in both.items()}),
        *of_each(lambda start: cmg.CMGCrossCPC(4)(both, start=start), 0, 4),
        hint="K + 2 = 3",
    ),
    refused(
        ValueError,
        "cmg.load: the source must hold embedding [L, D] and ema_count [L]",
        lambda: cmg.load({"embedding": codes}),
        lambda: cmg.load({"embedding": codes.long(), "ema_count": codes[:, 0]}),
        lambda: cmg.load({"embedding": codes, "ema_count": codes[:, 0].long()}),
    ),
    refused(
        ValueError,
        "cmg.load: there must be one codebook, and the source has 2",
        lambda: cmg.load({"a.ema_count": codes, "b.ema_count": codes}),
    ),
    foreign(
        "the source must hold embed [1, L, D] or [L, D], embed_avg, cluster_size and initted",
        {},
        {**BUFFERS, "embed": codes},
        {**BUFFERS, "embed": 1.0},
        {**BUFFERS, "embed": torch.ones(1, 8, 4, dtype=torch.long)},
        {**BUFFERS, "cluster_size": torch.ones(1, 8, dtype=torch.complex64)},
        {0: {1: BUFFERS["embed"]}, None: 2},
        {**BUFFERS, "cluster_size": torch.ones(1, 7)},
        torch.nn.Linear(4, 8),
    ),
    foreign(
        "embed must be a plain tensor: whole, not sparse, quantized or on meta",
        {**BUFFERS, "embed": torch.ones(1, 8, 4).to_sparse()},
        {**BUFFERS, "embed": torch.ones(1, 8, 4, device="meta")},
    ),
    refused(
        ValueError,
        "vector_quantize_pytorch.load: embed must be a plain tensor: whole, not sparse, quantized "
        "or on meta",
        from_file(
            {**BUFFERS, "embed": torch.ones(1, 1, 1).expand(1, 10**9, 10**6)},
            vector_quantize_pytorch.load,
        ),
    ),
    foreign("the source must not be nested so deep, or hold itself", ENDLESS),
    foreign(UNREADABLE, os.devnull),
    foreign(
        "several codebooks do not fit into one quantizer",
        {name: x.expand(2, *x.shape[1:]) if x.ndim else x for name, x in BUFFERS.items()},
        hint="load head h alone",
    ),
    foreign("a quantizer has no heads", like_theirs(heads=2)),
    foreign(
        "a quantizer has no projections (codebook_dim must equal dim)",
        {**BUFFERS, "project_in.0.weight": codes},
    ),
    foreign(
        "the codes must be for Euclidean distance, not for cosine similarity",
        like_theirs(use_cosine_sim=True),
    ),
    foreign(
        "affine codes change with every batch, and a quantizer's do not",
        {**BUFFERS, "codebook_mean": torch.zeros(1, 1, 4)},
    ),
    foreign(
        "the codebook has not been initialized yet, or has counted no vector",
        {**BUFFERS, "initted": torch.tensor(False)},
        {**BUFFERS, "cluster_size": torch.zeros(1, 8)},
    ),
    foreign(
        "embed must be the moving average embed_avg / cluster_size",
        {**BUFFERS, "embed": torch.full((1, 8, 4), 1.5)},
    ),
    foreign(
        "codes must be finite and below 1e15, and counts finite and not below 0",
        {**BUFFERS, "embed_avg": torch.full((1, 8, 4), torch.nan)},
        {**BUFFERS, "embed": torch.full((1, 8, 4), torch.inf)},
        {**BUFFERS, "cluster_size": torch.full((1, 8), -1.0)},
    ),
]
