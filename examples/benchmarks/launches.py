"""How many kernels start on a GPU in each operation, counted on any machine.

A launch is a kernel, a copy or a fill that starts on the device, of ours or of torch. Views and
empty tensors are none. Without a GPU, operations run on tensors of the meta device, which have no
data: what would wait for the device raises. Each call of torch counts as one launch, or as the
table says (`_several`): kernels of ATen for CUDA, torch 2.11 to 2.13. An operator of ours counts as
the launches and calls of its CUDA path. A step of vector-quantize-pytorch waits for the device, so
its calls on a CPU are counted. Before the step was fused, an H100's profile had 265 launches in a
step (counted: 264), 35 in an inference step (35) and 190 in code matching (181).

With a GPU, the profiler counts what ran, and its numbers take the place of the table's.
"""

from __future__ import annotations

import math
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmvq
import mmvq_kernels
from mmvq_kernels import operators
from mmvq_kernels.gpu import launching

from . import peers

B, T, D, L = 80, 10, 256, 400
N = 2 * B * T
LIMITS: dict[str, dict[str, int]] = {
    "step": {"forward": 8, "backward": 3},
    "search": {"forward": 3},
    "statistics": {"forward": 2},
    "eval": {"forward": 4},
}
VARIANTS = 1.5  # times the limit of the operation whose variant it is

Phases = dict[str, Callable[[], object]]
"""What is counted apart, in the order in which it runs."""
Case = Callable[[str], Phases]
"""Builds the phases on a device."""
Counts = dict[str, Counter[str]]
"""Phase -> name -> launches."""

# ---- what is counted


