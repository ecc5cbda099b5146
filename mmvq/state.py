"""What a codebook keeps, and how it comes through casts, copies, devices, files and frameworks.

One rule: what training reads is either state, or a setting, or derived.

- **State** is seven buffers, all in `state_dict`: `codes`, `sums`, `counts` in float32, or float64
  once float64 data came, and `ages`, `usage`, `steps`, `initialized` in int64. Whoever casts,
  copies, averages, loads or moves the module, it stands in these dtypes at every step. None is
  bool: tools that average weights subtract buffers.
- **Settings** (decay, eps, reset_after, ...) are arguments of `__init__`, in config.json and never
  in `state_dict`: `mmvq/settings.py`.
- What is **derived** from either is in no buffer, so that no tool can lose or forget it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from mmvq import functional
from mmvq.checks import (
    check_choice,
    check_codes,
    check_fit,
    check_fraction,
    is_cpu_readable,
    message,
)
from mmvq.distributed import OverRanks
from mmvq.pretrained import Pretrained
from mmvq.settings import Setting
from mmvq_kernels.backends import transformed
from mmvq_kernels.rounding import FADED

Init = Literal["kmeans", "samples", "uniform"]

_FLOATS = ("codes", "sums", "counts")


class CodebookState(OverRanks, Pretrained):
    """The buffers of `EMACodebook`, and their care; how they move is its own.

    Floating point buffers follow a move to another device and a cast to float64, but no cast below
    float32, nor a file in half precision. A cast that no module sees (FSDP assigns `.data` of
    buffers) is undone at the next use. Loading copies into the buffers that exist, unless the file
    is in float64; `assign=True` takes its tensors.

    Args:
        dim: feature dimension D.
        size: number of codes L.
        groups: number of groups G.
        init: where the first codes come from. Until they do, they are uniform in (-1/L, 1/L).
        eps: Laplace smoothing.
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    ages: Tensor
    usage: Tensor
    steps: Tensor
    initialized: Tensor
    eps: Setting[float] = Setting(check_fraction)
    _pending: Tensor | None  # statistics not yet applied: in no file, as gradients are
    _seen: (
        Tensor | None
    )  # `initialized`, once the host has read a 1 from it: a GPU must be waited for
    _memory: dict[str, tuple[Tensor, Tensor]]  # name -> buffer, and an alias of what it holds

    def __init__(self, dim: int, size: int, groups: int, init: Init, eps: float) -> None:
        super().__init__()
        self._init, self.eps = init, eps
        check_choice(type(self).__name__, get_args(Init), init=init)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("codes", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("sums", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("counts", torch.empty(size, dtype=dtype))
        self.register_buffer("ages", torch.empty(groups, size, dtype=torch.long))
        self.register_buffer("usage", torch.empty(groups, size, dtype=torch.long))
        self.register_buffer("steps", torch.empty((), dtype=torch.long))
        self.register_buffer("initialized", torch.empty((), dtype=torch.long))
        self._memory = {}
        self.reset_parameters()

    @property
    def init(self) -> Init:
        """Where the first codes come from; may be set until they have come."""
        return self._init

    @init.setter
    def init(self, init: Init) -> None:
        check_choice(type(self).__name__, get_args(Init), init=init)
        self._init = init
        if not (self.counts.is_meta or bool(self.counts.any())):
            self.initialized.fill_(init == "uniform")
            self._seen = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as built; a module built on `meta` starts so after `to_empty`.

        transformers calls this while loading, with `torch.nn.init` guarded: it passes over tensors
        that carry a mark, as they came from the file. A state that came whole is left to that
        guard; one of which the file had a part starts anew, as the parts belong together.
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
        """Whether the codes need no data to start from, as far as the host knows."""
        if is_cpu_readable(self.initialized):
            self._seen = self.initialized if self.initialized.numpy() else None
        return self._seen is self.initialized or self.init == "uniform"

    @torch.no_grad()
    def set_codes(self, codes: Tensor, counts: Tensor | None = None) -> None:
        r"""Start from given codes: e, N and $o = e \tilde N$ together, and all else as built.

        The next batch moves them by Eq. 7. Writing to `codes` alone would not last: a step makes e
        of o and N for every code that a vector chose. Under several ranks, call it on each.

        Args:
            codes: `[L, D]`, any float dtype; float64 makes the state float64.
            counts: N, `[L]`, none below 0: how much each code weighs against the vectors to come.
                None: 1, as if one vector had chosen it.

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
        smoothed = functional.laplace_smoothing(
            counts, self.eps
        ).nan_to_num()  # 0 where all of N is 0
        sums = codes * smoothed[:, None]
        fit = (
            functional.finite_rows(codes)
            & functional.finite_rows(sums)
            & (counts >= 0)
            & counts.sum().isfinite()
        )
        check_fit("EMACodebook.set_codes", fit)
        self.begin(codes, counts, sums)

    def begin(self, codes: Tensor, counts: Tensor, sums: Tensor) -> None:
        """Take e, N and o. No group has been seen, no step was made, and nothing is pending."""
        self.codes.copy_(codes)
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        self.ages.fill_(functional.UNSEEN)
        self.usage.zero_()
        self.steps.zero_()
        self.initialized.fill_(1)
        self._pending, self._seen = None, self.initialized

    def match_dtype(self, dtype: torch.dtype) -> None:
        """Make the state float64 if `dtype` is; the state never gets narrower by itself."""
        if dtype == torch.float64 and self.codes.dtype != torch.float64:
            self.double()

    def mend(self) -> None:
        """Undo what a framework did to the buffers that the module was not told of.

        FSDP casts a buffer by assigning its `.data`. An alias of the memory from before the cast
        still holds every bit; if the narrow buffer was written to since, its values count. A buffer
        made in inference mode cannot be written to outside of it: it is replaced by a copy.

        Raises:
            RuntimeError: inside a graph of `torch.compile(fullgraph=True)`, which cannot do that.
        """
        if torch.compiler.is_compiling() or transformed():
            if self.codes.dtype.itemsize < 4:
                rule = "a framework has cast the codebook, which no graph or transform can undo"
                hint = "leave out fullgraph=True, or call the module once outside of it"
                raise RuntimeError(message("EMACodebook", rule, hint=hint, codes=self.codes))
            return
        for name in _FLOATS:
            x: Tensor = getattr(self, name)
            if type(x) is not Tensor or x.is_meta:
                continue
            buffer, before = self._memory.get(name, (None, x))
            before = before.to(x.device) if buffer is x else x
            if x.dtype.itemsize < max(4, before.dtype.itemsize):
                bits = (y.contiguous().view(torch.uint8) for y in (before.to(x.dtype), x))
                wide = torch.promote_types(before.dtype, torch.float32)
                x.data = before if before is not x and torch.equal(*bits) else x.to(wide)
            if buffer is not x or before.data_ptr() != x.data_ptr():
                self._memory[name] = x, x.detach()
        for name, y in self._buffers.items():
            if y is not None and y.is_inference() and not torch.is_inference_mode_enabled():
                self._buffers[name] = y.clone()

    @torch.no_grad()
    def derive_codes(self) -> None:
        r"""Make e of o and N anew, after these were averaged over several models.

        $e = o / \tilde N$, or $o / N$ where N has faded so far that smoothing would shrink the
        code; a code without any N stays.
        """
        self.mend()
        smoothed = functional.laplace_smoothing(self.counts, self.eps)
        mass = torch.where(self.counts > FADED * self.eps, smoothed, self.counts)[:, None]
        some = mass > torch.finfo(mass.dtype).tiny ** 0.5
        self.codes.copy_(torch.where(some, self.sums / mass, self.codes))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.mend()

        def keep_kind(x: Tensor) -> Tensor:
            out = fn(x)
            if x.is_floating_point():
                kept = out.is_floating_point() and out.dtype.itemsize >= 4
            else:
                kept = out.dtype == x.dtype
            return out if kept else x.to(out.device)

        seen = self._seen is self.initialized
        super()._apply(keep_kind, recurse)  # type: ignore[no-untyped-call]
        if self._pending is not None:
            self._pending = keep_kind(self._pending)
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
        self.mend()
        for name in _FLOATS:
            x = state_dict.get(prefix + name)
            if isinstance(x, Tensor) and x.shape == getattr(self, name).shape:
                self.match_dtype(x.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        if local_metadata.get("assign_to_params_buffers"):  # the file's own tensors, as they are
            wide = torch.promote_types(self.codes.dtype, torch.float32)
            for name, x in self._buffers.items():
                assert x is not None
                self._buffers[name] = x.to(wide if name in _FLOATS else torch.long)
            self.initialized = self.initialized.clone()
        if self.init == "uniform":  # whatever it was where the codes come from
            self.initialized.fill_(1)
        known = not self.initialized.is_meta and bool(self.initialized)
        self._seen = self.initialized if known else None
        self._pending = None  # it belongs to the state that was here before
