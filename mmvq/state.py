"""What a codebook keeps, and how it comes through casts, devices and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mmvq.functional import UNSEEN
from mmvq.pretrained import Pretrained

Init = Literal["kmeans", "samples", "uniform"]


class CodebookState(Pretrained):
    """The buffers of `EMACodebook`, and their care; how they move is its own.

    Floating point buffers are float32, or float64 once float64 data came: they follow a move to
    another device and a cast to float64, but no cast below float32, nor a file in half precision.

    Args:
        dim: D.
        size: L.
        groups: G.
        sources: the groups whose vectors enter N and o.
        init: where the first codes come from. Until they do, they are uniform in (-1/L, 1/L).
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    ages: Tensor
    usage: Tensor
    steps: Tensor
    initialized: Tensor
    voters: Tensor  # bool [G], the sources
    init: Init
    _pending: Tensor | None  # what waits for `apply`, as gradients do: in no file
    _ready: bool  # `initialized`, where the host need not wait for it

    def __init__(
        self, dim: int, size: int, groups: int, sources: Sequence[int], init: Init
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.init, self._sources = init, sources
        self.register_buffer("codes", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("sums", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("counts", torch.empty(size, dtype=dtype))
        self.register_buffer("ages", torch.empty(groups, size, dtype=torch.long))
        self.register_buffer("usage", torch.empty(groups, size, dtype=torch.long))
        self.register_buffer("steps", torch.empty((), dtype=torch.long))
        self.register_buffer("initialized", torch.empty((), dtype=torch.bool))
        self.register_buffer("voters", torch.empty(groups, dtype=torch.bool), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, as built; a module built on `meta` starts so after `to_empty`."""
        bound = 1 / len(self.codes)
        self.sums.copy_(self.codes.uniform_(-bound, bound))
        self.counts.fill_(1)
        self.ages.fill_(UNSEEN)
        self.usage.zero_()
        self.steps.zero_()
        self.initialized.fill_(self.init == "uniform")
        self.voters = self._find_voters()
        self._pending, self._ready = None, self.init == "uniform"

    def match_dtype(self, dtype: torch.dtype) -> None:
        """Make the state float64 if `dtype` is; the state never gets narrower by itself."""
        if dtype == torch.float64 and self.codes.dtype != torch.float64:
            self.double()

    def _find_voters(self) -> Tensor:
        voters = torch.zeros_like(self.ages[:, 0], dtype=torch.bool)
        voters[self._sources] = True
        return voters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(x: Tensor) -> Tensor:
            out = fn(x)
            narrow = out.is_floating_point() and out.dtype.itemsize < 4
            return x.to(out.device) if narrow else out

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        if self._pending is not None:
            self._pending = keep_precision(self._pending)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        codes = state_dict.get(f"{prefix}codes")
        if isinstance(codes, Tensor):
            self.match_dtype(codes.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.codes.dtype.itemsize < 4:  # `assign=True` takes the tensors as the file has them
            self.float()
        self.voters = self._find_voters()  # no file holds them
        if self.init == "uniform":  # whatever it was where the codes come from
            self.initialized = torch.ones_like(self.initialized)
        if not self.initialized.is_meta:
            self._ready = bool(self.initialized)
        self._pending = None  # it belongs to the state that was here before
