"""`mmvq.compat`: released checkpoints and modules, and codebooks of vector-quantize-pytorch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import chdir
from typing import Any

import torch
from cases.form import Case, both, codes, z

from mmvq.compat import cmg, vector_quantize_pytorch


def from_file(content: Any, load: Callable[[str], object]) -> Callable[[], object]:
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


COMPAT = [
    Case(
        lambda: cmg.load_checkpoint(os.devnull),
        ValueError,
        "load_checkpoint: the file must be a whole checkpoint of tensors and plain containers",
        f"path: {os.devnull!r}   begins_with: \"b''\"   error: EOFError",
        "pass a DCID-model-{epoch}.pt of the release, untouched",
    ),
    Case(
        from_file([1], cmg.load_checkpoint),
        ValueError,
        "load_checkpoint: the file must hold a dict of parts",
        "path: 'file.pt'   found: list",
        "pass a DCID-model-{epoch}.pt of the release, untouched",
    ),
    Case(
        from_file({"epoch": 1}, cmg.load_checkpoint),
        ValueError,
        "load_checkpoint: the file must have Encoder_parameters of two or three modalities",
        "path: 'file.pt'   found: ['epoch']",
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

FOREIGN = [
    *(
        foreign(
            "the source must hold embed [1, L, D] or [L, D], embed_avg, cluster_size and initted",
            "pass a VectorQuantize, its _codebook, the state_dict of either, or a file of one",
            source,
            "dict",
            embed,
        )
        for source, embed in (
            ({}, "None"),
            ({**BUFFERS, "embed": codes}, "float32[8, 4]"),
            ({**BUFFERS, "embed": 1.0}, "None"),
            ({**BUFFERS, "cluster_size": torch.ones(1, 7)}, "float32[1, 8, 4]"),
        )
    ),
    Case(
        lambda: vector_quantize_pytorch.load(os.devnull),
        ValueError,
        "vector_quantize_pytorch.load: the file must be a whole checkpoint of tensors and plain "
        "containers",
        f"path: {os.devnull!r}   begins_with: \"b''\"   error: EOFError",
        "pass a VectorQuantize, its _codebook, the state_dict of either, or a file of one",
    ),
    Case(
        lambda: cmg.load({"embedding": codes}),
        ValueError,
        "cmg.load: the source must hold embedding [L, D] and ema_count [L]",
        "embedding: float32[8, 4]   ema_count: None",
        "pass a released checkpoint, a CMGQuantizer, or a state_dict of one",
    ),
    Case(
        lambda: cmg.load({"a.ema_count": codes, "b.ema_count": codes}),
        ValueError,
        "cmg.load: there must be one codebook, and the source has 2",
        "prefixes: ['a.', 'b.']",
        "pass one submodule, or the part of one: {k.removeprefix(p): x for k, x in state.items() "
        "if k.startswith(p)} with its prefix p",
    ),
    foreign(
        "the source must hold embed [1, L, D] or [L, D], embed_avg, cluster_size and initted",
        "pass a VectorQuantize, its _codebook, the state_dict of either, or a file of one",
        torch.nn.Linear(4, 8),
        "Linear",
        "None",
    ),
    foreign(
        "several codebooks do not fit into one quantizer",
        "load head h alone: {name: x[h : h + 1] if x.ndim else x for name, x in state.items()}",
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
    *(
        foreign(
            "the codebook has not been initialized yet, or has counted no vector",
            "train it first, or build a MultiModalEMAQuantizer, whose default is k-means too",
            {**BUFFERS, **untrained},
            "dict",
        )
        for untrained in (
            {"initted": torch.tensor(False)},
            {"cluster_size": torch.zeros(1, 8)},
        )
    ),
    Case(
        lambda: vector_quantize_pytorch.load({**BUFFERS, "embed": torch.full((1, 8, 4), 1.5)}),
        ValueError,
        "vector_quantize_pytorch.load: embed must be the moving average embed_avg / cluster_size",
        "largest_difference: 0.5",
        "pass the eps that it was trained with; learnable or cosine codes are not an average: "
        "train a quantizer anew",
    ),
    *(
        Case(
            lambda damaged=damaged: vector_quantize_pytorch.load({**BUFFERS, **damaged}),
            ValueError,
            "vector_quantize_pytorch.load: codes must be finite and below 1e15, and counts finite "
            "and not below 0",
            "rows_that_are_not: 8",
            "look for a damaged file, or for a division by a count of 0",
        )
        for damaged in (
            {"embed_avg": torch.full((1, 8, 4), torch.nan)},
            {"embed": torch.full((1, 8, 4), torch.inf)},
            {"cluster_size": torch.full((1, 8), -1.0)},
        )
    ),
]
