"""Monitoring a codebook during training: figures at an interval, warnings of lasting faults."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import check_instance, check_int, message
from mmvq.club import CLUBEstimator
from mmvq.distributed import all_reduce_
from mmvq.quantizer import MultiModalEMAQuantizer, QuantizerOutput

PATIENCE = 300  # steps in a row after which a fault is warned of; at least 3 * reset_after
COLLAPSED = 0.05  # share of the reachable codes; a perplexity below it is a collapse
FEW = 4  # reachable codes, below which a collapse is not judged
SATURATED = 0.99  # share of the bound, above which a log-variance counts as saturated
MOST = 0.5  # share of saturated log-variances, above which CLUB is at fault


class HealthWarning(UserWarning):
    """Warning of `CodebookMonitor`: codebook collapse, or a saturated CLUB."""


class Writer(Protocol):
    """A logger such as TensorBoard's `SummaryWriter`."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Record one figure."""


class CodebookMonitor:
    """Monitors a quantizer during training and reports figures at an interval of steps.

    Forward hooks count the choices of each training forward pass on its device. Every `every`
    steps the counts are reduced over the ranks (one all-reduce) and read (one synchronisation).
    The figures of a reading cover the training forward passes since the last reading:

    - `perplexity/<modality>`: effective number of codes, 1 to L, as in `functional.code_usage`;
    - `codes/shared`, `codes/single`, `codes/dead`: shares of the codebook, which sum to 1: codes
      that two or more modalities use, other codes in use, and codes that none chose;
    - `agreement/<a>-<b>`: share of the positions (b, t) at which both modalities chose the same
      code (`functional.code_agreement`), over batches that have both with the same T;
    - `club/saturated`, or `club/saturated/<name>` for several estimators: share of CLUB's
      log-variances above 99% of their bound. Rows of zeros, which a mask leaves, do not count.

    A figure without data is NaN and is not logged. Two faults raise a `HealthWarning`, each once,
    if they last for 300 steps and for 3 `reset_after`. One is a modality whose perplexity is below
    1.5 or below 5% of the reachable codes (L, or its vectors per step if fewer). The other is a
    CLUB with more than half of its log-variances saturated.

    Create the monitor before `torch.compile`, and call `step` outside the compiled function. It
    reads `quantizer.usage(reset=True)`, so that `usage()` counts from the last reading.

    Args:
        quantizer: quantizer to monitor.
        log: callable (name, value, step) for each figure of a reading, or a TensorBoard
            `SummaryWriter`; in Lightning `lambda name, value, step: module.log(name, value)`. All
            ranks have the same figures, so that one rank is enough.
        every: number of steps between readings, the same on all ranks.
        club: `CLUBEstimator`, or a module that contains some; those without a bound are ignored.

    Attributes:
        steps: number of calls of `step`; set it when training resumes from a checkpoint.
        history: `"step"` and the name of each figure -> its values, for `figures.plot_usage`.
        usage: `CodeUsage` of the last reading, for `figures.plot_codes`; None before the first.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `every` is below 1.

    Examples:
        >>> quantizer = MultiModalEMAQuantizer(4, 8)
        >>> monitor = CodebookMonitor(quantizer, every=2)
        >>> for _ in range(4):
        ...     z = torch.randn(3, 5, 4)
        ...     output = quantizer({"audio": z, "video": z})
        ...     figures = monitor.step()
        >>> monitor.history["agreement/audio-video"]
        [1.0, 1.0]
        >>> monitor.close()
    """

    steps: int
    history: dict[str, list[float]]
    usage: functional.CodeUsage | None
    _unread: int  # steps since the last reading
    _lasting: dict[str, int]  # rule -> steps in a row at which it was broken
    quantizer: MultiModalEMAQuantizer
    every: int

    def __init__(
        self,
        quantizer: MultiModalEMAQuantizer,
        log: Callable[[str, float, int], object] | Writer | None = None,
        *,
        every: int = 100,
        club: nn.Module | None = None,
    ) -> None:
        where = "CodebookMonitor"
        check_int(where, 1, every=every)
        check_instance(where, MultiModalEMAQuantizer, quantizer=quantizer)
        self._log: Any = getattr(log, "add_scalar", log)
        if not (log is None or callable(self._log)):
            rule = "log must be a callable (name, value, step), a SummaryWriter, or None"
            raise TypeError(message(where, rule, hint="pass print to try it", log=log))
        clubs = [] if club is None else _clubs(club)
        if club is not None and not clubs:
            rule = "club must be or hold a CLUBEstimator"
            hint = "leave it out if there is none to watch"
            raise TypeError(message(where, rule, hint=hint, club=club))
        self.quantizer, self.every = quantizer, every
        self._agreement = _Agreement(quantizer.modalities)
        self._saturation: dict[str, _Saturation] = {}
        self._handles = [quantizer.register_forward_hook(self._agreement, with_kwargs=True)]
        for name, part in clubs:
            if part.logvar_bound is not None:
                hook = _Saturation(part.logvar_bound)
                self._saturation[f"club/saturated/{name}".rstrip("/")] = hook
                self._handles.append(part.p_logvar.register_forward_hook(hook))
        self.reset()

    def step(self) -> dict[str, float]:
        """Count a training step, after it. Returns the figures at the interval, {} otherwise."""
        self.steps += 1
        self._unread += 1
        return self.read() if self.steps % self.every == 0 else {}

    def read(self) -> dict[str, float]:
        """Read the figures now, on all ranks at once; {} if nothing was trained since the last."""
        usage = self.quantizer.usage(reset=True)
        figures = self._figures(usage)
        values = torch.stack([value.float() for value in figures.values()]).tolist()
        reading = dict(zip(figures, values, strict=True))
        window, self._unread = self._unread, 0
        rows = {name: reading.pop(f"rows/{name}") for name in self.quantizer.modalities}
        if all(map(math.isnan, reading.values())):
            return {}
        self.usage = usage
        for name, value in {"step": self.steps, **reading}.items():
            self.history.setdefault(name, []).append(value)
            if self._log is not None and name != "step" and math.isfinite(value):
                self._log(name, value, self.steps)
        if window:
            self._judge(reading, rows, window)
        return reading

    def reset(self) -> None:
        """Clear counts, steps, history and past warnings."""
        self.steps, self.history, self.usage = 0, {}, None
        self._unread, self._lasting = 0, {}
        self.quantizer.usage(reset=True)
        self._take_tallies()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _take_tallies(self) -> Tensor:
        """Return and clear the hits and trials of this rank, `[pairs + clubs, 2]`."""
        tallies = (self._agreement, *self._saturation.values())
        device = self.quantizer.ema_codebook.usage.device
        taken = torch.cat([tally.totals.to(device) for tally in tallies])  # a copy
        for tally in tallies:
            tally.totals.zero_()
        return taken

    def _figures(self, usage: functional.CodeUsage) -> dict[str, Tensor]:
        """Compute the figures on the device; `rows/<modality>` is the number of vectors."""
        tallies = self._take_tallies()
        all_reduce_(tallies, self.quantizer.ema_codebook.process_group)
        rows = {name: counts.sum() for name, counts in usage.counts.items()}
        trained = torch.stack(list(rows.values())).sum() > 0
        codes = {"shared": usage.shared, "single": usage.single, "dead": usage.dead}
        figures = {f"rows/{name}": n for name, n in rows.items()}
        for name, value in usage.perplexity.items():
            figures[f"perplexity/{name}"] = torch.where(rows[name] > 0, value, torch.nan)
        for kind, found in codes.items():
            figures[f"codes/{kind}"] = torch.where(trained, found.float().mean(), torch.nan)
        names = [f"agreement/{a}-{b}" for a, b in self._agreement.pairs]
        shares = tallies[:, 0] / tallies[:, 1]  # 0 / 0 is NaN
        return figures | dict(zip([*names, *self._saturation], shares, strict=True))

    def _judge(self, reading: dict[str, float], rows: dict[str, float], window: int) -> None:
        """Find the faults of a reading, and warn of those that last."""
        size = self.quantizer.codebook_size
        low: dict[str, float] = {}
        for name, vectors in rows.items():
            reach = min(size, vectors / window)
            perplexity = reading[f"perplexity/{name}"]
            if reach >= FEW and perplexity < max(1.5, COLLAPSED * reach):
                low[name] = round(perplexity, 2)
        self._warn(
            "the codebook collapses: nearly all vectors choose a few of its codes",
            "keep reset_after on; give features one scale with nn.LayerNorm before the quantizer; "
            "lower the learning rate, or the weight of the commitment loss early on",
            low,
            window,
            perplexity=low,
            codebook_size=size,
        )
        high = {name: round(reading[name], 2) for name in self._saturation if reading[name] > MOST}
        self._warn(
            "CLUB's log-variance lies at its bound, so that its estimate does not follow the data",
            "standardise y and leave out its constant features; otherwise raise logvar_bound, or "
            "lower the learning rate of CLUB",
            high,
            window,
            share_at_bound=high,
        )

    def _warn(
        self, rule: str, hint: str, fault: dict[str, float], window: int, **got: object
    ) -> None:
        before = self._lasting.get(rule, 0)
        patience = max(PATIENCE, 3 * (self.quantizer.ema_codebook.reset_after or 0))
        if before >= patience:  # warned already
            return
        self._lasting[rule] = before + window if fault else 0
        if self._lasting[rule] >= patience:
            text = message("CodebookMonitor", rule, hint=hint, **got)
            warnings.warn(text, HealthWarning, stacklevel=5)


