"""Extending a trained quantizer by modalities or codes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from mmvq import functional
from mmvq.checks import check_int, check_modalities, message
from mmvq.codebook import EMACodebook
from mmvq.pretrained import parameters

if TYPE_CHECKING:
    from mmvq.quantizer import MultiModalEMAQuantizer

Quantizer = TypeVar("Quantizer", bound="MultiModalEMAQuantizer")


def extend(
    quantizer: Quantizer, modalities: Sequence[str] | None, codebook_size: int | None
) -> Quantizer:
    """Return the new quantizer of `MultiModalEMAQuantizer.extended`."""
    where, old = "MultiModalEMAQuantizer.extended", quantizer.ema_codebook
    names = quantizer.modalities if modalities is None else check_modalities(where, modalities)
    size = quantizer.codebook_size if codebook_size is None else codebook_size
    check_int(where, quantizer.codebook_size, codebook_size=size)
    if lost := [name for name in quantizer.modalities if name not in names]:
        rule, hint = "modalities must hold the old ones too", "pass all names, old and new"
        raise ValueError(message(where, rule, hint=hint, modalities=names, lost=lost))
    given = {name: getattr(quantizer, name) for name in parameters(type(quantizer))}
    given = {name: deepcopy(x) if isinstance(x, nn.Module) else x for name, x in given.items()}
    with old.codes.device:
        new = type(quantizer)(**{**given, "modalities": names, "codebook_size": size})
    rest = {k: x for k, x in quantizer.state_dict().items() if not k.startswith("ema_codebook.")}
    new.load_state_dict(rest, strict=False)  # such as the tensors of a custom loss
    order = sorted(names)  # as the groups of the codebook
    rows = [order.index(name) for name in sorted(quantizer.modalities)]
    if quantizer.assignment == "mixed":  # groups of the mixtures follow
        rows += [len(order) + row for row in rows]
    _grow(new.ema_codebook, old, rows)
    return new.train(quantizer.training)


@torch.no_grad()
def _grow(new: EMACodebook, old: EMACodebook, rows: Sequence[int]) -> None:
    """Copy the state of `old` to `new`, group i to group `rows[i]`; new codes start beside old."""
    new.to(old.weight.dtype)
    if not bool(old.initialized):  # the first batch initialises all codes
        return
    L = len(old.codes)
    donors = old.counts.argsort(descending=True, stable=True)
    donors = donors[torch.arange(len(new.codes) - L, device=donors.device) % L]
    codes = functional.jittered(old.codes[donors], old.codes, old.steps)
    counts = torch.cat([old.counts, torch.ones_like(old.counts[donors])])
    sums = codes * functional.laplace_smoothing(counts, new.eps)[L:, None]
    new.begin(torch.cat([old.codes, codes]), counts, torch.cat([old.sums, sums]))
    new.steps.copy_(old.steps)
    for mine, ages, usage in zip(rows, old.ages, old.usage, strict=True):
        new.ages[mine, :L], new.usage[mine, :L] = ages, usage
        new.ages[mine, L:] = ages.amax().clamp(max=0)  # 0, or -1 for a group never seen
