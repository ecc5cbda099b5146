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
    contributions,
)
from mmvq.pretrained import Pretrained
from mmvq.settings import Setting
from mmvq_kernels.commitment import quantize
from mmvq_kernels.nearest import take
from mmvq_kernels.operators import fused

Commitment = Callable[[Tensors, Tensors, Tensors | None], Tensor]

_GRADIENTS = {"straight_through": functional.straight_through, "rotation": functional.rotate}


class QuantizerOutput(NamedTuple):
    """Result of a quantizer.

    Attributes:
        quantized: codes with the gradient passed through, name -> same shape and dtype as the
            features; 0 where masked.
        indices: code indices, name -> int64 `[B, T]` (`[B]` for features `[B, D]`); -1 if masked.
        loss: commitment loss, a scalar.
    """

    quantized: dict[str, Tensor]
    indices: dict[str, Tensor]
    loss: Tensor


class MultiModalEMAQuantizer(Pretrained):
    r"""A shared codebook of several modalities, updated by a multi-modal moving average.

    $$\hat z^a = e_l, \quad l = \mathrm{argmin}_j \lVert z^a - e_j \rVert_2 \quad \text{(Eq. 2)}$$

    $$N_i \leftarrow \gamma N_i + (1 - \gamma) \sum_m n^m_i, \quad
      o_i \leftarrow \gamma o_i + (1 - \gamma) \sum_m \sum_{j=1}^{n^m_i}
        \big( (1 - w) z^m_{ij} + w r^m_{ij} \big), \quad e_i = o_i / \tilde N_i
      \quad \text{(Eq. 7)}$$

    All modalities search the codebook as it was when `forward` began. One joint step then updates
    it. The partner r is the attention-weighted (or aligned) mean of the other modalities' vectors
    at that position. State and statistics are float32 (float64 after training on float64 features),
    whatever the module is cast to. Vectors that are not finite, or too large to square (elements
    beyond 1e15; 8e149 in float64), never enter the state. A code that no vector of a step chose
    keeps its e. In eval mode nothing is written.

    All arguments from `decay` to `process_group`, except `assignment`, `update_from` and
    `commitment`, may be read and set at any time; those of the codebook in either place. Rows of
    its `ages` and `usage` are in the sorted order of the names; with `assignment="mixed"`, rows of
    the mixtures follow.

    With several ranks, the codebook is that of one process on the clips of all ranks, up to
    floating-point error. It is bit-identical on all ranks. A step takes one all-reduce of one flat
    buffer (the initial codes are gathered before). A rank's batch may be empty, masked, not finite
    or of other modalities. All ranks must take the same steps, in the same mode and dtype, from the
    same state (`DistributedDataParallel` broadcasts that of rank 0; otherwise use the same seed).
    An error on one rank ends that rank, and the others with torch's error for a lost peer. The
    state is never sharded nor averaged over ranks. It is safe under `fully_shard`, and under
    `DistributedDataParallel` (where `forward_sync_buffers=False` saves a needless broadcast).

    Args:
        dim: feature dimension D.
        codebook_size: number of codes L.
        modalities: names of the modalities; their order never changes a result.
        decay: decay gamma of the moving average, in [0, 1].
        eps: constant of the Laplace smoothing of N, which is used in the division only.
        partner: `"attention"` (`functional.cross_attend`), `"aligned"` (the other modalities at the
            same segment, as in the released code), `"none"` (r = z, ordinary EMA), or a callable
            `(z_a, others, masks) -> r` of tensors `[B, T, D]` and bool masks `[B, T]`, which is
            called if there are others.
        partner_weight: weight w of the partner. Without a partner, r = z. With M aligned
            modalities, 1 - 1/M weighs all of them equally.
        partner_temperature: divisor of the dot products of `partner="attention"`; the paper has
            `dim ** 0.5`. None: the scores are sqrt(D) times the cosine, which does not depend on
            the scale of the features.
        assignment: code whose N and o a mixture $(1 - w) z + w r$ enters: `"own"`, the code that
            quantizes z (Eq. 7); `"mixed"`, the nearest code of the mixture. If modalities lie
            apart, `"own"` can keep a code of each around the same mixtures; `"mixed"` makes the
            codes cluster centres of the mixtures, which modalities then share.
        update_from: names of the modalities whose vectors enter N and o and count for the reset of
            dead codes (None: all). Every modality is quantized.
        reset_after: number of training batches after which an unchosen code is reset; None: never.
        reset_rule: `"all"`: a code survives only if every modality chose it within `reset_after`
            batches (the paper); `"any"`: it survives if any did (the released code). For each
            modality only the batches that contain it count. Modalities not yet seen are ignored.
            With `assignment="mixed"` the choices are those of the mixtures.
        init: `"kmeans"` or `"samples"` of those vectors of the first training batch that enter o,
            or `"uniform"` in (-1/L, 1/L) with N = 0. For given codes, see `set_codes`.
        commitment: loss function (features, codes, masks) -> scalar; `"default"`:
            `CrossModalCommitmentLoss()`; None: the loss is 0.
        gradient: `"straight_through"`, or `"rotation"` (Fifty et al. 2024).
        update: `"auto"` updates the codebook at the end of each training forward; `"manual"`
            accumulates until `update_codebook()`, which is called after `backward`. It serves
            gradient accumulation (k micro-batches equal one batch) and activation checkpointing
            (the repeated forward pass finds the same codes).
        process_group: ranks that share the codebook; None is the default group.

    Raises:
        ValueError: an argument is out of range.
        TypeError: the commitment is not callable.

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
            """As `forward`; `nn.Module` does not type calls."""
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
        assignment: Literal["own", "mixed"] = "own",
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
        check_choice(where, ("own", "mixed"), assignment=assignment)
        self._assignment = assignment
        self._modalities = check_modalities(where, modalities)
        self._sorted = tuple(sorted(self.modalities))  # the order of the state and of every sum
        sources = self.modalities if update_from is None else update_from
        if not (isinstance(sources, Collection) and sources and {*sources} <= {*self.modalities}):
            rule = "update_from must name one or more of the modalities"
            hint = "pass None to update from all modalities"
            raise ValueError(
                message(where, rule, hint=hint, update_from=update_from, modalities=self.modalities)
            )
        self._update_from = None if update_from is None else tuple(sorted({*sources}))
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
            hint = "name only these modalities; a missing pair has ratio 0"
            got = {"cross_ratio": ratio, "modalities": self.modalities}
            raise ValueError(message(where, rule, hint=hint, **got))
        M, chosen = len(self._sorted), [*map(self._sorted.index, sources)]
        if assignment == "mixed":  # the mixtures of each modality are groups of their own
            chosen = [M + group for group in chosen]
        self.ema_codebook = EMACodebook(
            dim,
            codebook_size,
            decay=decay,
            eps=eps,
            groups=M if assignment == "own" else 2 * M,
            update_from=None if update_from is None and assignment == "own" else chosen,
            reset_after=reset_after,
            reset_rule=reset_rule,
            init=init,
            process_group=process_group,
        )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, in the given order."""
        return self._modalities

    @property
    def update_from(self) -> tuple[str, ...] | None:
        """Names of the modalities whose vectors enter N and o, sorted; None: all."""
        return self._update_from

    @property
    def assignment(self) -> Literal["own", "mixed"]:
        """Code whose N and o a mixture enters: of its vector, or its own nearest."""
        return self._assignment

    def forward(
        self,
        features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        freeze: bool = False,
    ) -> QuantizerOutput:
        """Quantize a batch. In training mode, also update the codebook.

        Args:
            features: features, name -> `[B, T, D]` (or `[B, D]`, which is T = 1), for any non-empty
                subset of the modalities. They may be of any float dtypes; the codebook computes in
                the widest. T may differ between modalities, unless the partner is `"aligned"` or
                the commitment has a cross term.
            masks: padding masks, name -> bool `[B, T]`, True = valid. Masked values are never read.
            freeze: whether to leave the codebook unchanged.

        Returns:
            `QuantizerOutput(quantized, indices, loss)`. A vector that is not finite has index 0. It
            is NaN in `quantized`, and makes the loss NaN or infinite.

        Raises:
            ValueError: shapes or names do not match.
            TypeError: features are not floating point.
            RuntimeError: `update="manual"` under DataParallel, whose replicas lose statistics.
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

        fuses = self._fuses(z)
        mask = None if valid is None else pack([*valid.values()], "*")[0]
        z = z if fuses else without_padding(z, valid)
        with torch.autocast(device.type, enabled=False):  # its `cat` rejects some dtypes
            rows, _ = pack([x.detach() for x in z.values()], "* d")  # [N, D], of all modalities
        weight, first = book.weight, None
        if updating:
            values, owners, sources = self._contributions(rows, z, mask)  # Sec. 4.3
            first = book.first_codes(values, sources)
            weight = book.weight if first is None else first.codes
        # nearest codes (Eq. 2), the loss (Eq. 8), and codes that pass the gradient
        run = self._quantize_fused if fuses else self._quantize
        index, loss, quantized = run(rows, z, valid, mask, weight)
        if first is not None:  # written after the loss, as a commitment may raise
            book.take_first_codes(first)
        if updating:
            at, groups = index, owners
            if self.assignment == "mixed":  # vectors are counted, mixtures counted and summed
                at = torch.cat([index, book.nearest(values, weight)])
                values, groups = values.repeat(2, 1), torch.cat([owners, sources])
            book.add_rows(values, at, groups)  # the sums of Eq. 7
            if self.update == "auto":
                book.apply()  # Eq. 7
        indices = unpack(index, [x.shape[:2] for x in z.values()], "*")
        shapes = [features[name].shape for name in z]
        return QuantizerOutput(
            {m: q.view(s) for m, q, s in zip(z, quantized, shapes, strict=True)},
            {m: i.view(s[:-1]) for m, i, s in zip(z, indices, shapes, strict=True)},
            loss,
        )

    def _quantize(
        self,
        rows: Tensor,
        z: Tensors,
        valid: Tensors | None,
        mask: Tensor | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Indices of all vectors, -1 where masked; the loss; codes of each modality."""
        index = self.ema_codebook.nearest(rows, weight)
        # codes from before the update
        chosen = take(weight, index) if self.training else weight.index_select(0, index)
        parts = unpack(chosen, [x.shape[:2] for x in z.values()], "* d")
        codes = dict(zip(z, parts, strict=True))
        loss = weight.new_zeros(())
        if self.commitment is not None:
            loss = check_loss("MultiModalEMAQuantizer", self.commitment(z, codes, valid))
        gradient = _GRADIENTS[self.gradient]
        quantized = [gradient(x, codes[name].to(x.dtype)) for name, x in z.items()]
        if valid is None or mask is None:
            return index, loss, quantized
        pairs = zip(valid.values(), quantized, strict=True)
        quantized = [torch.where(some[..., None], q, 0) for some, q in pairs]
        return torch.where(mask, index, -1), loss, quantized

    def _quantize_fused(
        self,
        rows: Tensor,
        z: Tensors,
        valid: Tensors | None,
        mask: Tensor | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`_quantize` in one operation, which reads no masked vector."""
        loss: Any = self.commitment
        terms = 0.0, 0.0, False
        if loss is not None:
            terms = loss.beta, loss.beta * loss.cross_ratio, loss.reduction == "mean"
        rotates = self.gradient == "rotation"
        features = [*z.values()]
        quantized, index, total = quantize(features, rows, weight, mask, *terms, rotates)
        if loss is None:
            total = weight.new_zeros(())
        parts = zip(quantized, features, strict=True)
        return index, total, [q.to(x.dtype) for q, x in parts]

    def _fuses(self, z: Tensors) -> bool:
        """Whether `_quantize_fused` can take this loss and these features: on a GPU only.

        A graph for inference holds torch calls, which any runtime knows.
        """
        x, *others = z.values()
        alike = all(other.shape == x.shape for other in others)
        training = self.training or not torch.compiler.is_compiling()
        fused_loss = self.commitment is None or _is_plain(self.commitment)
        return alike and training and fused_loss and fused(*z.values(), self.ema_codebook.codes)

    @torch.no_grad()
    def _contributions(
        self, rows: Tensor, z: Tensors, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the vectors add to o, their groups, and those of the mixtures; -1: may not enter."""
        book = self.ema_codebook
        book.match_dtype(rows.dtype)
        shapes = {name: x.shape for name, x in z.items()}
        groups = [self._sorted.index(name) for name in z]
        settings = self.partner, self.partner_weight, self.partner_temperature
        values, owners = contributions(rows, shapes, mask, groups, book.codes.dtype, *settings)
        if self.assignment == "own":
            return values, owners, owners
        return values, owners, torch.where(owners < 0, -1, owners + len(self._sorted))

    def encode(self, x: Tensor) -> Tensor:
        """Index of the nearest code (Eq. 2), for any modality: `[..., D]` -> int64 `[...]`.

        Raises:
            ValueError: the last dimension of x is not D, or x is on another device.
            TypeError: x is not a floating point tensor.

        Warns:
            UserWarning: the codes have not been initialised from data (checked on a CPU only).
        """
        check_vectors("MultiModalEMAQuantizer.encode", x, self.ema_codebook.codes)
        book = self.ema_codebook
        if is_cpu_readable(book.initialized) and not book.ready:
            rule = "the codebook has seen no data yet, so that its codes are arbitrary"
            hint = "train it, load a state, or start from given codes with set_codes"
            text = message("MultiModalEMAQuantizer.encode", rule, hint=hint, init=self.init)
            warnings.warn(text, stacklevel=2)
        return book.nearest(x.reshape(-1, book.dim)).view(x.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of indices of any integer dtype: `[...]` -> `[..., D]`; zeros for -1 (masked).

        Raises:
            TypeError: indices are not an integer tensor.
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
        """A copy of the codes, `[L, D]`, which later updates do not change."""
        return self.ema_codebook.weight.clone()

    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        """Start from given codes `[L, D]`; see `EMACodebook.set_codes`."""
        self.ema_codebook.set_codes(codes, counts)

    def extended(
        self, *, modalities: Sequence[str] | None = None, codebook_size: int | None = None
    ) -> Self:
        """Build a quantizer with more modalities or more codes, which continues from this one.

        The old codes and their statistics are bit-identical. New modalities count as not yet seen.
        A new code starts with N = 1 close to one of the most used codes, and the two share its
        vectors. This quantizer is unchanged. Parts with parameters (a partner, a commitment, those
        of a subclass) are copied. Statistics that wait for `update_codebook` are not.

        Args:
            modalities: names of all modalities, including the old ones; None: the same.
            codebook_size: new number of codes L, at least the old; None: the same.

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
        """Number of codes L."""
        return self.ema_codebook.codebook_size

    @property
    def dim(self) -> int:
        """Feature dimension D, also of the codes."""
        return self.ema_codebook.dim

    @property
    def out_dim(self) -> int:
        """Dimension of `quantized`: D."""
        return self.ema_codebook.dim

    def usage(self, *, reset: bool = False) -> functional.CodeUsage:
        """Usage of the codes by modality since the last reset of the counts, over all ranks.

        Only valid, finite vectors are counted, in training only.

        Args:
            reset: whether to set the counts to 0 afterwards.

        Returns:
            `CodeUsage(counts, perplexity, shared, dead)`, see `mmvq.functional.code_usage`.
        """
        own = self.ema_codebook.usage[: len(self._sorted)].clone()
        counts = dict(zip(self._sorted, own, strict=True))
        if reset:
            self.ema_codebook.reset_usage()
        return functional.code_usage({name: counts[name] for name in self.modalities})

    def update_codebook(self) -> None:
        """Apply the accumulated statistics of `update="manual"`: one step of Eq. 7."""
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
            f"partner_weight={self.partner_weight}, assignment={self.assignment!r}, "
            f"gradient={self.gradient!r}, update={self.update!r}"
        )


def _is_plain(loss: Any) -> bool:
    """Whether a loss is the library's own, with one ratio for all pairs, and without hooks."""
    if type(loss) is not CrossModalCommitmentLoss or isinstance(loss.cross_ratio, Mapping):
        return False
    hooks = (
        loss._forward_hooks,
        loss._forward_pre_hooks,
        loss._backward_hooks,
        loss._backward_pre_hooks,
        torch.nn.modules.module._has_any_global_hook(),
    )
    return not (any(hooks) or "forward" in loss.__dict__ or "terms" in loss.__dict__)
