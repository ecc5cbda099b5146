"""Loads a codebook of vector-quantize-pytorch or EnCodec into a `MultiModalEMAQuantizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import check_codes, check_fit, message
from mmvq.compat.reading import Source, find_codebook, is_floating
from mmvq.quantizer import MultiModalEMAQuantizer

_BUFFERS = ("embed", "embed_avg", "cluster_size")
_WHERE = "vector_quantize_pytorch.load"
_HINT = "pass a VectorQuantize, its _codebook, the state_dict of either, or a file of one"


def load(
    source: Source, modalities: Sequence[str] = ("audio", "video"), **settings: Any
) -> MultiModalEMAQuantizer:
    """Build a quantizer with the codebook of a `VectorQuantize`, or of EnCodec, to train further.

    The quantizer takes the codes, sums and counts, so that indices and codes are the same. With one
    modality, or `partner="none"`, and without reset, training continues as in the source while
    every code is chosen: the moving average is the same (Laplace smoothing in the division only).
    Three things differ. An unchosen code keeps its value here; in the source the smoothing moves it
    towards zero. Codes are reset after `reset_after` batches without use, not by a threshold on the
    counts. The gradient is straight-through unless `gradient="rotation"` (the source's default for
    D > 1). Ages and usage start at their initial values.

    Args:
        source: file, model or `state_dict` with one such codebook under any prefix: `embed`
            `[1, L, D]` or `[L, D]`, `embed_avg`, `cluster_size` and `initted` (EnCodec: `inited`).
        modalities: names of the quantizer's modalities.
        **settings: all other arguments of `MultiModalEMAQuantizer`. A module gives `decay` and
            `eps`; a file or a `state_dict` has neither.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: `source` has no such codebook, or several; or it is not a single codebook kept
            by a moving average: it has heads, projections, cosine similarity, affine or learnable
            codes, or is not yet initialized.

    Source: vector-quantize-pytorch 1.31 and 1.32; EnCodec 0.1 and its port in transformers.
    """
    prefix, tensors = find_codebook(_WHERE, source, "cluster_size", _HINT)
    scope = prefix.removesuffix("_codebook.")
    state = {name.removeprefix(prefix): x for name, x in tensors.items()}
    book = owner = None
    if isinstance(source, nn.Module):
        book, owner = (source.get_submodule(each.rstrip(".")) for each in (prefix, scope))
        their = {"decay": ("decay",), "eps": ("eps", "epsilon")}
        found = {
            name: getattr(book, each)
            for name, names in their.items()
            for each in names
            if hasattr(book, each)
        }
        settings = found | settings
    projected = any(name.startswith(f"{scope}project_in.") for name in tensors)
    _check_kind(
        source,
        state,
        heads=getattr(owner, "heads", 1),
        projected=projected,
        cosine=getattr(book, "use_cosine_sim", getattr(owner, "use_cosine_sim", False)),
    )
    embed, embed_avg = (state[name].detach().flatten(0, -2) for name in _BUFFERS[:2])
    cluster_size = state["cluster_size"].detach().flatten()
    check_codes(_WHERE, embed, cluster_size, like=embed)
    check_fit(
        _WHERE,
        functional.finite_rows(embed) & functional.finite_rows(embed_avg) & (cluster_size >= 0),
    )
    size, dim = embed.shape
    quantizer = MultiModalEMAQuantizer(dim, size, modalities, **settings)
    ours = quantizer.ema_codebook
    average = embed_avg / functional.laplace_smoothing(cluster_size, ours.eps)[:, None]
    difference = float((embed - average).abs().max())
    # far above floating-point error, far below the difference of other kinds
    if not difference <= 1e-3 * float(embed.abs().max()):
        rule = "embed must be the moving average embed_avg / cluster_size"
        hint = (
            "pass the eps that it was trained with; learnable or cosine codes are not "
            "an average: train a quantizer anew"
        )
        raise ValueError(message(_WHERE, rule, hint=hint, largest_difference=difference))
    ours.match_dtype(embed.dtype)
    ours.begin(embed, cluster_size, embed_avg)
    return quantizer


def _check_kind(
    source: Source, state: Mapping[str, Tensor], *, heads: int, projected: bool, cosine: bool
) -> None:
    """Check that the source is one trained Euclidean codebook without projections."""
    embed = state.get("embed", torch.empty(0))
    shapes = [getattr(state.get(name), "shape", None) for name in _BUFFERS]
    fits = embed.ndim in (2, 3) and shapes == [embed.shape, embed.shape, embed.shape[:-1]]
    fits = fits and is_floating(*map(state.get, _BUFFERS))
    initialized = state.get("initted", state.get("inited", torch.empty(0)))
    for wrong, rule, hint in (
        (
            not fits or initialized.numel() == 0,
            "the source must hold embed [1, L, D] or [L, D], embed_avg, cluster_size and initted",
            _HINT,
        ),
        (
            embed.ndim == 3 and len(embed) > 1,
            "several codebooks do not fit into one quantizer",
            "load head h alone: {name: x[h : h + 1] if x.ndim else x for name, x in state.items()}",
        ),
        (
            heads > 1,
            "a quantizer has no heads",
            "pass the _codebook alone, and split the features into heads before the quantizer",
        ),
        (
            projected,
            "a quantizer has no projections (codebook_dim must equal dim)",
            "pass the _codebook alone, and keep project_in and project_out around the quantizer",
        ),
        (
            cosine,
            "the codes must be for Euclidean distance, not for cosine similarity",
            "train a quantizer anew, on features of unit length",
        ),
        (
            "codebook_mean" in state,
            "affine codes change with every batch, and a quantizer's do not",
            "train with affine_param=False first",
        ),
        (
            fits and not (bool(initialized.all()) and bool(state["cluster_size"].any())),
            "the codebook has not been initialized yet, or has counted no vector",
            "train it first, or build a MultiModalEMAQuantizer, whose default is k-means too",
        ),
    ):
        if wrong:
            named = str(source) if isinstance(source, str | PathLike) else type(source)
            got = {"source": named, "embed": state.get("embed")}
            raise ValueError(message(_WHERE, rule, hint=hint, **got))
