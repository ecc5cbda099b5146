"""The codebook, and how it moves; `mmvq/state.py` has what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_count_or_none,
    check_floating,
    check_fraction,
    check_indices,
    check_int,
    check_mask,
    check_vectors,
    is_cpu_readable,
    message,
)
from mmvq.distributed import all_reduce_, gather_batch_sizes, world_size
from mmvq.settings import Setting
from mmvq.state import CodebookState, Init

ResetRule = Literal["all", "any"]


class EMACodebook(CodebookState):
    r"""L codes kept by a moving average of the vectors that choose them (Eq. 7).

    $$N \leftarrow \gamma N + (1 - \gamma) n \qquad o \leftarrow \gamma o + (1 - \gamma) s \qquad
      e = o / \tilde N$$

    with n and s the counts and sums of a step and $\tilde N$ the Laplace-smoothed N. The state is
    separate from any wiring: search, accumulate any number of times, then apply once. It knows
    groups of vectors (for a multi-modal quantizer, one for each modality), not what they are.

    State (buffers, float32 or float64 whatever the module is cast to; see `mmvq/state.py`): `codes`
    e `[L, D]`, `sums` o `[L, D]`, `counts` N `[L]`; int64: `ages` `[G, L]` (batches since a group
    chose a code, -1 for a group never seen), `usage` `[G, L]` (choices since the last
    `reset_usage`), `steps`, `initialized` (1 once the codes need no data to start from). At the
    start N and o are 0: the first vectors that choose a code replace it. A code that no vector of
    a step chose keeps its e; for the others $e = o / \tilde N$.

    Settings may be read and set at any time: `decay`, `eps`, `reset_after` and `reset_rule`, and
    `init` until first codes have come.

    Args:
        dim: D.
        size: L.
        decay: gamma in [0, 1].
        eps: Laplace smoothing, used in the division only.
        groups: G.
        update_from: the groups whose vectors enter N and o, and which vote on resets (None: all).
        reset_after: batches after which an unchosen code is reset; None never resets.
        reset_rule: `"all"`: a code survives only if every group chose it within `reset_after`
            batches; `"any"`: if any group did.
        init: `"uniform"` in (-1/L, 1/L), or `"kmeans"` or `"samples"` of the first data that
            `initialize` is given, with N = 1 and o = e. Codes of your own: `set_codes`.
        process_group: the ranks that share the codebook; None is the default group, looked up at
            each step: the module may be built before it.

    Raises:
        ValueError: an argument out of range.

    Source: Eq. 7 and Sec. 4.3. The released code starts from N = 0, writes smoothing back into N,
    and updates after each modality; see `mmvq.compat.cmg`.

    Examples:
        >>> book, x = EMACodebook(2, 4), torch.randn(8, 2)
        >>> book.accumulate(x, book.search(x))
        >>> int(book.apply().steps)
        1
    """

    dim: int
    size: int
    groups: int
    process_group: dist.ProcessGroup | None
    decay: Setting[float] = Setting(check_fraction)
    reset_rule: Setting[ResetRule] = Setting(partial(check_choice, choices=get_args(ResetRule)))

    def __init__(
        self,
        dim: int,
        size: int,
        *,
        decay: float = 0.99,
        eps: float = 1e-5,
        groups: int = 1,
        update_from: Collection[int] | None = None,
        reset_after: int | None = None,
        reset_rule: ResetRule = "all",
        init: Init = "uniform",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        where = "EMACodebook"
        check_int(where, 1, dim=dim, size=size, groups=groups)
        sources = range(groups) if update_from is None else update_from
        if not (isinstance(sources, Collection) and sources and {*sources} <= {*range(groups)}):
            raise ValueError(
                message(
                    where,
                    f"update_from must hold one or more group numbers from 0 to {groups - 1}",
                    hint="pass None to update from all groups",
                    update_from=update_from,
                    groups=groups,
                )
            )
        super().__init__(dim, size, groups, init, eps)
        self.dim, self.size, self.groups = dim, size, groups
        self.decay, self.reset_after, self.reset_rule = decay, reset_after, reset_rule
        self._update_from = None if update_from is None else tuple(update_from)
        self._sources = sorted({*sources})
        self.process_group = process_group

    @property
    def reset_after(self) -> int | None:
        """Batches after which an unchosen code is reset; None never resets."""
        return None if self._patience is None else int(self._patience)

    @reset_after.setter
    def reset_after(self, batches: int | None) -> None:
        check_count_or_none(type(self).__name__, reset_after=batches)
        # as a float, whose schedule compiles once: a graph takes each int for a constant
        self._patience = None if batches is None else float(batches)

    @property
    def update_from(self) -> tuple[int, ...] | None:
        """The groups whose vectors enter N and o, as given; None: all."""
        return self._update_from

    @property
    def weight(self) -> Tensor:
        """The codes e, `[L, D]`: the live buffer. Clone it to keep it across an update."""
        self.mend()
        return self.codes

    def search(self, x: Tensor) -> Tensor:
        """Index of the nearest code (Eq. 2): `[..., D]` -> int64 `[...]`.

        Raises:
            ValueError: the last dimension of x is not D, or x is on another device.
            TypeError: x is no floating point tensor.
        """
        check_vectors("EMACodebook.search", x, self.codes)
        return functional.nearest_code(x, self.weight)

    @torch.no_grad()
    def initialize(
        self, values: Tensor, groups: Tensor | None = None, usable: Tensor | None = None
    ) -> None:
        """Take the first codes from data, unless the codes hold data already.

        The finite rows of all ranks take part; when there is none, nothing happens, and the next
        batch is asked (not under `torch.compile`). A float64 `values` makes the state float64.

        Args:
            values: `[..., D]`.
            groups: int64 `[...]`; rows of groups outside `update_from` are left out. None: all of
                group 0.
            usable: bool `[...]`; False leaves a row out.

        Raises:
            ValueError: shapes that do not fit; a `usable` that is not bool.
            TypeError: values that are not floating point, groups that are not int64.
            IndexError: a group outside [0, G) (looked at on a CPU only).
        """
        if self.ready:
            return
        where, hint = "EMACodebook.initialize", "give each vector one group, and one True or False"
        check_floating(where, values=values)
        if groups is None:
            groups = torch.zeros(values.shape[:-1], dtype=torch.long, device=values.device)
        if usable is None:
            usable = torch.ones_like(groups, dtype=torch.bool)
        check_indices(where, self.groups, "number the groups from 0", signed=False, groups=groups)
        self._check_rows(where, hint, values, groups=groups, usable=usable)
        check_mask(where, "usable", usable, values)
        first = self.first_codes(values, groups, usable)
        if first is not None:
            self.take_first_codes(first)

    @torch.no_grad()
    def first_codes(self, values: Tensor, groups: Tensor, usable: Tensor) -> FirstCodes | None:
        """What `initialize` would take, of arguments that fit; None if nothing. Writes no code."""
        self.mend()
        if self.ready:
            return None
        if not _without_data(values) and bool(self.initialized):
            self._seen = self.initialized  # it came without load_state_dict: DDP's broadcast, say
            return None
        values, groups = values.reshape(-1, self.dim), groups.flatten()
        keep = usable.flatten() & functional.finite_rows(values) & self._updating(groups)
        self.match_dtype(values.dtype)
        ranks = gather_batch_sizes("EMACodebook", values, self.process_group)
        rows, keep, groups = (ranks.gather(x) for x in (values.detach(), keep, groups))
        if rows.shape[0] == 0:
            return None
        order = groups.argsort(stable=True)  # by group, then rank: as one process would have them
        make = functional.kmeans if self.init == "kmeans" else functional.sample_rows
        codes = make(rows[order].to(self.codes.dtype), self.size, keep[order])
        fresh = keep.any() & (self.initialized == 0)
        return FirstCodes(torch.where(fresh, codes, self.codes), fresh)

    @torch.no_grad()
    def take_first_codes(self, first: FirstCodes) -> None:
        """Start from the codes that `first_codes` found: N = 1 and o = e."""
        self.codes.copy_(first.codes)
        self.sums.copy_(torch.where(first.fresh, first.codes, self.sums))
        self.counts.copy_(torch.where(first.fresh, 1, self.counts))
        self.initialized.copy_(torch.where(first.fresh, 1, self.initialized))
        # A compiled graph cannot wait for the answer: there, the first batch is the one.
        known = _without_data(first.codes) or bool(self.initialized)
        self._seen = self.initialized if known else None

    @torch.no_grad()
    def accumulate(self, values: Tensor, indices: Tensor, groups: Tensor | None = None) -> None:
        """Add rows to the step that the next `apply` will make.

        Args:
            values: the vectors to average, `[..., D]`; float64 makes the state float64. A row that
                is not finite, or too large to square, is left out.
            indices: int64 `[...]`, the code each goes to; -1 leaves the row out.
            groups: int64 `[...]`, the group of each row; None: all of group 0.

        Inside a backward pass, where activation checkpointing runs a forward pass again, nothing
        is added: its rows were, the first time.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: values that are not floating point, indices or groups that are not int64.
            IndexError: an index of L or more, a group outside [0, G) (looked at on a CPU only).
        """
        where, searched = "EMACodebook.accumulate", "pass the indices that search(x) returned"
        check_floating(where, values=values)
        check_indices(where, self.size, searched, indices=indices)
        groups = torch.zeros_like(indices) if groups is None else groups
        check_indices(where, self.groups, "number the groups from 0", signed=False, groups=groups)
        self._check_rows(where, searched, values, indices=indices, groups=groups)
        if recomputing():
            return
        self.mend()
        self.match_dtype(values.dtype)
        values, indices, groups = values.reshape(-1, self.dim), indices.flatten(), groups.flatten()
        indices = torch.where(functional.finite_rows(values), indices, -1)
        values = values.to(self.codes.dtype)
        if len(self._sources) < self.groups:  # the others are counted, but add nothing
            values = torch.where(self._updating(groups)[:, None], values, 0)
        counts, sums = functional.code_statistics(
            values,
            indices,
            self.size,
            groups=groups,
            num_groups=self.groups,
        )
        flat = torch.cat([counts.flatten(), sums.flatten()])
        self._pending = flat if self._pending is None else self._pending + flat

    @torch.no_grad()
    def apply(self, fn: Callable[[nn.Module], None] | None = None) -> EMACodebook:
        """One step of Eq. 7 with all that was accumulated, over all ranks; reset included.

        It is asked for by name, so it runs in eval mode too. What was accumulated but not yet
        applied is no part of `state_dict`, as gradients are not: save after `apply`, or repeat the
        micro-batches after loading.

        Given a function, this is `nn.Module.apply(fn)`.
        """
        if fn is not None:
            return super().apply(fn)
        statistics = self.take_pending()
        if statistics is not None:
            all_reduce_(statistics, self.process_group)
            self.update_(statistics)
        return self

    def take_pending(self) -> Tensor | None:
        """The accumulated statistics as one flat buffer `[G L + L D]`, taken out of the module.

        None if there are none, except with several ranks, where every rank must bring something.
        """
        flat, self._pending = self._pending, None
        if flat is None and world_size(self.process_group) > 1:
            flat = self.codes.new_zeros((self.groups + self.dim) * self.size)
        return flat

    @torch.no_grad()
    def update_(self, statistics: Tensor) -> None:
        """Move the state by reduced statistics: ages, reset, moving average (Eq. 7)."""
        self.mend()
        G, L, D = self.groups, self.size, self.dim
        counts, sums = statistics.split([G * L, L * D])
        counts, sums = counts.view(G, L), sums.view(L, D)
        batch_counts = self._of_updating(counts).sum(0)  # [L]

        self.usage.add_(counts.long())
        self.ages.copy_(functional.advance_ages(self.ages, counts))
        dead, replacement = self._find_resets(sums, batch_counts)
        functional.ema_update_(
            self.codes,
            self.sums,
            self.counts,
            sums,
            batch_counts,
            decay=self.decay,
            eps=self.eps,
            dead=dead,
            replacement=replacement,
        )
        self.steps.add_(1)

    def _find_resets(
        self, sums: Tensor, batch_counts: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The idle codes, whose ages start anew, and what takes their place (Sec. 4.3)."""
        if self._patience is None:
            return None, None
        ages = self._of_updating(self.ages)
        idle = functional.dead_codes(ages, self._patience, self.reset_rule)
        dead = idle & (batch_counts.sum() > 0)
        if is_cpu_readable(dead) and not dead.numpy().any():  # a GPU would have to be waited for
            return None, None
        self.ages.masked_fill_(dead & (self.ages >= 0), 0)
        return dead, functional.replacement_codes(self.codes, dead, sums, batch_counts, self.steps)

    def _updating(self, groups: Tensor) -> Tensor:
        """Whether the vectors of a group enter N and o: int64 `[N]` -> bool `[N]`."""
        if len(self._sources) == self.groups:
            return torch.ones_like(groups, dtype=torch.bool)
        return torch.stack([groups == g for g in self._sources]).any(0)

    def _of_updating(self, rows: Tensor) -> Tensor:
        """The rows of those groups: `[G, L]` -> `[|update_from|, L]`."""
        every = len(self._sources) == self.groups
        return rows if every else torch.stack([rows[g] for g in self._sources])

    def reset_usage(self) -> None:
        """Start counting `usage` anew."""
        self.usage.zero_()

    def extra_repr(self) -> str:
        """The settings, as `print(codebook)` shows them."""
        return (
            f"dim={self.dim}, size={self.size}, decay={self.decay}, eps={self.eps}, "
            f"reset_after={self.reset_after}, reset_rule={self.reset_rule!r}, init={self.init!r}"
        )

    def _check_rows(self, where: str, hint: str, values: Tensor, **each: Tensor) -> None:
        """`values` are `[..., D]`, and what belongs to each of them is `[...]`."""
        if any(values.shape != (*x.shape, self.dim) for x in each.values()):
            rule = f"values must be [..., {self.dim}], {' and '.join(each)} [...]"
            raise ValueError(message(where, rule, hint=hint, values=values, **each))


