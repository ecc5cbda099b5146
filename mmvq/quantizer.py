"""The multi-modal quantizer: Figure 2(b) as a module."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from einops import pack, unpack
from torch import Tensor

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_features,
    check_finite,
    check_fraction,
    check_indices,
    check_int,
    check_integers,
    check_loss,
    check_modalities,
    check_same_length,
    check_vectors,
    is_cpu_readable,
    message,
    without_padding,
)
from mmvq.codebook import EMACodebook, Init, ResetRule, recomputing
from mmvq.growth import extend
from mmvq.losses import CrossModalCommitmentLoss
from mmvq.partners import (
    Partner,
    Tensors,
    check_partner,
    check_temperature,
    mix_partners,
)
from mmvq.pretrained import Pretrained
from mmvq.settings import Setting

Commitment = Callable[[Tensors, Tensors, Tensors | None], Tensor]

_GRADIENTS = {"straight_through": functional.straight_through, "rotation": functional.rotate}


class QuantizerOutput(NamedTuple):
    """What a quantizer returns.

    Attributes:
        quantized: name -> codes, shaped as the features, in their dtype, with the gradient passed
            through; zeros where masked.
        indices: name -> int64 `[B, T]` (`[B]` for `[B, D]` features); -1 where masked.
        loss: scalar, the commitment loss.
    """

    quantized: dict[str, Tensor]
    indices: dict[str, Tensor]
    loss: Tensor


class MultiModalEMAQuantizer(Pretrained):
    r"""One discrete codebook for several modalities, kept by a multi-modal moving average.

    $$\hat z^a = e_l, \quad l = \mathrm{argmin}_j \lVert z^a - e_j \rVert_2 \quad \text{(Eq. 2)}$$

    $$N_i \leftarrow \gamma N_i + (1 - \gamma) \sum_m n^m_i, \quad
      o_i \leftarrow \gamma o_i + (1 - \gamma) \sum_m \sum_{j=1}^{n^m_i}
        \big( (1 - w) z^m_{ij} + w r^m_{ij} \big), \quad e_i = o_i / \tilde N_i
      \quad \text{(Eq. 7)}$$

    All modalities search the codebook as it was when `forward` began; then one joint step moves it.
    The partner r of a vector says what the other modalities hold where it stands. State and
    statistics are float32 (float64 once float64 features train it), whatever the module is cast to.
    Vectors that are not finite, or too large to square (elements beyond 1e15; 8e149 in float64),
    never enter the state. A code that no vector of a step chose keeps its e. Nothing is written in
    eval mode.

    All arguments from `decay` to `process_group`, but `update_from` and `commitment`, may be read
    and set at any time; those of the codebook in either place. Rows of its `ages` and `usage` are
    in the sorted order of the names.

    Under several ranks, each with its clips, the codebook is that of one process on all of them,
    to rounding, and the same bits on all ranks: one all-reduce of one flat buffer for each step
    (the first codes are gathered before). A rank's batch may be empty, masked, of other modalities
    or not finite; but all ranks take the same steps, in the same mode and dtype, from the same
    state (`DistributedDataParallel` hands out rank 0's; else seed alike). An error on one rank
    ends that rank, and the others with torch's error for a lost peer. The state is never sharded,
    nor averaged over ranks. It is safe under `fully_shard`, and under `DistributedDataParallel`,
    whose `forward_sync_buffers=False` saves a broadcast of what is equal anyway.

    Args:
        dim: D.
        codebook_size: L.
        modalities: the names. Their order never changes a result.
        decay: gamma in [0, 1].
        eps: Laplace smoothing of N, in the division only.
        partner: `"attention"` (`functional.cross_attend`), `"aligned"` (the other modalities at the
            same segment, as in the released code), `"none"` (r = z, ordinary EMA), or a callable
            `(z_a, others, masks) -> r` over tensors `[B, T, D]` and bool masks `[B, T]`, asked
            where there are others.
        partner_weight: w. With no partner present r = z.
        partner_temperature: of `partner="attention"`: divisor of the dot products of z and the
            others, `dim ** 0.5` in the paper. None: scores that do not depend on the scale of the
            features, sqrt(D) times the cosine.
        update_from: names of the modalities whose vectors enter N and o and vote on resets (None:
            all). Every modality searches.
        reset_after: training batches after which an idle code is reset; None never resets.
        reset_rule: `"all"`: a code survives only if every modality chose it within `reset_after`
            batches (the paper); `"any"`: if any did (the released code). Only batches that hold a
            modality count for it; a modality never yet seen does not vote.
        init: first codes from the first training batch by `"kmeans"` or `"samples"` of the vectors
            that enter o, or `"uniform"` in (-1/L, 1/L) with N = 0. Codes of your own: `set_codes`.
        commitment: the loss, called with (features, codes, masks); None makes it exactly 0.
        gradient: `"straight_through"`, or `"rotation"` (Fifty et al. 2024).
        update: `"auto"` moves the codebook at the end of each training forward; `"manual"`
            accumulates until `update_codebook()`: k micro-batches then equal one batch, and
            activation checkpointing, which repeats the forward pass in the backward pass, finds
            the codes it had. Call it after `backward`.
        process_group: the ranks that share the codebook; None is the default group.

    Raises:
        ValueError: an argument out of range.
        TypeError: a commitment that cannot be called.

    Source: Sec. 4.3 and Fig. 2(b). Departs from the released code, which updates after each
    modality in turn, uses the aligned partner and resets by another rule; see `mmvq.compat.cmg`.

    Examples:
        >>> quantizer = MultiModalEMAQuantizer(16, 32, ("audio", "video"))
        >>> features = {"audio": torch.randn(4, 10, 16), "video": torch.randn(4, 10, 16)}
        >>> quantized, indices, loss = quantizer(features)
        >>> quantized["audio"].shape, indices["video"].shape
        (torch.Size([4, 10, 16]), torch.Size([4, 10]))
    """

    partner: Setting[Literal["attention", "aligned", "none"] | Partner] = Setting(check_partner)
    partner_weight: Setting[float] = Setting(check_fraction)
    partner_temperature: Setting[float | None] = Setting(check_temperature)
    gradient: Setting[Literal["straight_through", "rotation"]] = Setting(
        partial(check_choice, choices=_GRADIENTS)
    )
    update: Setting[Literal["auto", "manual"]] = Setting(
        partial(check_choice, choices=("auto", "manual"))
    )
    commitment: Commitment | None
    ema_codebook: EMACodebook
    decay: Setting[float] = Setting(part="ema_codebook")
    eps: Setting[float] = Setting(part="ema_codebook")
    reset_after: Setting[int | None] = Setting(part="ema_codebook")
    reset_rule: Setting[ResetRule] = Setting(part="ema_codebook")
    init: Setting[Init] = Setting(part="ema_codebook")
    process_group: Setting[dist.ProcessGroup | None] = Setting(part="ema_codebook")

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Mapping[str, Tensor],
            masks: Mapping[str, Tensor] | None = None,
            *,
            freeze: bool = False,
        ) -> QuantizerOutput:
            """As `forward`: `nn.Module` gives a call no types."""
            ...

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        modalities: Sequence[str] = ("audio", "video"),
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        partner: Literal["attention", "aligned", "none"] | Partner = "attention",
        partner_weight: float = 0.5,
        partner_temperature: float | None = None,
        update_from: Collection[str] | None = None,
        reset_after: int | None = 100,
        reset_rule: ResetRule = "all",
        init: Init = "kmeans",
        commitment: Commitment | Literal["default"] | None = "default",
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        update: Literal["auto", "manual"] = "auto",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        where = "MultiModalEMAQuantizer"
        check_int(where, 1, dim=dim, codebook_size=codebook_size)
        self._modalities = check_modalities(where, modalities)
        self._sorted = tuple(sorted(self.modalities))  # the order of the state and of every sum
        sources = self.modalities if update_from is None else update_from
        if not (isinstance(sources, Collection) and sources and {*sources} <= {*self.modalities}):
            raise ValueError(
                message(
                    where,
                    "update_from must name one or more of the modalities",
                    hint="pass None to update from all",
                    update_from=update_from,
                    modalities=self.modalities,
                )
            )
        called = callable(commitment) and not isinstance(commitment, type)
        if not (called or commitment in ("default", None)):
            rule = "commitment must be a callable (features, codes, masks) -> loss, or None"
            hint = "pass CrossModalCommitmentLoss(...)"
            raise TypeError(message(where, rule, hint=hint, commitment=commitment))
        self.partner, self.partner_weight = partner, partner_weight
        self.partner_temperature = partner_temperature
        self.gradient, self.update = gradient, update
        self.commitment = CrossModalCommitmentLoss() if commitment == "default" else commitment
        loss = self.commitment
        ratio = loss.cross_ratio if isinstance(loss, CrossModalCommitmentLoss) else 0
        if isinstance(ratio, Mapping) and not {*chain(*ratio)} <= {*self.modalities}:
            rule = "cross_ratio must pair the quantizer's modalities"
            hint, came = "name only these; a pair that is left out is 0", self.modalities
            raise ValueError(message(where, rule, hint=hint, cross_ratio=ratio, modalities=came))
        self.ema_codebook = EMACodebook(
            dim,
            codebook_size,
            decay=decay,
            eps=eps,
            groups=len(self._sorted),
            update_from=[self._sorted.index(name) for name in sources],
            reset_after=reset_after,
            reset_rule=reset_rule,
            init=init,
            process_group=process_group,
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """The names, as given."""
        return self._modalities

    @property
    def update_from(self) -> tuple[str, ...] | None:
        """The modalities whose vectors enter N and o, sorted; None: all."""
        groups = self.ema_codebook.update_from
        return None if groups is None else tuple(self._sorted[group] for group in groups)

    def forward(
        self,
        features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        freeze: bool = False,
    ) -> QuantizerOutput:
        """Quantize a batch; in training mode, also move the codebook.

        Args:
            features: name -> `[B, T, D]` (or `[B, D]`, which is T = 1), any float dtype (they may
                differ; the codebook computes in the widest), for any non-empty subset of the
                modalities. T may differ, unless the partner is `"aligned"` or the commitment has
                a cross term.
            masks: name -> bool `[B, T]`, True = valid. What lies under a False is never read.
            freeze: leave the codebook as it is.

        Returns:
            `QuantizerOutput(quantized, indices, loss)`. A vector that is not finite gets index 0,
            and shows: as NaN in `quantized`, as NaN or infinity in the loss.

        Raises:
            ValueError: shapes or names that do not fit.
            TypeError: features that are not floating point.
            RuntimeError: `update="manual"` under DataParallel, whose replicas lose what they count.
        """
        where = "MultiModalEMAQuantizer"
        book = self.ema_codebook
        names, device = self.modalities, book.codes.device
        z, valid = check_features(
            where, features, masks, dim=book.dim, modalities=names, device=device
        )
        check_finite(where, z, valid)
        if self.partner == "aligned":
            check_same_length(where, z, '; or build it with partner="attention"')
        updating = self.training and not freeze and not recomputing()
        if updating and self.update == "manual" and getattr(self, "_is_replica", False):
            rule = 'update="manual" cannot work in a replica of DataParallel'
            hint = "its statistics are lost with the replica: use DistributedDataParallel"
            raise RuntimeError(message(where, rule, hint=hint, update=self.update))

        z = without_padding(z, valid)
        with torch.autocast(device.type, enabled=False):  # its `cat` does not take every dtype
            rows, shapes = pack([*z.values()], "* d")  # [N, D], of all modalities
        weight, first = book.weight, None
        if updating:
            values, groups, usable = self._contributions(rows, z, valid)  # Sec. 4.3
            first = book.first_codes(values, groups, usable)
            weight = book.weight if first is None else first.codes
        index = book.nearest(rows, weight)  # Eq. 2
        chosen = dict(zip(z, unpack(index, shapes, "*"), strict=True))
        # the codes as they were when the step began
        codes = dict(zip(z, unpack(weight.index_select(0, index), shapes, "* d"), strict=True))
        loss = weight.new_zeros(())
        if self.commitment is not None:
            loss = check_loss(where, self.commitment(z, codes, valid))  # Eq. 8
        if first is not None:  # nothing is written before the loss: a commitment may raise
            book.take_first_codes(first)
        if updating:
            book.add_rows(values, torch.where(usable, index, -1), groups)  # Eq. 7, brackets
            if self.update == "auto":
                book.apply()  # Eq. 7

        gradient = _GRADIENTS[self.gradient]
        quantized: dict[str, Tensor] = {}
        indices: dict[str, Tensor] = {}
        for name, x in z.items():
            q, i = gradient(x, codes[name].to(x.dtype)), chosen[name]
            if valid is not None:
                q = torch.where(valid[name][..., None], q, 0)
                i = torch.where(valid[name], i, -1)
            shape = features[name].shape
            quantized[name], indices[name] = q.view(shape), i.view(shape[:-1])
        return QuantizerOutput(quantized, indices, loss)

    @torch.no_grad()
    def _contributions(
        self, rows: Tensor, z: Tensors, valid: Tensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What each vector adds to o, the group of each, and which may enter."""
        book = self.ema_codebook
        book.match_dtype(rows.dtype)
        usable = functional.finite_rows(rows)
        shapes: list[Any] = [x.shape[:2] for x in z.values()]
        if valid is not None:
            usable = usable & pack([*valid.values()], "*")[0]
        masks = dict(zip(z, unpack(usable, shapes, "*"), strict=True))
        wide = dict(zip(z, unpack(rows.to(book.codes.dtype), shapes, "* d"), strict=True))
        mixed = mix_partners(
            wide, masks, self.partner, self.partner_weight, self.partner_temperature
        )
        groups = [
            torch.full_like(mask, self._sorted.index(name), dtype=torch.long)
            for name, mask in masks.items()
        ]
        values, _ = pack([*mixed.values()], "* d")
        if callable(self.partner):  # which may return anything
            usable = usable & functional.finite_rows(values)
        return values, pack(groups, "*")[0], usable

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest code (Eq. 2), of any modality: `[..., D]` -> int64 `[...]`.

        Raises:
            ValueError: the last dimension of x is not D, or x is on another device.
            TypeError: x is no floating point tensor.

        Warns:
            UserWarning: the codes are to come from data, and none has come (seen on a CPU).
        """
        check_vectors("MultiModalEMAQuantizer.encode", x, self.ema_codebook.codes)
        book = self.ema_codebook
        if is_cpu_readable(book.initialized) and not book.ready:
            rule = "the codebook has seen no data yet, and its codes mean nothing"
            hint = "train it, load a state, or start from codes of your own with set_codes"
            text = message("MultiModalEMAQuantizer.encode", rule, hint=hint, init=self.init)
            warnings.warn(text, stacklevel=2)
        return book.nearest(x.reshape(-1, book.dim)).view(x.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        """The codes of indices: any integer dtype, `[...]` -> `[..., D]`; zeros for -1 (masked).

        Raises:
            TypeError: indices that are no integer tensor.
            IndexError: an index of L or more (on a GPU, a device assertion).
        """
        book, where = self.ema_codebook, "MultiModalEMAQuantizer.decode"
        encoded = "pass what encode returned, of one modality"
        check_integers(where, encoded, indices=indices)
        indices = indices.long()
        check_indices(where, book.codebook_size, encoded, indices=indices)
        codes = book.weight[indices.clamp(min=0)]
        return torch.where((indices < 0)[..., None], 0, codes)

    @property
    def codebook(self) -> Tensor:
        """A copy of the codes, `[L, D]`: what was read stays as it was when the codebook moves."""
        return self.ema_codebook.weight.clone()

    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Start from given codes `[L, D]`; see `EMACodebook.set_codes`."""
        self.ema_codebook.set_codes(codes, counts)

    def extended(
        self, *, modalities: Sequence[str] | None = None, codebook_size: int | None = None
    ) -> Self:
        """A new quantizer with more modalities or more codes, which goes on from this one.

        The old codes and all that is counted of them are the same bits. A new modality was never
        seen. A new code begins beside one of the most used, so that the two share what was chosen
        by one; N = 1. This quantizer stays as it is. Statistics that wait for `update_codebook` are
        not taken along; parts with parameters (a partner, a commitment, those of a subclass) are
        copied.

        Args:
            modalities: all names, the old ones among them; None: the same.
            codebook_size: the new L, at least the old; None: the same.

        Raises:
            ValueError: a modality is missing, or the size is smaller.

        Examples:
            >>> quantizer = MultiModalEMAQuantizer(8, 16, ("audio", "video"))
            >>> wider = quantizer.extended(modalities=("audio", "video", "text"), codebook_size=24)
            >>> wider.codebook.shape
            torch.Size([24, 8])
        """
        return extend(self, modalities, codebook_size)

    @property
    def codebook_size(self) -> int:
        """The number of codes: L."""
        return self.ema_codebook.codebook_size

    @property
    def dim(self) -> int:
        """The width of features and codes: D."""
        return self.ema_codebook.dim

    @property
    def out_dim(self) -> int:
        """Width of `quantized`: D."""
        return self.ema_codebook.dim

    def usage(self, *, reset: bool = False) -> functional.CodeUsage:
        """Who used which code since the last reset of the counts, over all ranks.

        Counts are kept in training only, of valid, finite vectors.

        Args:
            reset: start counting anew afterwards.

        Returns:
            `CodeUsage(counts, perplexity, shared, dead)`, see `mmvq.functional.code_usage`.
        """
        counts = dict(zip(self._sorted, self.ema_codebook.usage.clone(), strict=True))
        if reset:
            self.ema_codebook.reset_usage()
        return functional.code_usage({name: counts[name] for name in self.modalities})

    def update_codebook(self) -> None:
        """With `update="manual"`: one step of Eq. 7 with all that was accumulated."""
        self.ema_codebook.apply()

    def _argument(self, name: str) -> Any:
        if name == "commitment" and type(self.commitment) is CrossModalCommitmentLoss:
            return self.commitment._json()
        return getattr(self, name)

    @classmethod
    def _build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        match config:
            case {"arguments": {"commitment": dict(loss)}} if "commitment" not in given:
                given = {**given, "commitment": CrossModalCommitmentLoss._from_json(loss)}
        match config, given:
            case {"arguments": {"modalities": list(saved)}}, {"modalities": names}:
                if sorted(saved) != sorted(names):
                    rule = "modalities must be those that were saved, in any order"
                    hint = (
                        "load without modalities, then add new ones with extended(modalities=...)"
                    )
                    where = f"{cls.__name__}.from_pretrained"
                    raise ValueError(message(where, rule, hint=hint, saved=saved, got=names))
        return super()._build(config, given)

    def extra_repr(self) -> str:
        """The settings."""
        return (
            f"modalities={self.modalities}, partner={self.partner!r}, "
            f"partner_weight={self.partner_weight}, gradient={self.gradient!r}, "
            f"update={self.update!r}"
        )
