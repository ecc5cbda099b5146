"""The partner of a vector: what the other modalities say where it stands (Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def cross_attend(z: Tensor, others: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    r"""Partner by parameter-free cross-attention within a clip.

    $$r_{t} = \frac{1}{|O|} \sum_{b \in O}
      \mathrm{softmax}_s\!\left(z_t \cdot z^b_s / \sqrt{D}\right) z^b_s$$

    O are the other modalities with at least one valid segment in the clip; where there is none,
    `r = z`.

    Args:
        z: the queries, `[B, T, D]`.
        others: name -> keys and values, `[B, S, D]`; S may differ between modalities.
        masks: name -> bool `[B, S]`, True = valid.

    Returns:
        `[B, T, D]`.

    Source: Sec. 4.3, "cross-att". The paper does not say what is projected; as the inputs of the
    moving average carry no gradient, learned projections would never train, so there are none. The
    released code uses `aligned_partner` instead.

    Examples:
        >>> z, video = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
        >>> valid = torch.ones(2, 7, dtype=torch.bool)
        >>> cross_attend(z, {"video": video}, {"video": valid}).shape
        torch.Size([2, 5, 8])
    """
    if not others:
        return z.clone()
    seen = torch.stack([masks[name].any(1) for name in others]).to(z.dtype)  # [|O|, B]
    present = seen.sum(0)  # [B]
    shares = (seen / present.clamp(min=1))[..., None, None]  # [|O|, B, 1, 1]
    r = z * (present == 0)[:, None, None]
    for (name, other), share in zip(others.items(), shares, strict=True):
        valid = masks[name]  # [B, S]
        logits = z @ other.mT / z.shape[-1] ** 0.5  # [B, T, S]
        lowest = torch.finfo(logits.dtype).min
        weights = logits.masked_fill(~valid[:, None], lowest).softmax(-1)
        r = torch.baddbmm(r, share * weights, torch.where(valid[..., None], other, 0))
    return r


def cross_attend_ref(
    z: Tensor, others: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> Tensor:
    """`cross_attend`, one vector at a time.

    Examples:
        >>> z, others = torch.randn(2, 3, 4), {"video": torch.randn(2, 5, 4)}
        >>> args = z, others, {"video": torch.ones(2, 5, dtype=torch.bool)}
        >>> torch.allclose(cross_attend(*args), cross_attend_ref(*args), atol=1e-6)
        True
    """
    r = z.clone()
    for b in range(z.shape[0]):
        for t in range(z.shape[1]):
            partners = [
                torch.softmax(other[b][masks[name][b]] @ z[b, t] / z.shape[-1] ** 0.5, 0)
                @ other[b][masks[name][b]]
                for name, other in others.items()
                if masks[name][b].any()
            ]
            if partners:
                r[b, t] = torch.stack(partners).mean(0)
    return r


def aligned_partner(z: Tensor, others: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    r"""Partner at the same place: $r_t = \frac{1}{|O_t|} \sum_{b \in O_t} z^b_t$.

    O_t are the other modalities valid at segment t; where there is none, `r = z`. Shapes as in
    `cross_attend`, with S = T. Source: what the authors' released code does in place of attention.

    Examples:
        >>> z, video = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
        >>> valid = torch.tensor([[True, False]])
        >>> aligned_partner(z, {"video": video}, {"video": valid})[0, :, 0]
        tensor([1., 0.])
    """
    total, present = torch.zeros_like(z), torch.zeros_like(z[..., :1])
    for name, other in others.items():
        valid = masks[name][..., None]
        total = total + torch.where(valid, other, 0)
        present = present + valid.to(z.dtype)
    return torch.where(present > 0, total / present.clamp(min=1), z)
