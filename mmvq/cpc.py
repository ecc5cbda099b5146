"""Cross-CPC: each modality predicts the future of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_features,
    check_finite,
    check_int,
    check_modalities,
    check_not_negative,
    check_positive,
    check_same_length,
    message,
    without_padding,
)
from mmvq.distributed import OverRanks, exchange, gather_batch_sizes
from mmvq.pretrained import Pretrained
from mmvq.settings import Setting

_MOST_LAYERS = 1000  # of a saved module


class CPCOutput(NamedTuple):
    """Result of `CrossCPC`.

    Attributes:
        loss: scalar in nats.
        accuracy: how often the true future scores highest, (source, target) -> scalar in [0, 1].
    """

    loss: Tensor
    accuracy: dict[tuple[str, str], Tensor]


class Predictors(nn.ParameterDict):
    """Predictors W_k of each modality, `[K, D, C]`.

    This is a separate module, because transformers initialises only modules that have parameters of
    their own.
    """

    _names: tuple[str, ...]

    def __init__(self, names: tuple[str, ...], num_steps: int, dim: int, context_dim: int) -> None:
        super().__init__({name: torch.empty(num_steps, dim, context_dim) for name in names})
        self._names = names  # a ParameterDict sorts its names
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each W_k from U(-1, 1) / sqrt(C)."""
        for name in self._names:
            bound = self[name].shape[-1] ** -0.5
            nn.init.uniform_(self[name], -bound, bound)


