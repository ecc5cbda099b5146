"""The codebook: its state, and the moving average that updates it (Eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmvq import functional, state
from mmvq.checks import (
    check_choice,
    check_codes,
    check_count_or_none,
    check_fit,
    check_floating,
    check_fraction,
    check_indices,
    check_int,
    check_mask,
    check_vectors,
    is_cpu_readable,
    message,
)
from mmvq.distributed import OverRanks, all_reduce_, gather_batch_sizes, world_size
from mmvq.pretrained import Pretrained, parameters
from mmvq.settings import Setting
from mmvq_kernels import ema, nearest, statistics
from mmvq_kernels.deprecation import renamed_arguments, warn_of_old_name
from mmvq_kernels.operators import MOST_GROUPS

Init = Literal["kmeans", "samples", "uniform"]
ResetRule = Literal["all", "any"]


class EMACodebook(OverRanks, Pretrained):
    r"""L codes, each the exponential moving average of the vectors that choose it (Eq. 7).

    $$N \leftarrow \gamma N + (1 - \gamma) n \qquad o \leftarrow \gamma o + (1 - \gamma) s \qquad
      e = o / \tilde N$$

    Here n and s are the counts and sums of a step, and $\tilde N$ is the Laplace-smoothed N. A step
    is a search, any number of calls of `accumulate`, and one `apply`. Vectors belong to groups: a
    multi-modal quantizer has one for each modality.

    State (buffers, which keep their dtypes under any cast; see `mmvq/state.py`): `codes` e
    `[L, D]`, `sums` o `[L, D]` and `counts` N `[L]` in float32 or float64; in int64 `ages` `[G, L]`
    (batches since a group chose a code, -1 for a group not yet seen), `usage` `[G, L]` (choices
    since the last `reset_usage`), `steps`, and `initialized` (1 after the codes were initialised).
    With `init="uniform"` N and o start at 0, so the first vectors that choose a code replace it. A
    code that no vector of a step chose keeps its e.

    Settings may be read and set at any time: `decay`, `eps`, `reset_after` and `reset_rule`, and
    `init` until the codes have been initialised. By default it never resets codes and starts from
    uniform ones, unlike the codebook of a `MultiModalEMAQuantizer`.

    Args:
        dim: feature dimension D.
        codebook_size: number of codes L.
        decay: decay gamma of the moving average, in [0, 1].
        eps: constant of the Laplace smoothing, which is used in the division only.
        groups: number of groups G.
        update_from: groups whose vectors enter N and o and count for the reset of dead codes (None:
            all).
        reset_after: number of batches after which an unchosen code is reset; None never resets.
        reset_rule: `"all"`: a code survives only if every group chose it within `reset_after`
            batches; `"any"`: it survives if any group did.
        init: `"uniform"` in (-1/L, 1/L), or `"kmeans"` or `"samples"` of the first data passed to
            `initialize`, with N = 1 and o = e. For given codes, see `set_codes`.
        process_group: ranks that share the codebook; None is the default group, looked up at each
            step, so that the module may be built before it.

    Raises:
        ValueError: an argument out of range.

    Source: Eq. 7 and Sec. 4.3. The released code starts from o = e with N = 0, writes smoothing
    back into N, and updates after each modality; see `mmvq.compat.cmg`.

    Examples:
        >>> book, x = EMACodebook(2, 4), torch.randn(8, 2)
        >>> book.accumulate(x, book.search(x))
        >>> int(book.apply().steps)
        1
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    ages: Tensor
    usage: Tensor
    steps: Tensor
    initialized: Tensor
    dim: int
    codebook_size: int
    groups: int
    process_group: dist.ProcessGroup | None
    decay: Setting[float] = Setting(check_fraction)
    eps: Setting[float] = Setting(check_fraction)
    reset_rule: Setting[ResetRule] = Setting(partial(check_choice, choices=get_args(ResetRule)))
    _pending: Tensor | None  # statistics not yet applied; like gradients, in no file
    _seen: Tensor | None  # `initialized`, once it was read as 1: reading it waits for a GPU
    _memory: state.Memory

    @renamed_arguments(size="codebook_size")
    def __init__(
        self,
        dim: int,
        codebook_size: int,
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
        super().__init__()
        where = "EMACodebook"
        check_int(where, 1, dim=dim, codebook_size=codebook_size, groups=groups)
        given, known = update_from, range(groups)
        some = isinstance(given, Collection) and len(given) > 0
        if given is not None and not (some and all(i in known for i in given)):
            rule = f"update_from must hold one or more group numbers from 0 to {groups - 1}"
            hint = "pass None to update from all groups"
            got = {"update_from": update_from, "groups": groups}
            raise ValueError(message(where, rule, hint=hint, **got))
        check_choice(where, get_args(Init), init=init)
        self.dim, self.codebook_size, self.groups = dim, codebook_size, groups
        self.decay, self.eps, self._init = decay, eps, init
        self.reset_after, self.reset_rule = reset_after, reset_rule
        self._update_from = None if given is None else tuple(sorted({*given}))
        self.process_group = process_group

        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("codes", torch.empty(codebook_size, dim, dtype=dtype))
        self.register_buffer("sums", torch.empty(codebook_size, dim, dtype=dtype))
        self.register_buffer("counts", torch.empty(codebook_size, dtype=dtype))
        self.register_buffer("ages", torch.empty(groups, codebook_size, dtype=torch.long))
        self.register_buffer("usage", torch.empty(groups, codebook_size, dtype=torch.long))
        self.register_buffer("steps", torch.empty((), dtype=torch.long))
        self.register_buffer("initialized", torch.empty((), dtype=torch.long))
        self._memory = {}
        self.reset_parameters()

    @property
    def size(self) -> int:
        """Old name of `codebook_size`, for one release."""
        warn_of_old_name("EMACodebook.size", "EMACodebook.codebook_size")
        return self.codebook_size

    @property
    def init(self) -> Init:
        """Source of the first codes. It may be set until the codes have been initialised."""
        return self._init

    @init.setter
    def init(self, init: Init) -> None:
        check_choice(type(self).__name__, get_args(Init), init=init)
        self._init = init
        if not (self.counts.is_meta or bool(self.counts.any())):
            self.initialized.fill_(init == "uniform")
            self._seen = None

    @property
    def reset_after(self) -> int | None:
        """Number of batches after which an unchosen code is reset; None never resets."""
        return None if self._patience is None else int(self._patience)

    @reset_after.setter
    def reset_after(self, batches: int | None) -> None:
        check_count_or_none(type(self).__name__, reset_after=batches)
        # as a float, whose schedule compiles once: a graph takes each int for a constant
        self._patience = None if batches is None else float(batches)

    @property
    def update_from(self) -> tuple[int, ...] | None:
        """The groups whose vectors enter N and o, sorted; None: all."""
        return self._update_from

    @property
    def weight(self) -> Tensor:
        """The codes e, `[L, D]`: the live buffer. Clone it to keep it across an update."""
        self.mend()
        return self.codes

    # ---- the first codes

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Restore the state of a new module, also after `to_empty` of one built on `meta`.

        transformers calls this while loading, with `torch.nn.init` guarded: it skips the tensors
        that came from the file, which carry a mark. If all of the state came from the file, that
        guard keeps it. Otherwise the whole state starts anew, as its parts belong together.
        """
        whole = all(getattr(x, "_is_hf_initialized", False) for x in self._buffers.values())
        uniform: Any = nn.init.uniform_ if whole else Tensor.uniform_
        fill: Any = nn.init.constant_ if whole else Tensor.fill_
        bound = 1 / len(self.codes)
        uniform(self.codes, -bound, bound)
        for x in (self.sums, self.counts, self.usage, self.steps):
            fill(x, 0)
        fill(self.ages, functional.UNSEEN)
        fill(self.initialized, int(self.init == "uniform"))
        self._pending = self._seen = None
        self.mend()

    @property
    def ready(self) -> bool:
        """Whether the codes are initialised. On a GPU this may lag, to avoid a synchronisation."""
        if is_cpu_readable(self.initialized):
            self._seen = self.initialized if self.initialized.numpy() else None
        return self._seen is self.initialized or self.init == "uniform"

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        r"""Start from given codes: set e, N and $o = e \tilde N$, and reset the rest of the state.

        The next batch moves them by Eq. 7. Writing to `codes` alone would not last, because a step
        computes e from o and N for every code that a vector chose. With several ranks, call it on
        each.

        Args:
            codes: codes `[L, D]`, any float dtype; float64 makes the state float64.
            counts: counts N, `[L]`, none below 0: the weight of each code against the vectors to
                come. None: 1, as if one vector had chosen it.

        Raises:
            ValueError: shapes that do not fit; codes that are not finite or too large to square;
                counts that are not finite or below 0.
            TypeError: codes that are not floating point.
        """
        self.mend()
        check_codes("EMACodebook.set_codes", codes, counts, like=self.codes)
        self.match_dtype(codes.dtype)
        codes = codes.detach().to(self.codes)
        counts = torch.ones_like(codes[:, 0]) if counts is None else counts.detach().to(codes)
        smoothed = functional.laplace_smoothing(counts, self.eps).nan_to_num()  # 0 if all of N is 0
        sums = codes * smoothed[:, None]
        fit = functional.finite_rows(codes) & functional.finite_rows(sums)
        check_fit("EMACodebook.set_codes", fit & (counts >= 0) & counts.sum().isfinite())
        self.begin(codes, counts, sums)

    def begin(self, codes: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Set e, N and o, with no group seen, no step made and nothing pending."""
        self.codes.copy_(codes)
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.ages.fill_(functional.UNSEEN)
        self.usage.zero_()
        self.steps.zero_()
        self.initialized.fill_(1)
        self._pending, self._seen = None, self.initialized

    @torch.no_grad()
    def initialize(
        self, values: Tensor, groups: Tensor | None = None, usable: Tensor | None = None
    ) -> None:
        """Take the first codes from data, unless the codes were initialised before.

        The finite rows of all ranks take part. If there is none, nothing happens, and the next
        batch is used (not under `torch.compile`). Float64 values make the state float64.

        Args:
            values: vectors `[..., D]`.
            groups: group of each vector, int64 `[...]`; groups outside `update_from` are left out.
                None: all in group 0.
            usable: bool `[...]`; False leaves a vector out.

        Raises:
            ValueError: shapes that do not fit; a `usable` that is not bool.
            TypeError: values that are not floating point, groups that are not int64.
            IndexError: a group outside [0, G) (checked on a CPU only).
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
        rows = values.reshape(-1, self.dim)
        fit = usable.flatten() & functional.finite_rows(rows)
        first = self.first_codes(rows, torch.where(fit, groups.flatten(), -1))
        if first is not None:
            self.take_first_codes(first)

    @torch.no_grad()
    def first_codes(self, rows: Tensor, groups: Tensor) -> FirstCodes | None:
        """The codes that `initialize` would take from checked `[N, D]`, or None. Writes none.

        A row of a group below 0 is left out.
        """
        self.mend()
        if self.ready:
            return None
        if not _without_data(rows) and bool(self.initialized):
            self._seen = self.initialized  # set without load_state_dict: by DDP's broadcast, say
            return None
        keep = (groups >= 0) & self._updating(groups)
        self.match_dtype(rows.dtype)
        ranks = gather_batch_sizes("EMACodebook", rows, self.process_group)
        rows, keep, groups = (ranks.gather(x) for x in (rows.detach(), keep, groups))
        if rows.shape[0] == 0:
            return None
        order = groups.argsort(stable=True)  # by group, then rank: as one process would have them
        make = functional.kmeans if self.init == "kmeans" else functional.sample_rows
        codes = make(rows[order].to(self.codes.dtype), self.codebook_size, keep[order])
        fresh = keep.any() & (self.initialized == 0)
        return FirstCodes(torch.where(fresh, codes, self.codes), fresh)

    @torch.no_grad()
    def take_first_codes(self, first: FirstCodes) -> None:
        """Start from what `first_codes` returned: N = 1 and o = e."""
        self.codes.copy_(first.codes)
        self.sums.copy_(torch.where(first.fresh, first.codes, self.sums))
        self.counts.copy_(torch.where(first.fresh, 1, self.counts))
        self.initialized.copy_(torch.where(first.fresh, 1, self.initialized))
        # A compiled graph cannot wait for the answer: there, the first batch counts.
        known = _without_data(first.codes) or bool(self.initialized)
        self._seen = self.initialized if known else None

    # ---- a step: search, accumulate, apply

    def search(self, x: Tensor) -> Tensor:
        """Index of the nearest code (Eq. 2): `[..., D]` -> int64 `[...]`.

        Raises:
            ValueError: the last dimension of x is not D, or x is on another device.
            TypeError: x is not a floating point tensor.
        """
        check_vectors("EMACodebook.search", x, self.codes)
        return self.nearest(x.reshape(-1, self.dim)).view(x.shape[:-1])

    def nearest(self, rows: Tensor, codes: Tensor | None = None) -> Tensor:
        """Index of the nearest code of each of the checked `[N, D]`."""
        codes = self.weight if codes is None else codes
        return nearest.search(rows.detach(), codes.detach(), False)

    @torch.no_grad()
    def accumulate(self, values: Tensor, indices: Tensor, groups: Tensor | None = None) -> None:
        """Add vectors to the step that the next `apply` will make.

        Nothing is added inside a backward pass, where activation checkpointing repeats the forward
        pass: its vectors were added the first time.

        Args:
            values: vectors to average, `[..., D]`; float64 makes the state float64. A vector that
                is not finite, or too large to square, is left out.
            indices: code of each vector, int64 `[...]`; -1 leaves the vector out.
            groups: group of each vector, int64 `[...]`; None: all in group 0.

        Raises:
            ValueError: shapes that do not fit.
            TypeError: values that are not floating point, indices or groups that are not int64.
            IndexError: an index of L or more, a group outside [0, G) (checked on a CPU only).
        """
        where, searched = "EMACodebook.accumulate", "pass the indices that search(x) returned"
        check_floating(where, values=values)
        check_indices(where, self.codebook_size, searched, indices=indices)
        if groups is None:
            groups = torch.zeros_like(indices)
        else:
            numbered = "number the groups from 0"
            check_indices(where, self.groups, numbered, signed=False, groups=groups)
        self._check_rows(where, searched, values, indices=indices, groups=groups)
        if recomputing():
            return
        self.mend()
        self.match_dtype(values.dtype)
        rows = values.reshape(-1, self.dim)
        indices = torch.where(functional.finite_rows(rows), indices.flatten(), -1)
        self.add_rows(rows, indices, groups.flatten())

    @torch.no_grad()
    def add_rows(self, rows: Tensor, indices: Tensor, groups: Tensor) -> None:
        """`accumulate` of checked `[N, D]`, `[N]` and `[N]`, a -1 for a row that is left out."""
        rows = rows.to(self.codes.dtype)
        if self._update_from is not None:  # vectors of the other groups are counted, not added
            rows = torch.where(self._updating(groups)[:, None], rows, 0)
        arguments = rows, indices, self.codebook_size, groups, self.groups, True
        flat = statistics.accumulate(*arguments)
        self._pending = flat if self._pending is None else self._pending + flat

    @torch.no_grad()
    def apply(self, fn: Callable[[nn.Module], None] | None = None) -> EMACodebook:
        """One step of Eq. 7 with all that was accumulated, over all ranks, with the reset.

        It runs in eval mode too. Statistics that were accumulated but not yet applied are not part
        of `state_dict`, as gradients are not: save after `apply`, or repeat the micro-batches after
        loading.

        Given a function, this is `nn.Module.apply(fn)`.
        """
        if fn is not None:
            return super().apply(fn)
        pending = self.take_pending()
        if pending is not None:
            all_reduce_(pending, self.process_group)
            self.update_(pending)
        return self

    def take_pending(self) -> Tensor | None:
        """The accumulated statistics as one flat buffer `[G L + L D]`, removed from the module.

        None if there are none. With several ranks zeros take their place, as every rank takes part.
        """
        flat, self._pending = self._pending, None
        if flat is None and world_size(self.process_group) > 1:
            flat = self.codes.new_zeros((self.groups + self.dim) * self.codebook_size)
        return flat

    @torch.no_grad()
    def update_(self, flat: Tensor) -> None:
        """Update the state by reduced statistics: ages, reset, moving average (Eq. 7)."""
        self.mend()
        state = self.codes, self.sums, self.counts, self.ages, self.usage, self.steps
        settings = self.decay, self.eps, self._patience, self.reset_rule
        sources = None if self._update_from is None else [*self._update_from]
        few = self.groups <= MOST_GROUPS
        step_ = functional.ema.step_ if few else functional.ema.step_torch_
        step_(*state, flat, *settings, sources)

    def _updating(self, groups: Tensor) -> Tensor:
        """Whether the vectors of a group enter N and o: int64 `[N]` -> bool `[N]`."""
        if self._update_from is None:
            return torch.ones_like(groups, dtype=torch.bool)
        return reduce(torch.logical_or, [groups == g for g in self._update_from])

    def reset_usage(self) -> None:
        """Set `usage` to 0."""
        self.usage.zero_()

    @torch.no_grad()
    def derive_codes(self) -> None:
        r"""Compute e from o and N, after these were averaged over several models.

        $e = o / \tilde N$, or $o / N$ where N is so small that smoothing would shrink the code. A
        code with N = 0 keeps its e.
        """
        self.mend()
        smoothed = functional.laplace_smoothing(self.counts, self.eps)
        mass = torch.where(self.counts > ema.FADED * self.eps, smoothed, self.counts)[:, None]
        some = mass > torch.finfo(mass.dtype).tiny ** 0.5
        self.codes.copy_(torch.where(some, self.sums / mass, self.codes))

    # ---- casts, copies and files: mmvq/state.py

    def mend(self) -> None:
        """Undo casts and inference tensors that the module was not told of."""
        state.mend(self._buffers, self._memory)

    def match_dtype(self, dtype: torch.dtype) -> None:
        """Make the state float64 if `dtype` is; the state never becomes narrower by itself."""
        if dtype == torch.float64 and self.codes.dtype != torch.float64:
            self.double()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.mend()
        seen = self._seen is self.initialized
        # torch has no types for it
        super()._apply(lambda x: state.keep_kind(x, fn(x)), recurse)  # type: ignore[no-untyped-call]
        if self._pending is not None:
            self._pending = state.keep_kind(self._pending, fn(self._pending))
        self._seen = self.initialized if seen else None
        self._memory = {}
        self.mend()
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.mend()
        return {**super().__getstate__(), "_memory": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mend()

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.mend()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Copy into the buffers; those of a float64 file become float64 first."""
        self.mend()
        for name in state.FLOATS:
            x = state_dict.get(prefix + name)
            if isinstance(x, Tensor) and x.shape == getattr(self, name).shape:
                self.match_dtype(x.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers"):  # the file's own tensors
            state.adopt(self._buffers)
        if self.init == "uniform":  # whatever it was where the codes come from
            self.initialized.fill_(1)
        known = not self.initialized.is_meta and bool(self.initialized)
        self._seen = self.initialized if known else None
        self._pending = None  # it belongs to the state before

    @classmethod
    def _build(cls, config: Any, given: Mapping[str, Any]) -> Self:
        match config:
            case {"arguments": {"size": size, **rest}} if "size" not in parameters(cls):
                config = {**config, "arguments": {**rest, "codebook_size": size}}
        return super()._build(config, given)

    def extra_repr(self) -> str:
        """The settings, as `print(codebook)` shows them."""
        names = "dim codebook_size decay eps reset_after reset_rule init"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split())

    def _check_rows(self, where: str, hint: str, values: Tensor, **each: Tensor) -> None:
        """`values` are `[..., D]`, and what belongs to each of them is `[...]`."""
        if any(values.shape != (*x.shape, self.dim) for x in each.values()):
            rule = f"values must be [..., {self.dim}], {' and '.join(each)} [...]"
            raise ValueError(message(where, rule, hint=hint, values=values, **each))


class FirstCodes(NamedTuple):
    """Codes made from data, `[L, D]`, and whether to take them, a bool scalar."""

    codes: Tensor
    fresh: Tensor


def _without_data(x: Tensor) -> bool:
    """Whether `x` has no data yet: in a graph, or as a fake tensor."""
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor)


def recomputing() -> bool:
    """Whether a backward pass is running, so that a forward pass is one of checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def update_codebooks(modules: nn.Module | Iterable[nn.Module]) -> None:
    """Apply what every codebook inside `modules` accumulated, with one all-reduce per group.

    Args:
        modules: a quantizer, a codebook, a model that contains them, or several of these.

    Raises:
        TypeError: one is not a module.

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
        pending = book.take_pending()
        if pending is not None:
            key = book.process_group, pending.dtype, pending.device
            groups.setdefault(key, []).append((book, pending))
    for (process_group, _, _), members in groups.items():
        joint = torch.cat([pending for _, pending in members])
        all_reduce_(joint, process_group)
        parts = joint.split([len(pending) for _, pending in members])
        for (book, _), part in zip(members, parts, strict=True):
            book.update_(part)
