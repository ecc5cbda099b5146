"""Inputs of the moving average: each vector, mixed with its partner (Sec. 4.3, Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mmvq import functional
from mmvq.checks import check_choice, check_positive, message

Tensors = Mapping[str, Tensor]
Partner = Callable[[Tensor, Tensors, Tensors], Tensor]

PARTNERS: dict[str, Partner] = {
    "attention": functional.cross_attend,
    "aligned": functional.aligned_partner,
}


def check_partner(where: str, **values: object) -> None:
    """Check that each value is the name of a partner or a callable."""
    hint = "pass one of these, or a callable (z_a, others, masks) -> r"
    names = {name: value for name, value in values.items() if not callable(value)}
    check_choice(where, (*PARTNERS, "none"), hint, **names)


def check_temperature(where: str, **values: float | None) -> None:
    """Check that each value is a positive number or None."""
    check_positive(where, **{name: x for name, x in values.items() if x is not None})


def mix_partners(
    z: Tensors,
    masks: Tensors,
    partner: str | Partner,
    weight: float,
    temperature: float | None = None,
) -> Tensors:
    r"""Compute $(1 - w) z^a + w r^a$ for each modality a; without others, $r^a = z^a$.

    Args:
        z: features, name -> `[B, T, D]`.
        masks: vectors that may be partners, name -> bool `[B, T]`.
        partner: name in `PARTNERS`, `"none"`, or callable `(z_a, others, masks) -> r`, which gets
            zeros for masked vectors.
        weight: weight w of the partner.
        temperature: temperature of `"attention"` (`functional.cross_attend`); otherwise ignored.

    Raises:
        ValueError: the callable does not return r, `[B, T, D]`.
    """
    if partner == "none" or weight == 0:
        return z
    if callable(partner):  # `PARTNERS` read no masked vectors of the others
        z = {name: torch.where(masks[name][..., None], x, 0) for name, x in z.items()}
        find = partner
    elif partner == "attention":
        find = partial(functional.cross_attend, temperature=temperature)
    else:
        find = PARTNERS[partner]
    mixed = dict(z)
    for name, x in z.items():
        others = {other: z[other] for other in z if other != name}
        if not others:
            continue
        with torch.autocast(x.device.type, enabled=False):
            r = find(x, others, {other: masks[other] for other in others})
        if not isinstance(r, Tensor) or r.shape != x.shape:
            rule = "the partner callable must return a tensor shaped as z_a"
            hint = "return [B, T, D], and z_a itself where there is no partner"
            raise ValueError(message("MultiModalEMAQuantizer", rule, hint=hint, z_a=x, r=r))
        mixed[name] = (x * (1 - weight)).add_(r, alpha=weight)  # symmetric for w = 1/2
    return mixed
