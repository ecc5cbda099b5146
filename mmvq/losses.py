"""The losses that tie modalities to the codebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch.distributed as dist
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_features,
    check_finite,
    check_not_negative,
    check_same_length,
    message,
)
from mmvq.distributed import OverRanks, gather_batch_sizes
from mmvq.settings import Setting


class CrossModalCommitmentLoss(nn.Module):
    r"""Commitment of each modality to its own codes and to those of the others (Eq. 8).

    $$L = \sum_a \Big( \beta \lVert z^a - \mathrm{sg}[e^a] \rVert^2 + \frac{1}{M - 1}
      \sum_{b \ne a} \rho_{ab} \beta \lVert z^a - \mathrm{sg}[e^b] \rVert^2 \Big)$$

    Args:
        beta: weight of the loss.
        cross_ratio: ratio rho for all pairs, or a mapping from ordered pairs to ratios, in which
            (a, b) pulls z_a towards e_b; a missing pair has ratio 0.
        reduction: `"mean"` over the valid elements; `"sum"` over D, then the mean over the valid
            positions (exactly Eq. 8).

    Raises:
        ValueError: a negative beta or ratio, a key that is not a pair, an unknown reduction.

    Source: Eq. 8; see `mmvq.functional.commitment` for how it extends to masks and M > 2.

    Examples:
        >>> z = {"audio": torch.ones(2, 5, 4), "video": torch.zeros(2, 5, 4)}
        >>> codes = {"audio": torch.zeros(2, 5, 4), "video": torch.zeros(2, 5, 4)}
        >>> CrossModalCommitmentLoss(beta=1.0)(z, codes)  # own codes of audio: 1, cross: 0.5
        tensor(1.5000)
    """

    beta: Setting[float] = Setting(check_not_negative)
    cross_ratio: float | Mapping[tuple[str, str], float]

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Mapping[str, Tensor],
            codes: Mapping[str, Tensor],
            masks: Mapping[str, Tensor] | None = None,
        ) -> Tensor:
            """As `forward`; `nn.Module` does not type calls."""
            ...

    def __init__(
        self,
        beta: float = 0.25,
        cross_ratio: float | Mapping[tuple[str, str], float] = 0.5,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        where = "CrossModalCommitmentLoss"
        if isinstance(cross_ratio, Mapping):
            if not all(isinstance(pair, tuple) and len(set(pair)) == 2 for pair in cross_ratio):
                rule = "cross_ratio must be a number, or map pairs of modalities to numbers"
                hint = 'pass {("audio", "video"): 0.5} to pull audio towards the codes of video'
                raise ValueError(message(where, rule, hint=hint, cross_ratio=cross_ratio))
            ratios = {f"cross_ratio[{pair!r}]": ratio for pair, ratio in cross_ratio.items()}
        else:
            ratios = {"cross_ratio": cross_ratio}
        check_not_negative(where, **ratios)
        check_choice(where, ("mean", "sum"), reduction=reduction)
        self.beta, self.cross_ratio, self.reduction = beta, cross_ratio, reduction

    def forward(
        self,
        features: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            features: features z, name -> `[B, T, D]` or `[B, D]`.
            codes: chosen codes e, name -> same shape as the features; they get no gradient.
            masks: padding masks, name -> bool `[B, T]`, True = valid.

        Returns:
            Scalar, in at least float32.

        Raises:
            ValueError: shapes or names do not match.
            TypeError: features are not floating point.
        """
        first, *rest = self.terms(features, codes, masks).values()
        return sum(rest, first)

    def terms(
        self,
        features: Mapping[str, Tensor],
        codes: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the term of each modality: name -> scalar. The sum of all terms is the loss.

        Arguments and errors as in `forward`. For the loss of a quantizer, pass its features, its
        `quantized` as codes, and its masks. `decode(indices)` would return codes after the step.

        Examples:
            >>> z = {"audio": torch.ones(2, 5, 4), "video": torch.zeros(2, 5, 4)}
            >>> codes = {"audio": torch.zeros(2, 5, 4), "video": torch.zeros(2, 5, 4)}
            >>> CrossModalCommitmentLoss(beta=1.0).terms(z, codes)
            {'audio': tensor(1.5000), 'video': tensor(0.)}
        """
        where = "CrossModalCommitmentLoss"
        z, valid = check_features(where, features, masks)
        ratio = self.cross_ratio
        if any(ratio.values()) if isinstance(ratio, Mapping) else ratio:
            check_same_length(where, z, "; or drop the cross term with cross_ratio=0")
        given = codes if isinstance(codes, Mapping) else {}
        if any(getattr(given.get(name), "shape", None) != features[name].shape for name in z):
            rule = "codes must have the same names and shapes as features"
            hint = "pass the code of every feature, codebook[indices]"
            raise ValueError(message(where, rule, hint=hint, features=features, codes=codes))
        check_finite(where, z, valid)
        e = {name: codes[name].view_as(x) for name, x in z.items()}
        return functional.commitment_terms(
            z, e, valid, beta=self.beta, cross_ratio=ratio, reduction=self.reduction
        )

    def _json(self) -> dict[str, Any]:
        """Arguments in JSON form, which cannot have tuples as keys."""
        ratio = self.cross_ratio
        pairs = [[*pair, r] for pair, r in ratio.items()] if isinstance(ratio, Mapping) else ratio
        return {"beta": self.beta, "cross_ratio": pairs, "reduction": self.reduction}

    @classmethod
    def _from_json(cls, arguments: Mapping[str, Any]) -> Self:
        """Build the loss that `_json` describes."""
        ratio = arguments["cross_ratio"]
        if isinstance(ratio, list):
            ratio = {tuple(pair): r for *pair, r in ratio}
        return cls(**{**arguments, "cross_ratio": ratio})

    def extra_repr(self) -> str:
        """The settings."""
        return f"beta={self.beta}, cross_ratio={self.cross_ratio}, reduction={self.reduction!r}"


class CrossModalCodeMatchingLoss(OverRanks):
    r"""L_cmcm: the modalities of a clip should use the same codes (Sec. 4.4).

    $$S_{ij} = \sum_l P^a_i(l) \ln P^b_j(l) + P^b_j(l) \ln P^a_i(l)$$

    S is contrasted over the batch in both directions, and averaged over pairs of modalities. P is
    `mmvq.functional.code_probabilities`. Loss and gradient are finite even if z equals a code.

    Args:
        gather: whether clips of all ranks are candidates. Every rank then has the loss of one
            process on the whole batch, and also its gradient once gradients are averaged over ranks
            (as DDP and FSDP do; see `mmvq.distributed.Ranks`). All ranks must have the same
            modalities. The batch size may differ, down to 0.
        process_group: ranks to gather from; None is the default group.

    Source: Liu et al. 2021, "Cross-Modal Discrete Representation Learning"; the L_cmcm of Sec. 4.4.

    Examples:
        >>> alike = torch.zeros(8, 10, 4)  # indistinguishable clips: ln 8
        >>> CrossModalCodeMatchingLoss()({"audio": alike, "video": alike}, torch.randn(16, 4))
        tensor(2.0794)
    """

    gather: bool
    process_group: dist.ProcessGroup | None

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Mapping[str, Tensor],
            codebook: Tensor | Mapping[str, Tensor],
            masks: Mapping[str, Tensor] | None = None,
        ) -> Tensor:
            """As `forward`; `nn.Module` does not type calls."""
            ...

    def __init__(
        self, *, gather: bool = False, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.gather, self.process_group = gather, process_group

    def forward(
        self,
        features: Mapping[str, Tensor],
        codebook: Tensor | Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the loss of a batch.

        Args:
            features: features, name -> `[B, T, D]` or `[B, D]`; T may differ between modalities.
            codebook: codes `[L, D]`, or name -> `[L, D]`, tied by index.
            masks: padding masks, name -> bool `[B, T]`, True = valid.

        Returns:
            Scalar in nats, in at least float32; 0 with fewer than two modalities.

        Raises:
            ValueError: shapes or names do not match; with `gather`, names differ between ranks
                (raised on all ranks).
            TypeError: features are not floating point.
        """
        where = "CrossModalCodeMatchingLoss"
        z, valid = check_features(where, features, masks)
        codebooks = codebook if isinstance(codebook, Mapping) else dict.fromkeys(z, codebook)
        for name, x in z.items():
            codes: Any = codebooks.get(name)
            floating = isinstance(codes, Tensor) and codes.is_floating_point()
            if not floating or codes.shape[1:] != x.shape[-1:] or codes.device != x.device:
                rule = (
                    f"the codebook of {name!r} must be [L, {x.shape[-1]}], floating point, "
                    "on the device of the features"
                )
                hint = "pass quantizer.codebook, or one codebook per modality"
                raise ValueError(message(where, rule, hint=hint, features=x, codebook=codes))
        if len({codes.shape[0] for codes in codebooks.values()}) > 1:
            rule = "codebooks must have the same size, as they are tied by index"
            hint = "build them with the same codebook_size"
            raise ValueError(
                message(
                    where, rule, hint=hint, **{name: codes for name, codes in codebooks.items()}
                )
            )
        check_finite(where, z, valid)
        batch = functional.WHOLE
        if self.gather:
            batch = gather_batch_sizes(where, next(iter(z.values())), self.process_group, names=z)
        return functional.code_matching(z, codebook, valid, batch=batch)
