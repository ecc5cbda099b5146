"""A whole training step on the Triton kernels: their launches, and the same results as in torch.

ATOL: vectors and codes are below 1. What a vector adds to a code has 137 roundings (`test_mixing`,
of attention with D = 8), and a code is a mean of these with a dozen more, in each of three steps.
Loss and gradients are at most 4 times as far off as a code: the gradient of |q|^2 is 2 q, times a
ratio of lengths below 2 where it is rotated, and 100 times the loss has less than that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from support import bools, rounding, uniform
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.nn.modules import module as every_module

from mmvq import CrossModalCommitmentLoss, MultiModalEMAQuantizer, QuantizerOutput
from mmvq_kernels import operators
from mmvq_kernels.backends import transformed
from mmvq_kernels.gpu import launching

B, T, D, L = 3, 10, 8, 12
ATOL = rounding(torch.float32, 3 * 150, 1)
QUANTIZE = ["prepare_kernel", "search_kernel", "commit_kernel"]
UPDATE = ["gather_kernel", "survey_kernel", "average_kernel"]
Tensors = dict[str, Tensor]


@pytest.fixture
def launches(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched; without a GPU the operators take the CPU for one."""
    names: list[str] = []
    launch = launching.launch

    def count(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(launching, "launch", count)
    if device == "cpu":
        through = lambda _, inline=False: not (inline and transformed())  # noqa: E731
        monkeypatch.setattr(operators, "through_operator", through)
        monkeypatch.setattr(operators, "runs_triton", lambda *_: True)
    return names


def quantizer(device: str = "cpu", **options: Any) -> MultiModalEMAQuantizer:
    torch.manual_seed(0)
    options = {"init": "uniform", "reset_after": 1, **options}
    return MultiModalEMAQuantizer(D, L, **options).to(device)


def features(device: str = "cpu") -> Tensors:
    both = {"audio": 1, "video": 2}
    return {name: uniform(B, T, D, seed=i).float().to(device) for name, i in both.items()}


def test_the_launches_of_a_training_step(launches: list[str], device: str) -> None:
    mine = quantizer(device)
    for _ in range(2):  # the second resets
        launches.clear()
        z = {name: x.requires_grad_() for name, x in features(device).items()}
        _, indices, loss = mine(z)
        assert launches == ["mix_kernel", *QUANTIZE, *UPDATE]
        launches.clear()
        loss.backward()
        assert launches == ["commit_backward_kernel"]
    launches.clear()
    mine.eval()(features(device))
    assert launches == QUANTIZE
    assert indices["audio"].device.type == device


@dataclass(frozen=True)
class Case:
    """Steps that are taken, and whether one kernel quantizes in them, and one mixes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: dict.fromkeys(("audio", "video"), (B, T, D))
    )
    masked: bool = False  # and NaN where it is padding
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    not_finite: bool = False  # of a vector
    freeze: bool = False
    fuses: bool = True
    mixes: bool = True

    def batch(self, seed: int, device: str) -> tuple[Tensors, Tensors | None]:
        z, masks = {}, {}
        for i, (name, shape) in enumerate(self.shapes.items()):
            x = uniform(*shape, seed=seed + i)
            if self.masked:
                masks[name] = bools(*shape[:-1], seed=seed + i).to(device)
                x[~masks[name].cpu()] = torch.nan
            if self.not_finite:
                x[1, 2, 3] = torch.nan
            z[name] = x.to(device, self.dtypes.get(name, torch.float32)).requires_grad_()
        return z, masks or None


def middle(z: Tensor, others: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> Tensor:
    """A partner that reads padding, in which there are zeros."""
    return (z + sum(others.values())) / 2


def distance(z: Tensors, codes: Tensors, _: Tensors | None) -> Tensor:
    """A commitment that no kernel knows, and that reads padding, in which there are zeros."""
    return sum(((z[m] - codes[m]) ** 2).mean() for m in z)  # type: ignore[return-value]


THREE = ("audio", "text", "video")
ALL = dict.fromkeys(THREE, (B, T, D))
ONE_WAY = CrossModalCommitmentLoss(cross_ratio={("audio", "video"): 0.5})
OWN = CrossModalCommitmentLoss(cross_ratio=0)
CASES = {
    "two modalities": Case(),
    "masks": Case(masked=True),
    "three modalities": Case({"modalities": THREE}, ALL, masked=True),
    "one is absent": Case({"modalities": THREE}),
    "one is alone": Case(shapes={"video": (B, T, D)}, masked=True),
    "no time": Case(shapes=dict.fromkeys(("audio", "video"), (20, D)), masked=True),
    "mixed dtypes": Case(dtypes={"audio": torch.bfloat16}, masked=True),
    "update_from": Case({"update_from": ["video"]}, masked=True),
    "micro-batches": Case({"update": "manual"}, masked=True),
    "kmeans": Case({"init": "kmeans"}, masked=True),
    "freeze": Case(freeze=True, masked=True, mixes=False),
    "rotation": Case({"gradient": "rotation"}, masked=True),
    "rotation, mixed dtypes": Case({"gradient": "rotation"}, dtypes={"video": torch.bfloat16}),
    "sum": Case({"commitment": CrossModalCommitmentLoss(0.01, 2.0, "sum")}, masked=True),
    "any": Case({"reset_rule": "any"}, masked=True),
    "aligned": Case({"partner": "aligned"}, masked=True),
    "mixed": Case({"assignment": "mixed"}, masked=True),
    "no partner": Case({"partner": "none"}, masked=True),
    "a temperature": Case({"partner_temperature": 1.0, "partner_weight": 0.25}, masked=True),
    "another partner": Case({"partner": middle}, masked=True, mixes=False),
    "no loss": Case({"commitment": None}, not_finite=True),
    "another loss": Case({"commitment": distance}, masked=True, fuses=False),
    "ratios of pairs": Case({"commitment": ONE_WAY}, masked=True, fuses=False),
    "other lengths": Case(
        {"commitment": OWN},
        {"audio": (B, T, D), "video": (B, 4, D)},
        masked=True,
        fuses=False,
        mixes=False,
    ),
    "long clips": Case(
        {"init": "kmeans"},
        dict.fromkeys(("audio", "video"), (B, 70, D)),
        masked=True,
        mixes=False,
    ),
}


def steps(case: Case, device: str = "cpu") -> Tensors:
    """Three steps, and all that came of them, on the CPU."""
    mine = quantizer(device, **case.options)
    found: Tensors = {}
    for step in range(3):
        for part in range(2 if mine.update == "manual" else 1):
            z, masks = case.batch(100 * step + 50 * part, device)
            out = mine(z, masks, freeze=case.freeze)
            squares = sum(q.float().square().sum() for q in out.quantized.values())
            (100 * out.loss + squares).backward()
            of_step = {"loss": out.loss}
            for m, x in z.items():
                of_each = {"gradient": x.grad, "codes": out.quantized[m], "indices": out.indices[m]}
                of_step |= {f"{what} of {m}": y for what, y in of_each.items()}
            found |= {f"step {step}.{part}: {n}": y.detach().cpu() for n, y in of_step.items()}
        if mine.update == "manual":
            mine.update_codebook()
    return found | {name: x.cpu() for name, x in mine.named_buffers()}


@pytest.mark.parametrize("name", CASES)
def test_all_is_that_of_the_torch_path(
    name: str, device: str, request: pytest.FixtureRequest
) -> None:
    case = CASES[name]
    before, expected = quantizer(**case.options), steps(case)
    launches = request.getfixturevalue("launches")
    found = steps(case, device)
    assert found.keys() == expected.keys()
    for what, x in found.items():
        wanted = expected[what]
        assert x.dtype == wanted.dtype, what
        assert x.shape == wanted.shape, what
        if x.is_floating_point():
            atol = 4 * ATOL + (0 if x.dtype == torch.float32 else rounding(x.dtype, 4, 4))
            near = partial(torch.testing.assert_close, rtol=0, atol=atol, equal_nan=True)
            near(x, wanted, msg=lambda text, what=what: f"{what}: {text}")
        else:
            assert torch.equal(x, wanted), what
    if case.not_finite:
        assert found["step 2.0: loss"] == 0
    for kernel in ("commit_kernel", "commit_backward_kernel"):
        assert (kernel in launches) == case.fuses
    assert ("mix_kernel" in launches) == case.mixes
    moved = any(not torch.equal(found[n], x) for n, x in before.named_buffers())
    assert moved == ("average_kernel" in launches) == (not case.freeze)


class Doubled(CrossModalCommitmentLoss):
    """A subclass, which may compute anything."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


@contextmanager
def a_hook(register: str, loss: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """Registered by a method of the loss, or for all modules by a function of torch."""
    on = getattr(loss, register, None) or getattr(every_module, register)
    handle = on(note)
    yield
    handle.remove()


@contextmanager
def a_method(name: str, loss: nn.Module, note: Callable[..., None]) -> Iterator[None]:
    """Put into the instance in the place of its own."""
    own = getattr(loss, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        note()
        return own(*args, **kwargs)

    setattr(loss, name, method)
    yield


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
]
WAYS = {name: partial(a_hook, name) for name in HOOKS}
WAYS |= {name: partial(a_method, name) for name in ("forward", "terms")}


# torch's, of a backward hook of a module whose arguments are no tensors
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_what_is_hung_on_the_loss_is_called(way: str, launches: list[str], device: str) -> None:
    mine, calls = quantizer(device), []

    def note(module: Any = None, *_: Any) -> None:
        calls.append(module if way in HOOKS else mine.commitment)

    def step() -> None:
        launches.clear(), calls.clear()
        z = {name: x.requires_grad_() for name, x in features(device).items()}
        mine(z).loss.backward()

    with WAYS[way](mine.commitment, note):
        step()
    assert mine.commitment in calls
    assert not {"commit_kernel", "commit_backward_kernel"} & {*launches}
    assert "mix_kernel" in launches
    if way in HOOKS:  # which is gone
        step()
        assert calls == []
        assert "commit_kernel" in launches


def test_the_loss_of_a_subclass_is_its_own(launches: list[str], device: str) -> None:
    loss = quantizer(device)(features(device)).loss
    launches.clear()
    doubled = quantizer(device, commitment=Doubled())(features(device)).loss
    assert "commit_kernel" not in launches
    torch.testing.assert_close(doubled, 2 * loss, rtol=0, atol=4 * ATOL)


def both(
    of: Callable[[MultiModalEMAQuantizer], Tensor], request: pytest.FixtureRequest, **options: Any
) -> tuple[Tensor, Tensor, list[str]]:
    """`of` a trained quantizer in torch on the CPU and with the kernels, and those launched."""
    device = request.getfixturevalue("device")
    modules = [quantizer("cpu", **options) for _ in range(2)]
    for module in modules:
        module(features())
    wanted = of(modules[0])
    launches = request.getfixturevalue("launches")
    found = of(modules[1].to(device))
    return found.cpu(), wanted, launches


def objective(out: QuantizerOutput) -> Tensor:
    return 100 * out.loss + sum(q.square().sum() for q in out.quantized.values())


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_transforms_of_a_quantizer(gradient: str, how: str, request: pytest.FixtureRequest) -> None:
    """Which no kernel knows: no slice is quantized by one that fuses."""

    def gradients(module: MultiModalEMAQuantizer) -> Tensor:
        module.train(how == "freeze")
        device = module.codebook.device
        x, y = (uniform(2, B, T, D, seed=i).float().to(device) for i in (5, 6))
        valid = bools(2, B, T, seed=7).to(device)

        def loss(a: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return objective(module({"audio": a, "video": v}, {"audio": mask}, freeze=True))

        assert torch.equal(vmap(loss)(x, y, valid).isfinite(), torch.tensor([True] * 2).to(device))
        return vmap(grad(loss))(x, y, valid)

    found, wanted, launches = both(gradients, request, gradient=gradient)
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * ATOL)
    assert "search_kernel" in launches
    assert not {"commit_kernel", "commit_backward_kernel"} & {*launches}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("how", ["eval", "freeze"])
def test_forward_mode(gradient: str, how: str, request: pytest.FixtureRequest) -> None:
    def tangents(module: MultiModalEMAQuantizer) -> Tensor:
        module.train(how == "freeze")
        device = module.codebook.device
        with forward_ad.dual_level():
            z = {
                name: forward_ad.make_dual(x, uniform(B, T, D, seed=5).float().to(device))
                for name, x in features(device).items()
            }
            out = module(z, freeze=True)
            parts = out.loss.view(1), *(q.flatten() for q in out.quantized.values())
            found = [forward_ad.unpack_dual(part).tangent for part in parts]
            assert all(part is not None for part in found)
            return torch.cat(found)

    found, wanted, launches = both(tangents, request, gradient=gradient)
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * ATOL)
    assert "commit_kernel" not in launches


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_second_derivative(gradient: str, masked: bool, request: pytest.FixtureRequest) -> None:
    """A backward pass that is differentiated again runs in torch, the other one is fused."""

    def curvature(module: MultiModalEMAQuantizer) -> Tensor:
        z, masks = Case(masked=masked).batch(8, str(module.codebook.device))
        first = torch.autograd.grad(objective(module(z, masks)), [*z.values()], create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), [*z.values()])
        return torch.stack([*first, *second])

    found, wanted, launches = both(curvature, request, gradient=gradient)
    # 2 q and 100 times 2 / (B T D) of the loss: the second are below 8 times the first
    torch.testing.assert_close(found, wanted, rtol=0, atol=32 * ATOL)
    assert "commit_kernel" in launches
    assert launches.count("commit_backward_kernel") == 1


def test_a_vectorised_jacobian(request: pytest.FixtureRequest) -> None:
    """Its backward pass gets a batch of gradients, by another vmap than that of torch.func."""

    def jacobian(module: MultiModalEMAQuantizer) -> Tensor:
        z, _ = Case().batch(8, str(module.codebook.device))
        out = module(z)
        flow = uniform(4, B, T, D, seed=9).to(out.quantized["audio"])
        grads = partial(torch.autograd.grad, is_grads_batched=True, retain_graph=True)
        (of_codes,) = grads(out.quantized["audio"], z["audio"], flow)
        (of_loss,) = grads(100 * out.loss, z["audio"], flow[:, 0, 0, 0])
        return torch.cat([of_codes, of_loss])

    found, wanted, _ = both(jacobian, request, gradient="rotation")
    torch.testing.assert_close(found, wanted, rtol=0, atol=4 * ATOL)
