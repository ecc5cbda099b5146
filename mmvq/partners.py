"""Inputs of the moving average: each vector, mixed with its partner (Sec. 4.3, Eq. 7)."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import pack, unpack
from torch import Tensor

from mmvq import functional
from mmvq.checks import check_choice, check_positive, message
from mmvq.functional.attention import attend, direction, without_masked
from mmvq_kernels.operators import MOST_GROUPS, fused, register

Tensors = Mapping[str, Tensor]
Partner = Callable[[Tensor, Tensors, Tensors], Tensor]

PARTNERS: dict[str, Partner] = {
    "attention": functional.cross_attend,
    "aligned": functional.aligned_partner,
}


LONGEST = 64  # T of clips whose attention is fused; of longer ones torch's takes less (estimated)


def check_partner(where: str, **values: object) -> None:
    """Check that each value is the name of a partner or a callable."""
    hint = "pass one of these, or a callable (z_a, others, masks) -> r"
    names = {name: value for name, value in values.items() if not callable(value)}
    check_choice(where, (*PARTNERS, "none"), hint, **names)


def check_temperature(where: str, **values: float | None) -> None:
    """Check that each value is a positive number or None."""
    check_positive(where, **{name: x for name, x in values.items() if x is not None})


def contributions(
    rows: Tensor,
    shapes: Mapping[str, torch.Size],
    valid: Tensor | None,
    groups: Sequence[int],
    dtype: torch.dtype,
    partner: str | Partner,
    weight: float,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""What the vectors add to o, and the group of each: -1 for one that may not enter.

    That is $(1 - w) z^a + w r^a$; without others, $r^a = z^a$. A vector may enter if it is valid,
    and it and what it adds are finite.

    Args:
        rows: the vectors of all modalities, `[N, D]`.
        shapes: name -> shape of its features, whose first two numbers are B and T.
        valid: padding mask, bool `[N]`, or None.
        groups: number of the group of each modality, ascending.
        dtype: dtype of the result, float32 or float64.
        partner: name in `PARTNERS`, `"none"`, or callable `(z_a, others, masks) -> r`, which gets
            zeros for masked vectors.
        weight: weight w of the partner.
        temperature: temperature of `"attention"` (`functional.cross_attend`); otherwise ignored.

    Returns:
        Values `[N, D]`, and int64 `[N]`.

    Raises:
        ValueError: the callable does not return r, `[B, T, D]`.
    """
    first, *others = shapes.values()
    alike = all(shape == first for shape in others) and groups[-1] < MOST_GROUPS
    known = isinstance(partner, str) and not (partner == "attention" and first[1] > LONGEST)
    if known and alike and dtype == torch.float32 and fused(rows):
        return _mix(rows, valid, first[0], groups, str(partner), weight, temperature)
    usable = functional.finite_rows(rows)
    if valid is not None:
        usable = usable & valid
    sizes: Any = [(*shape[:2],) for shape in shapes.values()]  # of positions
    masks = dict(zip(shapes, unpack(usable, sizes, "*"), strict=True))
    z = dict(zip(shapes, unpack(rows.to(dtype), sizes, "* d"), strict=True))
    values, _ = pack([*mix_partners(z, masks, partner, weight, temperature).values()], "* d")
    # a callable may return any values, and scores divided by a temperature may overflow
    if callable(partner) or temperature is not None:
        usable = usable & functional.finite_rows(values)
    numbers = zip(groups, masks.values(), strict=True)
    owners, _ = pack([torch.full_like(x, g, dtype=torch.long) for g, x in numbers], "*")
    return values, torch.where(usable, owners, -1)


def _mix_torch(
    rows: Tensor,
    valid: Tensor | None,
    clips: int,
    groups: typing.Sequence[int],
    partner: str,
    weight: float,
    temperature: float | None,
) -> tuple[Tensor, Tensor]:
    """`contributions` of modalities with equal T."""
    shape = torch.Size((clips, len(rows) // max(1, len(groups) * clips)))
    shapes = dict.fromkeys(map(str, groups), shape)
    settings = torch.float32, partner, weight, temperature
    return contributions(rows, shapes, valid, groups, *settings)


_mix: Callable[..., tuple[Tensor, Tensor]] = register(
    "mmvq::mix",
    _mix_torch,
    gpu="mmvq_kernels.gpu.mixing:mix",
    inline=True,
    fake=lambda rows, *_: (
        torch.empty_like(rows, dtype=torch.float32, memory_format=torch.contiguous_format),
        rows.new_empty(rows.shape[0], dtype=torch.long),
    ),
)


def mix_partners(
    z: Tensors,
    masks: Tensors,
    partner: str | Partner,
    weight: float,
    temperature: float | None = None,
) -> Tensors:
    """Compute $(1 - w) z^a + w r^a$ for each modality; arguments and error as `contributions`."""
    if partner == "none" or weight == 0:
        return z
    if callable(partner):  # `PARTNERS` read no masked vectors of the others
        z = {name: torch.where(masks[name][..., None], x, 0) for name, x in z.items()}
    values, find = dict(z), partner if callable(partner) else PARTNERS[partner]
    if partner == "attention":
        values = {name: without_masked(x, masks[name]) for name, x in z.items()}
        keys = {name: direction(x, temperature) for name, x in values.items()}
    mixed = dict(z)
    for name, x in z.items():
        others = {b: values[b] for b in z if b != name}
        of_others = {b: masks[b] for b in others}
        if not others:
            continue
        with torch.autocast(x.device.type, enabled=False):
            if partner == "attention":
                queries = keys[name] if values[name] is x else direction(x, temperature)
                r = attend(x, queries, keys, others, of_others, temperature)
            else:
                r = find(x, others, of_others)
        if not isinstance(r, Tensor) or r.shape != x.shape:
            rule = "the partner callable must return a tensor shaped as z_a"
            hint = "return [B, T, D], and z_a itself where there is no partner"
            raise ValueError(message("MultiModalEMAQuantizer", rule, hint=hint, z_a=x, r=r))
        mixed[name] = (x * (1 - weight)).add_(r, alpha=weight)  # symmetric for w = 1/2
    return mixed