class CrossCPC(OverRanks, Pretrained):
    r"""Cross-modal contrastive predictive coding (Eq. 6).

    $$L^{a2b} = -\frac{1}{K} \sum_{k=1}^K \ln \frac{\exp(z^b_{t+k} W^a_k c^a_t)}
      {\sum_{z_j \in Z_b} \exp(z_j W^a_k c^a_t)}, \qquad c^a_t = \mathrm{LSTM}^a(z^a_{\le t})$$

    The loss is averaged over clips, starts and ordered pairs (a, b). The negatives in Z_b are the
    other clips of the batch at the same segment.

    Args:
        dim: feature dimension D.
        modalities: names of the modalities; each has one LSTM and W_k for all targets.
        context_dim: dimension C of the contexts c; None: D.
        num_layers: number of layers of each LSTM.
        num_steps: number of predicted segments K.
        first_step: offset of the first: 1 is the next segment (the paper), 0 the last observed one.
        min_context: minimum number of observed segments.
        self_weight: weight of the mean over a = b, which is added to the mean over a != b.
        normalize_over: `"targets"`: each context identifies its future (Eq. 6); `"contexts"`: each
            future identifies its context (the released code); `"both"`: the mean of the two.
        temperature: divisor of the scores; 1 in the paper.
        normalize: whether to score by the cosine instead of the dot product.
        gather: whether clips of all ranks are candidates. Every rank then has the loss and accuracy
            of one process on the whole batch, and also its gradient once gradients are averaged
            over ranks (as DDP and FSDP do; see `mmvq.distributed.Ranks`). All ranks must have the
            same modalities and T. The batch size may differ, down to 0.
        process_group: ranks to gather from; None is the default group.

    Raises:
        ValueError: an argument is out of range.

    Source: van den Oord et al. 2018; Sec. 4.2, Eq. 6. The released code normalises over contexts,
    reports the accuracy of the other axis, sums over directions and adds self-prediction at 0.1.

    Examples:
        >>> cpc = CrossCPC(16, ("audio", "video"))
        >>> z = {"audio": torch.randn(8, 10, 16), "video": torch.randn(8, 10, 16)}
        >>> loss, accuracy = cpc(z, start="all")
        >>> sorted(accuracy)
        [('audio', 'video'), ('video', 'audio')]
    """

    modalities: tuple[str, ...]
    dim: int
    context_dim: int
    num_layers: int
    num_steps: int
    first_step: int
    self_weight: Setting[float] = Setting(check_not_negative)
    temperature: Setting[float] = Setting(check_positive)
    normalize: bool
    gather: bool
    process_group: dist.ProcessGroup | None
    contexts: nn.ModuleDict
    predictors: Predictors

    if TYPE_CHECKING:

        def __call__(
            self,
            features: Mapping[str, Tensor],
            masks: Mapping[str, Tensor] | None = None,
            *,
            start: int | Literal["all"] | None = None,
            generator: torch.Generator | None = None,
        ) -> CPCOutput:
            """As `forward`; `nn.Module` does not type calls."""
            ...

    def __init__(
        self,
        dim: int,
        modalities: Sequence[str] = ("audio", "video"),
        *,
        context_dim: int | None = None,
        num_layers: int = 1,
        num_steps: int = 1,
        first_step: int = 1,
        min_context: int = 1,
        self_weight: float = 0.0,
        normalize_over: Literal["targets", "contexts", "both"] = "targets",
        temperature: float = 1.0,
        normalize: bool = False,
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        check_int(
            "CrossCPC",
            1,
            dim=dim,
            context_dim=context_dim,
            num_layers=num_layers,
            num_steps=num_steps,
            min_context=min_context,
        )
        check_int("CrossCPC", 0, first_step=first_step)
        check_choice("CrossCPC", ("targets", "contexts", "both"), normalize_over=normalize_over)
        self.modalities = check_modalities("CrossCPC", modalities)
        self.dim, self.context_dim, self.num_layers = dim, context_dim, num_layers
        self.min_context = min_context
        self.num_steps, self.first_step = num_steps, first_step
        self.self_weight, self.normalize_over = self_weight, normalize_over
        self.temperature, self.normalize = temperature, normalize
        self.gather, self.process_group = gather, process_group
        self.contexts = nn.ModuleDict(
            {
                name: nn.LSTM(dim, context_dim, num_layers, batch_first=True)
                for name in self.modalities
            }
        )
        self.predictors = Predictors(self.modalities, num_steps, dim, context_dim)

    @classmethod
    def _build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        match config:  # each layer is an object, whatever its size
            case {"arguments": {"num_layers": int(layers)}} if layers > _MOST_LAYERS:
                rule = f"num_layers of a saved module must be at most {_MOST_LAYERS}"
                where, hint = f"{cls.__name__}.from_pretrained", "download config.json again"
                raise ValueError(message(where, rule, hint=hint, num_layers=layers))
        return super()._build(config, given)

    def forward(
        self,
        features: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        start: int | Literal["all"] | None = None,
        generator: torch.Generator | None = None,
    ) -> CPCOutput:
        """Compute the loss of a batch.

        Args:
            features: features z before quantization, name -> `[B, T, D]`, with the same T, in any
                float dtype (computed in that of the parameters). Modalities may be missing.
            masks: padding masks, name -> bool `[B, T]`, True = valid. A prediction counts if the
                last observed segment and the predicted one are valid.
            start: number of observed segments t, in [min_context, T - K] (for `first_step` 1);
                `"all"`: every such t; None: a random t, as in the paper. With `gather`, all ranks
                use that of rank 0.
            generator: random generator for `start`; None: the default CPU generator.

        Under `torch.compile`, set `torch._dynamo.config.allow_rnn = True` for the LSTMs, and pass
        `start`. A graph is valid for any B, but for one T only, as it unrolls the LSTM.

        Returns:
            `CPCOutput(loss, accuracy)`; the loss is 0 if there is nothing to predict, and ln B if
            all futures are equal.

        Raises:
            ValueError: shapes, names or start do not match; with `gather`, names or T differ
                between ranks (raised on all ranks).
            TypeError: features are not floating point.
        """
        z, valid = check_features(
            "CrossCPC", features, masks, dim=self.dim, modalities=self.modalities
        )
        check_same_length("CrossCPC", z)
        check_finite("CrossCPC", z, valid)
        z = {m: x.to(self.predictors[m].dtype) for m, x in without_padding(z, valid).items()}
        x = next(iter(z.values()))
        K, T, device = self.num_steps, x.shape[1], x.device
        group, batch = self.process_group, functional.WHOLE
        if self.gather:
            batch = gather_batch_sizes("CrossCPC", x, group, names=z, T=T)
        first, last = self._starts(T, start, generator)
        if self.gather:
            first, last = exchange((first, last), device, group)[0]

        seen = torch.arange(first - 1, last, device=device)  # [S], the last observed segments
        ahead = seen + self.first_step + torch.arange(K, device=device)[:, None]  # [K, S]
        prediction = {m: self._predict(m, x, first, last) for m, x in z.items()}  # [K, S, B, D]
        future = {m: rearrange(x[:, ahead], "b k s d -> k s b d") for m, x in z.items()}

        across = [(a, b) for a in z for b in z if a != b]
        pairs = across + [(m, m) for m in z if self.self_weight]
        if not pairs:
            (alone,) = prediction.values()
            return CPCOutput(alone.sum() * 0, {})
        with torch.autocast(device.type, enabled=False):  # its `stack` rejects some dtypes
            query = torch.stack([prediction[a] for a, _ in pairs])  # [P, K, S, B, D]
            key = torch.stack([future[b] for _, b in pairs])
        mask = torch.ones(query.shape[:-1], dtype=torch.bool, device=device)  # [P, K, S, B]
        if valid is not None:
            observed = {m: rearrange(mask[:, seen], "b s -> s b") for m, mask in valid.items()}
            arrived = {m: rearrange(mask[:, ahead], "b k s -> k s b") for m, mask in valid.items()}
            mask = torch.stack([observed[a] & arrived[b] for a, b in pairs])
        if self.normalize_over == "contexts":
            query, key = key, query
        score: dict[str, Any] = {
            "mask": mask,
            "temperature": self.temperature,
            "normalize": self.normalize,
            "batch": batch,
        }
        symmetric = self.normalize_over == "both"
        nce = functional.info_nce(query, key, symmetric=symmetric, reduction="none", **score)
        summed, count = batch.sum(_sum(nce, mask), _sum(mask, mask))  # [P]
        losses, some, n = summed / count.clamp(min=1), count > 0, len(across)
        loss = _mean(losses[:n], some[:n]) + self.self_weight * _mean(losses[n:], some[n:])
        with torch.no_grad():
            (summed,) = batch.sum(_sum(functional.top1_hits(query, key, **score), mask).to(losses))
            accuracy = dict(zip(pairs, summed / count.clamp(min=1), strict=True))
        return CPCOutput(loss, accuracy)

    def extra_repr(self) -> str:
        """The settings."""
        names = "num_steps first_step min_context self_weight normalize_over temperature normalize"
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())
        return f"dim={self.dim}, modalities={self.modalities}, {settings}, gather={self.gather}"

    def _predict(self, name: str, x: Tensor, first: int, last: int) -> Tensor:
        """Predictions W_k c_t of a modality for each step, start and clip: `[K, S, B, D]`."""
        with torch.autocast(x.device.type, enabled=False):  # many CPUs have no such LSTM
            context = self.contexts[name](x[:, :last])[0][:, first - 1 :]  # [B, S, C]
            return torch.einsum("kdc,bsc->ksbd", self.predictors[name], context)

    def _starts(
        self, T: int, start: int | Literal["all"] | None, generator: torch.Generator | None
    ) -> tuple[int, int]:
        first, last = self.min_context, T - self.num_steps - self.first_step + 1
        if first > last:
            rule = "T must be at least min_context + first_step + num_steps - 1"
            hint = "pass longer clips, or predict fewer steps ahead"
            raise ValueError(
                message(
                    "CrossCPC",
                    rule,
                    hint=hint,
                    T=T,
                    min_context=self.min_context,
                    first_step=self.first_step,
                    num_steps=self.num_steps,
                )
            )
        if start == "all":
            return first, last
        if start is None:
            device = "cpu" if generator is None else generator.device
            start = int(torch.randint(first, last + 1, (), generator=generator, device=device))
        if not isinstance(start, int) or not first <= start <= last:
            rule = f'start must be in [{first}, {last}], "all" or None'
            hint = "start is the number of observed segments"
            raise ValueError(message("CrossCPC", rule, hint=hint, start=start))
        return start, start


def _sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the valid entries of all dimensions except the first."""
    return (values * mask).flatten(1).sum(1)


def _mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the entries to keep; 0 if there are none."""
    return torch.where(keep, values, 0).sum() / keep.sum().clamp(min=1)