class _Tally:
    """A forward hook that sums hits and trials, int64 `[rows, 2]`, on the device.

    It holds nothing else, so that its module can still be copied and pickled.
    """

    def __init__(self, rows: int) -> None:
        self.totals = torch.zeros(rows, 2, dtype=torch.long)

    def add(self, row: int, hits: Tensor, trials: Tensor) -> None:
        self.totals = self.totals.to(hits.device)
        self.totals[row] += torch.stack([hits, trials])


class _Agreement(_Tally):
    """Counts equal codes and common positions of each pair of modalities in a quantizer."""

    def __init__(self, modalities: Sequence[str]) -> None:
        self.pairs = list(combinations(modalities, 2))
        super().__init__(len(self.pairs))

    def __call__(
        self, module: nn.Module, args: object, kwargs: dict[str, Any], output: QuantizerOutput
    ) -> None:
        if not module.training or kwargs.get("freeze"):
            return
        for row, (a, b) in enumerate(self.pairs):
            found = {name: output.indices[name] for name in (a, b) if name in output.indices}
            if len(found) == 2 and found[a].shape == found[b].shape:
                equal, positions = functional.code_agreement(found)
                self.add(row, equal[a, b], positions[a, b])


class _Saturation(_Tally):
    """Counts saturated outputs and all outputs of CLUB's log-variance network.

    The outputs v are the input of the bound b: `b tanh(v / b) > 0.99 b` if `v > b atanh(0.99)`.
    """

    def __init__(self, bound: float) -> None:
        self.limit = bound * math.atanh(SATURATED)
        super().__init__(1)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not module.training:
            return
        rows = args[0].ne(0).any(-1)
        beyond = (output.detach().abs() > self.limit) & rows[..., None]
        self.add(0, beyond.sum(), rows.sum() * output.shape[-1])


def _clubs(module: nn.Module) -> list[tuple[str, CLUBEstimator]]:
    return [(name, m) for name, m in module.named_modules() if isinstance(m, CLUBEstimator)]
