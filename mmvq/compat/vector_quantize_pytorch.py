"""A codebook trained with vector-quantize-pytorch, moved into a `MultiModalEMAQuantizer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmvq.checks import message
from mmvq.functional.ema import laplace_smoothing
from mmvq.quantizer import MultiModalEMAQuantizer

_BUFFERS = ("embed", "embed_avg", "cluster_size")
_WHERE = "vector_quantize_pytorch.load"


def load(
    source: nn.Module | Mapping[str, Tensor],
    modalities: Sequence[str] = ("audio", "video"),
    **settings: Any,
) -> MultiModalEMAQuantizer:
    """A quantizer that goes on from the codebook of a `VectorQuantize`.

    Its codes, sums and counts become ours, so that indices and codes are the same. The moving
    average is the same too (Laplace smoothing in the division only), so that with one modality, or
    `partner="none"`, and no reset, training goes on as there. What differs: codes are reset by
    `reset_after` batches without use, not by a threshold on the counts, and the gradient is
    straight-through unless `gradient="rotation"` (their default for D > 1). Ages and usage start
    anew.

    Args:
        source: a `VectorQuantize`, its `_codebook`, or the `state_dict` of either: buffers `embed`
            `[1, L, D]`, `embed_avg` `[1, L, D]`, `cluster_size` `[1, L]` and `initted`.
        modalities: of the quantizer.
        **settings: all other arguments of `MultiModalEMAQuantizer`. `decay` and `eps` are taken
            from a module; a `state_dict` has neither.

    Raises:
        ValueError: there is no such codebook in `source`, or it is not one codebook kept by a
            moving average: several heads, projections, cosine similarity, affine or learnable
            codes, or not yet initialized.

    Source: vector-quantize-pytorch 1.31 and 1.32.
    """
    entries = source.state_dict() if isinstance(source, nn.Module) else source
    entries = entries if isinstance(entries, Mapping) else {}
    state = {name.removeprefix("_codebook."): x for name, x in entries.items()}
    _check_kind(source, state)
    if isinstance(source, nn.Module):
        book = getattr(source, "_codebook", source)
        settings = {name: getattr(book, name) for name in ("decay", "eps")} | settings
    embed, embed_avg, cluster_size = (state[name][0].detach() for name in _BUFFERS)
    size, dim = embed.shape
    quantizer = MultiModalEMAQuantizer(dim, size, modalities, **settings)
    ours = quantizer.ema_codebook
    average = embed_avg / laplace_smoothing(cluster_size, ours.eps)[:, None]
    difference = float((embed - average).abs().max())
    # far above rounding, far below other kinds; a NaN fails too
    if not difference <= 1e-3 * float(embed.abs().max()):
        raise ValueError(
            message(
                _WHERE,
                "embed must be the moving average embed_avg / cluster_size",
                hint="learnable or cosine codes are not: train a quantizer anew",
                largest_difference=difference,
            )
        )
    moved = {"codes": embed, "sums": embed_avg, "counts": cluster_size}
    ours.load_state_dict({**ours.state_dict(), **moved, "initialized": torch.tensor(True)})
    return quantizer


def _check_kind(source: nn.Module | Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """One Euclidean codebook without projections, trained."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    embed = tensors.get("embed", torch.empty(0))
    shapes = [getattr(tensors.get(name), "shape", None) for name in _BUFFERS]
    fits = embed.ndim == 3 and shapes == [embed.shape, embed.shape, embed.shape[:2]]
    for wrong, rule, hint in (
        (
            not fits or "initted" not in tensors,
            "the source must hold embed [1, L, D], embed_avg, cluster_size and initted",
            "pass a VectorQuantize, its _codebook, or the state_dict of either",
        ),
        (
            embed.ndim == 3 and len(embed) > 1,
            "several codebooks do not fit into one quantizer",
            "load them one by one: {name: buffer[h : h + 1] for each of the four buffers}",
        ),
        (
            getattr(source, "heads", 1) > 1,
            "a quantizer has no heads",
            "pass the _codebook alone, and split the features into heads before the quantizer",
        ),
        (
            any(name.startswith("project_in.") for name in state),
            "a quantizer has no projections (codebook_dim must equal dim)",
            "pass the _codebook alone, and keep project_in and project_out around the quantizer",
        ),
        (
            getattr(source, "use_cosine_sim", False),
            "the codes must be for Euclidean distance, not for cosine similarity",
            "train a quantizer anew, on features of unit length",
        ),
        (
            "codebook_mean" in state,
            "affine codes change with every batch, and a quantizer's do not",
            "train with affine_param=False first",
        ),
        (
            not tensors.get("initted", True),
            "the codebook has not been initialized yet",
            "train it first, or build a MultiModalEMAQuantizer, whose default is k-means too",
        ),
    ):
        if wrong:
            came = {"source": type(source), "embed": state.get("embed")}
            raise ValueError(message(_WHERE, rule, hint=hint, **came))
