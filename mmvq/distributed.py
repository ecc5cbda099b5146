"""All communication of mmvq over torch.distributed.

A batch is split over the ranks of a group by its rows (clips), in rank order. Whether a collective
runs never depends on what only one rank knows. Ranks that make the same calls therefore cannot
deadlock, whatever their batches contain. The group is looked up at each call, so modules may be
built before `init_process_group`.

All-reduces are synchronous. Only the commitment loss, which is short, could overlap with them. If
an error is raised, a step has either completed or not begun.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmvq.checks import message
from mmvq.functional.batch import WHOLE, Batch
from mmvq_kernels.deprecation import renamed


class OverRanks(nn.Module):
    """A module with a `process_group`; None is the default group.

    A group can be neither copied nor pickled. `copy.deepcopy` keeps it, and copies the rest. Pickle
    keeps its name. If no group has that name on loading, the module gets None, with a warning.
    """

    process_group: dist.ProcessGroup | None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        group = state.get("process_group")
        if dist.is_available() and isinstance(group, dist.ProcessGroup):
            state["process_group"] = _GroupName(group.group_name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(name := state.get("process_group"), _GroupName):
            state = {**state, "process_group": _find_group(type(self).__name__, name)}
        # untyped in torch
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class _GroupName(str):
    """The name of a group, which replaces it in a pickle."""


def _find_group(where: str, name: str) -> dist.ProcessGroup | None:
    try:
        from torch._C import _distributed_c10d

        resolve: Any = _distributed_c10d._resolve_process_group  # its names have their own type
        group: dist.ProcessGroup = resolve(name)
        return group
    except (ImportError, RuntimeError):
        rule = "this process has no process group with the pickled name; None replaces it"
        hint = "set process_group, or create the groups first, in the same order"
        warnings.warn(message(where, rule, hint=hint, name=name), stacklevel=2)
        return None


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in the group; 1 if nothing is distributed or this process is not in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return max(dist.get_world_size(group), 1)


def rank(group: dist.ProcessGroup | None = None) -> int:
    """Rank of this process in the group; 0 if nothing is distributed."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def all_reduce_(flat: Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Sum a flat buffer over the ranks, in place."""
    if world_size(group) > 1:
        dist.all_reduce(flat, group=group)


def average_(tensors: Collection[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace tensors (such as gradients) by their means over the ranks, with one all-reduce."""
    ranks = world_size(group)
    if ranks == 1 or not tensors:
        return
    flat = torch.cat([x.detach().flatten() for x in tensors])
    all_reduce_(flat, group)
    parts = (flat / ranks).split([x.numel() for x in tensors])
    for x, part in zip(tensors, parts, strict=True):
        x.detach().copy_(part.view_as(x))


class Ranks(Batch):
    """A batch whose clips are split over the ranks of a group.

    Each operation has its true gradient. That of `sum` is the sum of the ranks' gradients. That of
    `gather` returns to the rank that provided the rows (reduce-scatter). A loss made of them has
    the same value on all K ranks: that of one process on the whole batch. Its gradient on a rank is
    K times the contribution of that rank's clips. The mean over the ranks, which DDP and FSDP take,
    is then the gradient of one process, up to floating-point error. A sum would be K times that.

    Args:
        sizes: number of clips on each rank.
        group: ranks that hold the batch; None is the default group.
    """

    whole = False

    sizes: Sequence[int]
    group: dist.ProcessGroup | None
    offset: int

    def __init__(self, sizes: Sequence[int], group: dist.ProcessGroup | None = None) -> None:
        self.sizes, self.group = sizes, group
        self.offset = sum(sizes[: rank(group)])

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Concatenate the clips of all ranks along `dim`, in rank order."""
        rows = x.movedim(dim, 0)
        padding = rows.new_zeros(max(self.sizes) - len(rows), *rows.shape[1:])
        # `apply` is untyped in torch, here and in `sum`
        parts: Tensor = _Gather.apply(torch.cat([rows, padding]), self.group)  # type: ignore[no-untyped-call]
        whole = torch.cat([part[:n] for part, n in zip(parts, self.sizes, strict=True)])
        return whole.movedim(0, dim)

    def sum(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Sum each tensor over the ranks, in the dtype of the first, with one all-reduce."""
        flat = torch.cat([x.flatten().to(tensors[0]) for x in tensors])
        total: Tensor = _Sum.apply(flat, self.group)  # type: ignore[no-untyped-call]
        parts = total.split([x.numel() for x in tensors])
        return [part.view_as(x) for part, x in zip(parts, tensors, strict=True)]


def gather_batch_sizes(
    where: str,
    x: Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    names: Collection[str] = (),
    **same: int,
) -> Batch:
    """Exchange per-rank batch sizes, with one small all-gather. Synchronises with the device.

    Args:
        where: name of the caller, for error messages.
        x: tensor of this rank, `[B, ...]`; B may be 0.
        group: ranks that hold the batch; None is the default group.
        names: names of the modalities, which must be the same on all ranks.
        same: numbers that must be the same on all ranks.

    Raises:
        ValueError: names or numbers differ between ranks (raised on all ranks).
    """
    if world_size(group) == 1:
        return WHOLE
    facts = {"modalities": crc32(" ".join(sorted(names)).encode()), **same}
    sizes, *table = zip(*exchange([len(x), *facts.values()], x.device, group), strict=True)
    for name, values in zip(facts, table, strict=True):
        if len(set(values)) > 1:
            here: Any = tuple(names) if name == "modalities" else facts[name]
            rule = f"{name} must be the same on all ranks"
            hint = "pass zeros with a mask of False for what is missing on a rank"
            raise ValueError(
                message(
                    where,
                    rule,
                    hint=hint,
                    **{f"{name} of this rank": here},
                    ranks_unlike_rank_0=[k for k, v in enumerate(values) if v != values[0]],
                )
            )
    return Ranks(sizes, group)


def exchange(
    numbers: Sequence[int], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[list[int]]:
    """Gather the numbers of every rank, in rank order. Synchronises with the device."""
    if world_size(group) == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, device=device)
    table = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(table, mine, group=group)
    rows: list[list[int]] = torch.stack(table).tolist()
    return rows


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        out = x.clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Gather(torch.autograd.Function):
    """Stack tensors of equal shape `[n, ...]` from all ranks: `[K, n, ...]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mine = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter(mine, list(grad.contiguous()), group=ctx.group)
        return mine, None


def __getattr__(name: str) -> object:
    return renamed(__name__, name, meet=gather_batch_sizes)