class FirstCodes(NamedTuple):
    """Codes that data gave, `[L, D]`, and whether they are to be taken: bool scalar."""

    codes: Tensor
    fresh: Tensor


def _without_data(x: Tensor) -> bool:
    """Whether `x` stands for a tensor that is not there yet: in a graph, or as a fake."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def recomputing() -> bool:
    """Whether a backward pass is under way, so that a forward pass is one of checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_codebooks(modules: nn.Module | Iterable[nn.Module]) -> None:
    """Apply what every codebook inside `modules` accumulated, with one all-reduce for each group.

    Args:
        modules: quantizers, codebooks, or anything that holds them; or one such module.

    Raises:
        TypeError: one that is no module.

    Examples:
        >>> book = EMACodebook(2, 4)
        >>> book.accumulate(torch.ones(1, 2), torch.tensor([3]))
        >>> update_codebooks([book])
        >>> book.counts.argmax()  # those of the others fade
        tensor(3)
    """
    modules = [modules] if isinstance(modules, nn.Module) else list(modules)
    if not all(isinstance(module, nn.Module) for module in modules):
        rule = "modules must be an nn.Module, or several"
        hint = "pass the model that holds the quantizers, or a list of them"
        raise TypeError(message("update_codebooks", rule, hint=hint, modules=modules))
    books = dict.fromkeys(
        book for module in modules for book in module.modules() if isinstance(book, EMACodebook)
    )
    groups: dict[Any, list[tuple[EMACodebook, Tensor]]] = {}
    for book in books:
        statistics = book.take_pending()
        if statistics is not None:
            key = book.process_group, statistics.dtype, statistics.device
            groups.setdefault(key, []).append((book, statistics))
    for (process_group, _, _), members in groups.items():
        joint = torch.cat([statistics for _, statistics in members])
        all_reduce_(joint, process_group)
        parts = joint.split([len(statistics) for _, statistics in members])
        for (book, _), part in zip(members, parts, strict=True):
            book.update_(part)
