"""The partner of a vector: a mean of the other modalities' vectors at its position (Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmvq.functional.contrastive import unit_length
from mmvq_kernels.backends import transformed
from mmvq_kernels.checks import is_cpu_readable


def cross_attend(
    z: Tensor,
    others: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    temperature: float | None = None,
) -> Tensor:
    r"""Compute partners by parameter-free cross-attention within each clip.

    $$r_{t} = \frac{1}{|O|} \sum_{b \in O}
      \mathrm{softmax}_s\!\left(\sqrt{D} \cos(z_t, z^b_s)\right) z^b_s$$

    O is the set of other modalities with at least one valid segment in the clip. If O is empty,
    `r = z`. With a `temperature` $\tau$ the scores are $z_t \cdot z^b_s / \tau$. The cosine with a
    zero vector is 0.

    Args:
        z: queries `[B, T, D]`.
        others: keys and values, name -> `[B, S, D]`; S may differ between modalities.
        masks: padding masks, name -> bool `[B, S]`, True = valid.
        temperature: positive divisor of the dot products. `D ** 0.5` is the paper's formula. None
            uses the cosine, which does not depend on the scale of the features.

    Returns:
        Partners `[B, T, D]`, in memory O(B (T + S) D) where torch has a fused kernel for the dtype.
        They are differentiable once. Within transforms of `torch.func`, they are differentiable any
        number of times, in memory O(B T S).

    Source: Sec. 4.3, "cross-att", $\mathrm{softmax}(z_a z_b^T / \sqrt{D}) z_b$. The cosine departs
    from the paper. The two are equal for vectors of length $\sqrt{D}$. For unit-length features the
    paper's weights are nearly uniform, so that r is nearly the mean of the clip. In experiments,
    cos / 0.1 and cos / 0.05 were better only if all features share a large offset. There are no
    learned projections: the paper does not specify them, and they would never train, because no
    gradient passes through the moving average. The released code uses `aligned_partner`.

    Examples:
        >>> z, video = torch.randn(2, 5, 8), torch.randn(2, 7, 8)
        >>> valid = torch.ones(2, 7, dtype=torch.bool)
        >>> cross_attend(z, {"video": video}, {"video": valid}).shape
        torch.Size([2, 5, 8])
    """
    values = {name: without_masked(x, masks[name]) for name, x in others.items()}
    keys = {name: direction(x, temperature) for name, x in values.items()}
    return attend(z, direction(z, temperature), keys, values, masks, temperature)


def direction(x: Tensor, temperature: float | None) -> Tensor:
    """The factor of a score that belongs to x."""
    return unit_length(x) if temperature is None else x


def without_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x`, 0 where the mask is False."""
    return x if _is_all(mask) else x.masked_fill(~mask[..., None], 0)


def _is_all(mask: Tensor) -> bool:
    """Whether a mask is known to be True throughout: on a CPU, as a GPU would synchronise."""
    return is_cpu_readable(mask) and mask.numel() > 0 and bool(mask.numpy().all())


def attend(
    z: Tensor,
    queries: Tensor,
    keys: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    temperature: float | None,
) -> Tensor:
    """`cross_attend` with values `without_masked`, and their and the queries' `direction`."""
    if not values:
        return z.clone()
    scale = z.shape[-1] ** 0.5 if temperature is None else 1.0
    # not the `scale` argument, which would compile a graph for each temperature
    queries = queries if temperature is None else queries / temperature
    complete = [_is_all(masks[b]) for b in values]
    if all(complete):
        found = [_attend(queries, keys[b], x, None, scale) for b, x in values.items()]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)
    seen = torch.stack([masks[name].any(1) for name in values])  # [|O|, B]
    present = seen.sum(0)  # [B]
    shares = (seen / present.clamp(min=1)).to(z.dtype)[..., None, None]  # [|O|, B, 1, 1]
    r = z * (present == 0)[:, None, None]
    for b, whole, some, share in zip(values, complete, seen, shares, strict=True):
        # a softmax over no keys may be NaN: such a clip attends to all keys, with share 0
        valid = None if whole else masks[b] | ~some[:, None]  # [B, S]
        r = torch.addcmul(r, share, _attend(queries, keys[b], values[b], valid, scale))
    return r


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scale: float
) -> Tensor:
    """Compute softmax(scale q k^T) v over the valid keys, bool `[B, S]`; None: all keys.

    The memory-efficient kernels need a head dimension, and have no `torch.vmap` rule.
    """
    mask = None if valid is None else valid[:, None]  # [B, 1, S]
    if transformed():
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    q, k, v = queries[:, None], keys[:, None], values[:, None]
    if mask is not None:
        mask = mask[:, None]  # [B, 1, 1, S]: a mask expanded to [T, S] would be copied
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).squeeze(1)


def cross_attend_ref(
    z: Tensor,
    others: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    temperature: float | None = None,
) -> Tensor:
    """Slow reference of `cross_attend`: one vector at a time.

    Examples:
        >>> z, others = torch.randn(2, 3, 4), {"video": torch.randn(2, 5, 4)}
        >>> args = z, others, {"video": torch.ones(2, 5, dtype=torch.bool)}
        >>> torch.allclose(cross_attend(*args), cross_attend_ref(*args), atol=1e-6)
        True
    """
    r = z.clone()
    for b in range(z.shape[0]):
        for t in range(z.shape[1]):
            partners = []
            for name, other in others.items():
                keys = other[b][masks[name][b]]  # [valid, D]
                if len(keys) == 0:
                    continue
                scores = keys @ z[b, t]
                if temperature is None:
                    lengths = keys.norm(dim=1) * z[b, t].norm()
                    cosines = torch.where(lengths > 0, scores / lengths, 0)
                    weights = torch.softmax(z.shape[-1] ** 0.5 * cosines, 0)
                else:
                    weights = torch.softmax(scores / temperature, 0)
                partners.append(weights @ keys)
            if partners:
                r[b, t] = torch.stack(partners).mean(0)
    return r


def aligned_partner(z: Tensor, others: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
    r"""Compute partners at the same position: $r_t = \frac{1}{|O_t|} \sum_{b \in O_t} z^b_t$.

    O_t is the set of other modalities that are valid at segment t. If it is empty, `r = z`.
    Arguments as in `cross_attend`, with S = T. Source: the released code, instead of attention.

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