def _features(
    device: str, *, number: int = 2, size: int = B, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    names = ("audio", "video", "text")[:number]
    shape = size, T, D
    return {m: torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for m in names}


def _masks(z: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {m: torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) for m, x in z.items()}


def step(
    device: str,
    *,
    flows: bool = False,
    masked: bool = False,
    number: int = 2,
    size: int = B,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Phases:
    """A training step; with `flows`, the quantized vectors have gradients too, from a decoder."""
    z = _features(device, number=number, size=size, dtype=dtype)
    masks = _masks(z) if masked else None
    quantizer = mmvq.MultiModalEMAQuantizer(D, L, tuple(z), init="uniform", **settings).to(device)
    gradients = [torch.randn_like(x) for x in z.values()]
    out: list[mmvq.QuantizerOutput] = []

    def forward() -> None:
        out.clear()  # the last autograd graph; a capture must not free it
        for x in z.values():
            x.grad = None
        out.append(quantizer(z, masks))

    def backward() -> None:
        (found,) = out
        if flows:
            given = [None, *gradients]
            torch.autograd.backward([found.loss, *found.quantized.values()], given)
        else:
            found.loss.backward()

    return {"forward": forward, "backward": backward}


def inference(device: str, *, masked: bool = False, number: int = 2) -> Phases:
    """A forward pass in eval mode, without gradients."""
    z = _features(device, number=number)
    masks = _masks(z) if masked else None
    quantizer = mmvq.MultiModalEMAQuantizer(D, L, tuple(z), init="uniform").to(device).eval()
    return {"forward": torch.no_grad()(lambda: quantizer(z, masks))}


def search(device: str, *, dtype: torch.dtype = torch.float32) -> Phases:
    """`mmvq_kernels.nearest_code`."""
    x, codebook = torch.randn(N, D, device=device, dtype=dtype), torch.randn(L, D, device=device)
    return {"forward": lambda: mmvq_kernels.nearest_code(x, codebook)}


def statistics(device: str, *, rows: int = N) -> Phases:
    """`mmvq_kernels.code_statistics` of two groups."""
    values = torch.randn(rows, D, device=device)
    indices = torch.arange(rows, device=device) % L
    groups = torch.arange(rows, device=device) % 2
    count = partial(mmvq_kernels.code_statistics, groups=groups, num_groups=2)
    return {"forward": lambda: count(values, indices, L)}


def matching(device: str, *, masked: bool = False, number: int = 2) -> Phases:
    """Code matching (L_cmcm) of features that need gradients, with given codes."""
    z, codebook = _features(device, number=number), torch.randn(L, D, device=device)
    masks = _masks(z) if masked else None
    loss = mmvq.CrossModalCodeMatchingLoss()
    out: list[Tensor] = []

    def forward() -> None:
        out.clear()
        for x in z.values():
            x.grad = None
        out.append(loss(z, codebook, masks))

    return {"forward": forward, "backward": lambda: out[0].backward()}


def theirs(device: str) -> Phases:
    """A training step of vector-quantize-pytorch, as in `step.py`; both modalities are one batch.

    No code is dead: a replacement would launch more.
    """
    x = torch.randn(2 * B, T, D, device=device, requires_grad=True)
    flow = torch.randn_like(x)
    module = peers.quantizer(D, L).to(device)
    module._codebook.cluster_size.fill_(10)
    module._codebook.initted.fill_(True)
    out: list[Any] = []

    def forward() -> None:
        x.grad = None
        q, _, loss = module(x)
        out[:] = [[loss.sum(), q]]

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.backward(out[0], [None, flow]),
    }


CASES: dict[str, Case] = {
    "step": step,
    "search": search,
    "statistics": statistics,
    "eval": inference,
    "matching": matching,
    "step, loss and quantized": partial(step, flows=True),
    "step, masks": partial(step, masked=True),
    "step, aligned": partial(step, partner="aligned"),
    "step, none": partial(step, partner="none"),
    "step, three modalities": partial(step, number=3),
    "step, rotation": partial(step, gradient="rotation"),
    "step, rotation, loss and quantized": partial(step, gradient="rotation", flows=True),
    "step, bfloat16": partial(step, dtype=torch.bfloat16),
    "step, update_from": partial(step, update_from=("audio",)),
    "step, N 20,000": partial(step, size=1000),
    "search, bfloat16": partial(search, dtype=torch.bfloat16),
    "statistics, N 65,536": partial(statistics, rows=1 << 16),
    "eval, masks": partial(inference, masked=True),
    "eval, three modalities": partial(inference, number=3),
    "matching, masks": partial(matching, masked=True),
}
HELD: tuple[str, ...] = ("step, masks", "step, aligned", "step, none", "step, three modalities")
HELD += ("eval, masks", "eval, three modalities")
"""The variants with a limit."""

# ---- how it is counted

_NONE = {  # neither a view by its schema nor a launch
    "_unsafe_view",
    "_reshape_alias",
    "detach",
    "detach_",
    "lift_fresh",
    "resize_",
    "set_",
    "squeeze_",
    "t_",
    "transpose_",
    "unsqueeze_",
    "split",
    "split_with_sizes",
    "unbind",
}
_TABLE = {  # calls that are several launches
    "addbmm": 2,
    "addmm": 2,  # the bias is copied first
    "baddbmm": 2,
    "bincount": 5,
    "constant_pad_nd": 2,  # fill, copy
    "cumsum": 2,  # the two kernels of a scan
    "diagonal_backward": 2,
    "embedding_dense_backward": 6,  # with a sort
    "index_add": 2,  # the results of the next ones are copies that are written to
    "index_copy": 2,
    "index_fill": 2,
    "index_put": 2,
    "logsumexp": 9,  # amax, abs, eq, masked_fill, sub, exp, sum, log, add
    "masked_fill": 2,
    "masked_scatter": 6,
    "masked_select": 6,
    "mse_loss": 2,
    "mse_loss_backward": 2,
    "multinomial": 8,
    "nonzero": 3,
    "randperm": 4,
    "scatter": 2,
    "scatter_add": 2,
    "scatter_reduce": 2,
    "select_backward": 2,
    "select_scatter": 2,
    "slice_backward": 2,
    "slice_scatter": 2,
    "topk": 4,
    "_unique2": 10,
    "_scaled_dot_product_efficient_attention_backward": 2,
}
_REDUCTIONS = {"all", "amax", "amin", "any", "argmax", "argmin", "max", "min", "prod"}
_REDUCTIONS |= {"linalg_vector_norm", "mean", "mse_loss", "sum"}
_SPLIT = 1 << 13  # inputs of one result that several blocks share, whose counters are filled
_SMALL_SORT = 1 << 12  # entries of a row that one block sorts in shared memory


def _several(name: str, args: tuple[Any, ...], out: Any) -> int:
    """Launches of one call of torch."""
    x = next((arg for arg in args if isinstance(arg, Tensor)), None)
    if name in _REDUCTIONS and x is not None:
        results = next(y for y in tree_leaves(out) if isinstance(y, Tensor)).numel()
        return _TABLE.get(name, 1) + (x.numel() >= _SPLIT * max(results, 1))
    if name == "sort" and x is not None:
        if max(x.shape, default=1) <= _SMALL_SORT:
            return 3  # copy, numbers, the sort
        return 5 + x.element_size()  # copies, numbers, histogram, scan, a pass for each byte
    if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
        return 12  # sorts in order to accumulate
    return _TABLE.get(name, 1)


class Launches(TorchDispatchMode):
    """Counts the launches of what runs on a kind of device, by name, in `found`."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # untyped in torch
        self.device = device
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # a call that is made of others, where autograd did not take it apart
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.namespace == "mmvq":
            if (path := operators.GPU_PATHS.get(func._schema.name)) is None:
                raise LookupError(f"{func}: no CUDA path is known, so its launches are not either")
            with self:
                pkgutil.resolve_name(path)(*_all_arguments(func, args, kwargs))
        elif func.namespace == "aten" and self._starts(func, name, args, kwargs, out):
            self.found[f"aten::{name}"] += _several(name, args, out)
        return out

    def _starts(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> bool:
        aliases = [returned.alias_info for returned in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        number = name == "scalar_tensor" and kwargs.get("device") is None  # for a kernel's argument
        if view or number or name in _NONE or "empty" in name:
            return False
        given = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)] or given
        there = any(x.device.type == self.device for x in given)
        return there and any(x.numel() > 0 for x in made)

    def launch(self, kernel: Any, grid: tuple[int, ...], *_: Any, **__: Any) -> None:
        """Count in the place of `launching.launch`."""
        if 0 not in grid:
            while hasattr(kernel, "fn"):  # of a tuner, or interpreted
                kernel = kernel.fn
            self.found[kernel.__name__] += 1


def _all_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call by position, with the defaults that torch leaves out."""
    rest = func._schema.arguments[len(args) :]
    return [*args, *(kwargs.get(each.name, each.default_value) for each in rest)]


class _Attention(TorchFunctionMode):
    """Scaled dot-product attention as on a GPU, by its memory-efficient kernel."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nnf.scaled_dot_product_attention:
            return func(*args, **kwargs)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: Any = None
        ) -> Tensor:
            bias = attn_mask
            if bias is not None:
                if bias.dtype == torch.bool:
                    bias = torch.where(bias, 0.0, q.new_full((), -math.inf))
                bias = nnf.pad(bias, (0, -bias.shape[-1] % 16))[..., : k.shape[-2]]
                bias = bias.expand(*q.shape[:-1], k.shape[-2])
            run = torch.ops.aten._scaled_dot_product_efficient_attention
            result: Tensor = run(q, k, v, bias, q.requires_grad, scale=scale)[0]
            return result

        return attend(*args, **kwargs)


@contextmanager
def as_on_a_gpu() -> Iterator[Launches]:
    """Let the library take meta tensors for those of a GPU, and count what it launches."""
    decide: dict[str, Any] = {
        "through_operator": lambda x, *_: x.is_meta,
        "runs_triton": _takes,
        "fused": _takes,
    }
    originals = {name: getattr(operators, name, None) for name in decide}
    mode = Launches()
    with ExitStack() as stack:
        for module in [m for key, m in sys.modules.items() if key.split(".")[0] in _OURS]:
            names = vars(module)
            for name, value in decide.items():
                if name in names and names[name] is originals[name]:
                    stack.enter_context(patch.object(module, name, value))
            if names.get("launch") is launching.launch:
                stack.enter_context(patch.object(module, "launch", mode.launch))
        # autocast knows no meta device
        stack.enter_context(patch.object(torch, "autocast", lambda *_, **__: nullcontext()))
        stack.enter_context(_Attention())
        yield stack.enter_context(mode)


_OURS = ("mmvq", "mmvq_kernels")


def _takes(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels would take these tensors on a GPU."""
    return all(x is None or (x.is_meta and x.dtype != torch.float64) for x in tensors)


def counted(case: Case) -> Counts:
    """The launches of a case by name, from tensors of the meta device."""
    found: Counts = {}
    for phase, run in _warm(case, "meta").items():
        with as_on_a_gpu() as mode:
            run()
        found[phase] = mode.found
    return found


def counted_calls(case: Case) -> Counts:
    """The same, from the calls on a CPU: for what waits for the device."""
    found: Counts = {}
    for phase, run in _warm(case, "cpu").items():
        with Launches("cpu") as mode:
            run()
        found[phase] = mode.found
    return found


def profiled(case: Case) -> Counts:
    """The launches of a case by name, as the profiler sees them on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    found: Counts = {}
    for phase, run in _warm(case, "cuda").items():
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        found[phase] = Counter()
        for event in profiler.key_averages():
            if event.self_device_time_total > 0:
                found[phase][event.key[:80]] += event.count
    return found


def _warm(case: Case, device: str) -> Phases:
    """The phases, each run before: kernels are compiled and libraries loaded."""
    phases = case(device)
    if device == "meta":
        return phases
    for _ in range(2):
        for run in phases.values():
            run()
    return phases


# ---- the report


class Report(NamedTuple):
    """Launches by case and phase, counted and (on a GPU) as profiled; None: not installed."""

    counted: dict[str, Counts | None]
    profiled: dict[str, Counts | None]

    def __call__(self, name: str) -> dict[str, int] | None:
        """Phase -> launches."""
        counts = self.profiled.get(name) or self.counted[name]
        return None if counts is None else {p: c.total() for p, c in counts.items()}


THEIRS = "vector_quantize_pytorch"


def report() -> Report:
    """Count every case."""
    torch.manual_seed(0)
    found: dict[str, Counts | None] = {}
    seen: dict[str, Counts | None] = {}
    on_gpu = mmvq_kernels.reason_unavailable("triton") is None
    installed = peers.find(THEIRS) is not None
    for name in (*CASES, THEIRS):
        if name == THEIRS:
            found[name] = counted_calls(theirs) if installed else None
        else:
            found[name] = counted(CASES[name])
        if on_gpu and found[name] is not None:
            seen[name] = profiled(theirs if name == THEIRS else CASES[name])
    return Report(found, seen)


def as_json(found: Report) -> dict[str, Any]:
    """The object that `python -m examples.benchmarks launches` prints."""
    top: dict[str, Any] = {}
    for name in (*LIMITS, "matching", THEIRS):
        counts = found(name)
        alone = counts is not None and list(counts) == ["forward"]
        top[name] = counts["forward"] if counts is not None and alone else counts
    if top[THEIRS] is not None:
        calls = found.counted[THEIRS]
        assert calls is not None
        waits = sum(c["aten::_local_scalar_dense"] for c in calls.values())
        top[THEIRS] = {**top[THEIRS], "waits": waits}
    details: dict[str, Any] = {
        "counted": "by the profiler" if found.profiled else "by the table",
        "versions": {"torch": torch.__version__, "mmvq": mmvq.__version__},
    }
    for name, phases in found.counted.items():
        details[name] = None
        if phases is not None:
            totals = {phase: launched.total() for phase, launched in phases.items()}
            details[name] = {**totals, "launched": phases}
    if found.profiled:
        details["profiler"] = found.profiled
    return {**top, "details": details}


def markdown(found: Report) -> str:
    """The table of docs/benchmarks.md, as counted without a GPU."""
    lines = ["| operation | forward | backward |", "| --- | ---: | ---: |"]
    for name, phases in found.counted.items():
        numbers = {} if phases is None else {p: str(c.total()) for p, c in phases.items()}
        cells = name.replace("_", "-"), numbers.get("forward", ""), numbers.get("backward", "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def above_limit(found: Report) -> list[str]:
    """What launches more than it should, one line each."""
    wrong = []
    for name in (x for x in (*LIMITS, *HELD) if x in found.counted):
        times = VARIANTS if name in HELD else 1
        for phase, limit in LIMITS[name.split(",")[0]].items():
            number = (found(name) or {})[phase]
            if number > times * limit:
                wrong.append(f"{name}, {phase}: {number} launches, at most {times * limit:g}")
    return wrong
