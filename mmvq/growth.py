"""A quantizer that goes on with more modalities or more codes."""

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
    """What `MultiModalEMAQuantizer.extended` returns."""
    where, old = "MultiModalEMAQuantizer.extended", quantizer.ema_codebook
    names = quantizer.modalities if modalities is None else check_modalities(where, modalities)
    size = old.size if codebook_size is None else codebook_size
    check_int(where, old.size, codebook_size=size)
    if lost := [name for name in quantizer.modalities if name not in names]:
        rule, hint = "modalities must hold the old ones too", "pass all names, old and new"
        raise ValueError(message(where, rule, hint=hint, modalities=names, lost=lost))
    given = {name: getattr(quantizer, name) for name in parameters(type(quantizer))}
    given = {name: deepcopy(x) if isinstance(x, nn.Module) else x for name, x in given.items()}
    with old.codes.device:
        new = type(quantizer)(**{**given, "modalities": names, "codebook_size": size})
    rest = {k: x for k, x in quantizer.state_dict().items() if not k.startswith("ema_codebook.")}
    new.load_state_dict(rest, strict=False)  # of parts with parameters
    order = sorted(names)  # that of the codebook's groups
    _grow(new.ema_codebook, old, [order.index(name) for name in sorted(quantizer.modalities)])
    return new.train(quantizer.training)


@torch.no_grad()
def _grow(new: EMACodebook, old: EMACodebook, rows: Sequence[int]) -> None:
    """Make `new` go on from `old`, whose group i is group `rows[i]` of `new`."""
    new.to(old.weight.dtype)
    if not bool(old.initialized):  # the first batch gives all codes
        return
    L, added = old.size, new.size - old.size
    donors = old.counts.argsort(descending=True, stable=True)
    donors = donors[torch.arange(added, device=donors.device) % L]
    codes = functional.jittered(old.codes[donors], old.codes, old.steps)
    counts = torch.cat([old.counts, torch.ones_like(old.counts[donors])])
    sums = codes * functional.laplace_smoothing(counts, new.eps)[L:, None]
    new.begin(torch.cat([old.codes, codes]), counts, torch.cat([old.sums, sums]))
    new.steps.copy_(old.steps)
    for mine, ages, usage in zip(rows, old.ages, old.usage, strict=True):
        new.ages[mine, :L], new.usage[mine, :L] = ages, usage
        new.ages[mine, L:] = ages.amax().clamp(max=0)  # 0 if the group was seen
