"""The custom operators: their schemas, compiled graphs, and graphs for a GPU that is not here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import draws
from support import uniform
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mmvq_kernels

N, L, D, G = 30, 9, 5, 2
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)


def indices() -> Tensor:
    return torch.randint(-1, L, (N,), generator=torch.Generator().manual_seed(0))


@DTYPES
def test_nearest_code_is_a_sound_operator(dtype: torch.dtype) -> None:
    x, codebook = uniform(N, D, dtype=dtype), uniform(L, D, dtype=torch.float32, seed=1)
    torch.library.opcheck(torch.ops.mmvq.nearest_code.default, (x, codebook, False))


@DTYPES
@pytest.mark.parametrize("grouped", [False, True])
def test_code_statistics_is_a_sound_operator(dtype: torch.dtype, grouped: bool) -> None:
    groups, number = (indices() % G, G) if grouped else (None, 1)
    args = uniform(N, D, dtype=dtype), indices(), L, groups, number, True
    torch.library.opcheck(torch.ops.mmvq.code_statistics.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reset", [False, True])
def test_ema_update_is_a_sound_operator(dtype: torch.dtype, reset: bool) -> None:
    matrices = [uniform(L, D, dtype=dtype, seed=i) for i in range(4)]
    counts, batch_counts = torch.arange(L).to(dtype) + 1, torch.ones(L, dtype=dtype)
    dead = (torch.arange(L) < 2) if reset else None
    args = (*matrices[:2], counts, matrices[2], batch_counts, 0.9, 1e-5, dead)
    operator = torch.ops.mmvq.ema_update_.default
    torch.library.opcheck(operator, (*args, matrices[3] if reset else None))


# The warning is about copies that opcheck makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_code_log_probabilities_is_a_sound_operator(dtype: torch.dtype) -> None:
    x = uniform(3, 4, D, dtype=dtype).requires_grad_()
    codebook = uniform(L, D, dtype=dtype, seed=1).requires_grad_()
    used = torch.ones(3, 4, dtype=torch.bool)
    used[1, 2:] = False
    torch.library.opcheck(torch.ops.mmvq.code_log_probabilities.default, (x, codebook, used))


# The warning is about copies that opcheck makes.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("call", draws.operator_calls())
def test_the_operators_of_a_training_step_are_sound(call: str) -> None:
    name, args = draws.operator_calls()[call]
    torch.library.opcheck(getattr(torch.ops.mmvq, name).default, args)


def test_the_gradient_of_the_distribution_is_its_own() -> None:
    used = torch.tensor([[True, True, False], [True, False, True]])
    x = uniform(2, 3, D).requires_grad_()
    codebook = uniform(L, D, seed=1).requires_grad_()

    def log_p(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.ops.mmvq.code_log_probabilities(x, codebook, used)[0]

    torch.autograd.gradcheck(log_p, (x, codebook))
    (alone,) = torch.autograd.grad(log_p(x, codebook.detach()).sum(), x)
    both = torch.autograd.grad(log_p(x, codebook).sum(), (x, codebook))
    assert torch.equal(alone, both[0])


class Step(nn.Module):
    """Search, statistics and moving average, as a training step strings them together."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        codes = torch.empty(L, D, device=device) if device == "cuda" else uniform(L, D).float()
        self.register_buffer("codes", codes)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("counts", torch.ones(L, device=device))

    def forward(self, x: Tensor) -> Tensor:
        chosen = mmvq_kernels.nearest_code(x, self.codes)
        n, s = mmvq_kernels.code_statistics(x, chosen, L)
        mmvq_kernels.ema_update_(self.codes, self.sums, self.counts, s, n, decay=0.9)
        return chosen


OPERATORS = ["mmvq.nearest_code.default", "mmvq.code_statistics.default"]


def ours(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    graphs = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    nodes = [node for part in graphs for node in part.graph.nodes]
    return [node for node in nodes if str(node.target).startswith("mmvq.")]


def test_a_step_compiles_to_one_graph_of_two_operators_and_a_formula() -> None:
    eager, step = Step(), Step()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=keep)
    for n in (N, 2 * N + 1):
        x = uniform(n, D).float().requires_grad_()
        assert torch.equal(compiled(x), eager(x))
    for mine, other in zip(step.buffers(), eager.buffers(), strict=True):
        assert torch.equal(mine, other)
    (graph,) = graphs  # any N
    assert [str(node.target) for node in ours(graph)] == OPERATORS


def test_the_torch_backend_is_traced_as_it_is() -> None:
    """By its own name there is no operator: its blocks and tiles go into the graph."""
    x, codebook = uniform(3000, 8).float(), uniform(1100, 8, seed=1).float()

    def search(x: Tensor) -> Tensor:
        return mmvq_kernels.nearest_code(x, codebook, backend="torch")

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), search(x))
    with FakeTensorMode() as mode:
        fake = mmvq_kernels.nearest_code(mode.from_tensor(x), mode.from_tensor(codebook))
    assert fake.shape == (3000,)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # torch 2.6's own
def test_inductor_compiles_the_torch_backend() -> None:
    """It has no code for oneDNN's product of two tensors that may both change."""
    x, codebook = uniform(30, 8).float(), uniform(20, 8, seed=1).float()

    def search(x: Tensor, codebook: Tensor) -> Tensor:
        return mmvq_kernels.nearest_code(x, codebook, backend="torch")

    compiled = torch.compile(search, fullgraph=True, backend="inductor")
    assert torch.equal(compiled(x, codebook), search(x, codebook))


def test_a_step_exports_for_a_gpu_that_is_not_here() -> None:
    with FakeTensorMode():
        x = torch.empty(N, D, device="cuda")
        exported = torch.export.export(Step("cuda"), (x,), strict=False)
    nodes = ours(exported.graph_module)
    assert [str(node.target) for node in nodes] == [
        *OPERATORS[:2],
        "mmvq.ema_update_of_tensors.default",
    ]
    assert nodes[0].meta["val"].device.type == "cuda"
    assert nodes[0].meta["val"].shape == (N,)


def test_importing_and_running_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mmvq_kernels as k\n"
        "x = torch.randn(8, 4)\n"
        "i = k.nearest_code(x, x)\n"
        "n, s = k.code_statistics(x, i, 8)\n"
        "k.ema_update_(x.clone(), x.clone(), n.clone(), s, n, decay=0.9)\n"
        "assert i.tolist() == list(range(8))\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=root)
