"""`torch.compile` and `torch.export`: the same results, few graphs, no wait for a device."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from support import bools, close, rounding, state, uniform
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    CrossModalCodeMatchingLoss,
    MultiModalEMAQuantizer,
    partners,
    quantizer,
)
from mmvq.functional import sample_rows
from mmvq_kernels import operators

B, T, D, L = 4, 6, 4, 8
NAMES = ("audio", "video")
Tensors = dict[str, Tensor]


class Step(nn.Module):
    """The quantizer with every loss: all that a training step asks of the library."""

    def __init__(self, cpc: bool = False, **options: Any) -> None:
        super().__init__()
        options = {"reset_after": 2, "init": "uniform", **options}
        self.quantizer = MultiModalEMAQuantizer(D, L, NAMES, **options)
        self.matching = CrossModalCodeMatchingLoss()
        self.club = CLUBEstimator(D, D, 8)
        self.cpc = CrossCPC(D, NAMES) if cpc else None

    def forward(self, z: Tensors, masks: Tensors | None = None) -> Tensor:
        quantized, _, loss = self.quantizer(z, masks)
        loss = loss + self.matching(z, self.quantizer.codebook, masks)
        for objective in (self.club, self.club.penalty):
            loss = loss + objective(z["audio"], z["video"], masks and masks["audio"])
        loss = loss + quantized["video"].square().mean()
        return loss if self.cpc is None else loss + self.cpc(z, masks, start="all").loss


def batch(B: int = B, T: int = T, seed: int = 0) -> tuple[Tensors, Tensors]:
    z = {m: uniform(B, T, D, seed=seed + 7 * i).float() for i, m in enumerate(NAMES)}
    masks = {m: bools(B, T, seed=seed + i) for i, m in enumerate(NAMES)}
    return {m: x.requires_grad_() for m, x in z.items()}, masks


def agree(a: Tensors, b: Tensors, atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype
        close(x, b[name], atol)


# the chain behind a gradient: sums over D, L, B and T, of values up to 10
ATOL = rounding(torch.float32, 12 * T + D + L + 20, 10)


def follow(compiled: Any, eager: Any, sizes: list[tuple[int, int]], atol: float) -> None:
    """The same loss, gradients and state on batches of these sizes."""
    for seed, size in enumerate(sizes):
        z, masks = batch(*size, seed=seed)
        twin, _ = batch(*size, seed=seed)
        out, expected = compiled(z, masks), eager(twin, masks)
        close(out, expected, atol)
        out.backward()
        expected.backward()
        agree({m: x.grad for m, x in z.items()}, {m: x.grad for m, x in twin.items()}, atol)


def sizes(number: int, fixed: int | None = None) -> list[tuple[int, int]]:
    return [(2 + i * 7 % 11, fixed or 3 + i * 5 % 7) for i in range(number)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_batches_of_any_size_take_two_graphs() -> None:
    """The first size, then any: to the bit what eager gives, state included."""
    module = Step()
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    follow(compiled, eager, sizes(12), atol=0)
    assert graphs() == 2
    module.eval(), eager.eval()
    follow(compiled, eager, sizes(3), atol=0)
    assert graphs() == 3
    agree(state(module), state(eager))


@pytest.mark.parametrize(
    ("training", "started"),
    [(True, False), (True, True), (False, True)],
    ids=["new", "trained", "eval"],
)
def test_outputs_agree_from_the_first_batch_on(training: bool, started: bool) -> None:
    """Whose data become the codes."""
    eager = MultiModalEMAQuantizer(D, L, NAMES, gradient="rotation")
    if started:
        eager(batch(seed=3)[0])
    module = deepcopy(eager.train(training))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for seed in range(3):
        (z, masks), (twin, _) = batch(seed=seed), batch(seed=seed)
        out, expected = compiled(z, masks), eager(twin, masks)
        for each in (out, expected):
            (each.loss + sum(q.square().sum() for q in each.quantized.values())).backward()
        close(out.loss, expected.loss, 0)
        agree(out.quantized, expected.quantized)
        agree(out.indices, expected.indices)
        agree({m: x.grad for m, x in z.items()}, {m: x.grad for m, x in twin.items()})
    agree(state(module), state(eager))


def test_the_graphs_of_autograd_agree() -> None:
    module = Step()
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    follow(compiled, eager, sizes(3), ATOL)
    assert graphs() == 1
    agree(state(module), state(eager), ATOL)


def test_cross_cpc_compiles_for_any_batch_of_one_length() -> None:
    module = CrossCPC(D, NAMES)

    def loss(z: Tensors, masks: Tensors) -> Tensor:
        return module(z, masks, start="all").loss

    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
        follow(compiled, loss, sizes(3, fixed=3), ATOL)
    assert graphs() == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # torch 2.6's own
def test_inductor_agrees() -> None:
    """Codes are those before the update, though their reads are fused with what comes after it."""
    module = MultiModalEMAQuantizer(D, L, NAMES, init="uniform", partner="none", reset_after=2)
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="inductor")
    for seed, size in enumerate(sizes(4)):
        z, twin = ({m: x.detach() for m, x in batch(*size, seed=seed)[0].items()} for _ in "ab")
        out, expected = compiled(z), eager(twin)
        close(out.loss, expected.loss, ATOL)
        for m in NAMES:
            assert torch.equal(out.indices[m], expected.indices[m])
            close(out.quantized[m], expected.quantized[m], ATOL)
    assert graphs() == 1
    agree(state(module), state(eager), ATOL)


def test_mixed_assignment_is_one_graph() -> None:
    module = MultiModalEMAQuantizer(
        D, L, NAMES, init="uniform", partner="aligned", assignment="mixed", reset_after=2
    )
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for seed, size in enumerate(sizes(4)):
        z, masks = batch(*size, seed=seed)
        assert torch.equal(compiled(z, masks).loss, eager(z, masks).loss)
    assert graphs() == 1
    agree(state(module), state(eager))


@pytest.fixture
def as_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold the operators that they would hold on a GPU; on a CPU these run in torch."""
    for module in (partners, quantizer):
        monkeypatch.setattr(module, "fused", lambda *_: torch.compiler.is_compiling())
    whether = lambda *_: torch.compiler.is_compiling()  # noqa: E731
    monkeypatch.setattr(operators, "through_operator", whether)


@pytest.mark.usefixtures("as_for_a_gpu")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_batches_of_any_size_take_two_graphs_for_a_gpu() -> None:
    """And a third one in eval mode, which holds torch calls."""
    module = Step()
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    follow(compiled, eager, sizes(12), ATOL)
    assert graphs() == 2
    module.eval(), eager.eval()
    follow(compiled, eager, sizes(3), ATOL)
    assert graphs() == 3
    agree(state(module), state(eager), ATOL)


def distance(z: Tensors, codes: Tensors, masks: Tensors | None) -> Tensor:
    """A commitment that no kernel knows."""
    return sum(((z[m] - codes[m]) ** 2).mean() for m in z)  # type: ignore[return-value]


OPERATIONS = {  # for the library's loss and for another, what a step consists of, and its backward
    "default": (["mix", "quantize", "code_statistics", "update_codebook"], ["quantize_backward"]),
    "other": (["mix", "nearest_code", "take", "code_statistics", "update_codebook"], []),
}


def called(code: str) -> list[str]:
    """The operators that compiled code calls, in order."""
    names = re.findall(r"torch\.ops\.mmvq\.(\w+)\.default\(", code)
    return [name.removesuffix("_of_tensors") for name in names]


@pytest.mark.usefixtures("as_for_a_gpu")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # torch 2.6's own
@pytest.mark.parametrize("loss", OPERATIONS)
def test_a_graph_for_a_gpu_holds_few_operators_and_no_copy_of_the_state(loss: Any) -> None:
    """Loss and gradients are those of the codes before the update, which is in place."""
    given = {"commitment": distance} if loss == "other" else {}
    module = MultiModalEMAQuantizer(D, 1000, NAMES, init="uniform", reset_after=2, **given)
    eager = deepcopy(module)

    def step(of: nn.Module, z: Tensors) -> Tensor:
        out = of(z)
        return out.loss + sum(q.square().sum() for q in out.quantized.values())

    compiled = torch.compile(step, fullgraph=True, backend="inductor")

    def both(seed: int) -> None:
        z, twin = (batch(seed=seed)[0] for _ in "ab")
        found, expected = compiled(module, z), step(eager, twin)
        found.backward()
        expected.backward()
        close(found, expected, ATOL)
        agree({m: x.grad for m, x in z.items()}, {m: x.grad for m, x in twin.items()}, ATOL)

    _, (forward, backward) = run_and_get_code(both, 0)
    of_forward, of_backward = OPERATIONS[loss]
    assert sorted(called(forward)) == sorted(of_forward)
    assert called(forward)[-1] == "update_codebook"
    assert called(backward) == of_backward
    assert re.search(r"empty_strided_cpu\(\(1000, 4\)", forward) is None
    for seed in (1, 2, 3):
        both(seed)
    agree(state(module), state(eager), ATOL)


@pytest.mark.usefixtures("as_for_a_gpu")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_a_schedule_of_all_settings_compiles_twice_at_most_for_a_gpu() -> None:
    module = MultiModalEMAQuantizer(
        D, L, NAMES, init="uniform", reset_after=2, partner_temperature=2.0
    )
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for step in range(5):
        for each in (module, eager):
            each.decay = each.partner_weight = 0.9 - step / 10
            each.eps, each.reset_after = 1e-5 * (step + 1), step + 1
            each.partner_temperature = each.commitment.beta = 1.5 + step
        z = batch(seed=step)[0]
        close(compiled(z).loss, eager(z).loss, 10 * ATOL)
    agree(state(module), state(eager), 10 * ATOL)
    assert graphs() <= 2


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles")  # torch 2.6's own
def test_inductor_draws_the_first_codes() -> None:
    """Of a known size: an `arange` becomes an index, and the hash of one must not overflow.

    32 rows are whole vectors: in what is left of a loop C++ wraps a product as it likes, so that
    other rows may be drawn.
    """
    x = batch(8, 4)[0]["audio"].detach().flatten(0, 1)
    compiled = torch.compile(sample_rows, dynamic=False, backend="inductor")
    assert torch.equal(compiled(x, 5), sample_rows(x, 5))


def test_each_set_of_present_modalities_is_a_graph() -> None:
    module = MultiModalEMAQuantizer(D, L, NAMES, init="uniform")
    eager = deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="eager")
    for i, size in enumerate(sizes(4)):
        z, masks = batch(*size, seed=i)
        present = (("audio", "video"), ("video",))[i % 2]
        z, masks = ({m: x[m] for m in present} for x in (z, masks))
        assert torch.equal(compiled(z, masks).loss, eager(z, masks).loss)
    assert graphs() == 2
    agree(state(module), state(eager))


class Questions(TorchDispatchMode):
    """Counts what makes the host wait for a device, or a shape depend on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if by_mask or any(word in name for word in self.WAITING):
            self.asked[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_questions_are_heard() -> None:
    with Questions() as questions:
        x = torch.ones(3)
        float(x.sum())
        x.nonzero()
        x[x > 0]
    assert questions.asked.total() == 3


@pytest.mark.parametrize("init", ["uniform", "kmeans"])
def test_a_training_step_waits_for_nothing(init: str) -> None:
    """First codes from data ask twice, until they are there: are there codes, were there rows."""
    module = Step(cpc=True, init=init)
    with Questions() as first:
        module(*batch()).backward()
    with Questions() as later:
        module(*batch(seed=1)).backward()
    with Questions() as others:
        module.eval()(*batch(seed=2))
        module.quantizer.usage(reset=True)
    assert first.asked == ({} if init == "uniform" else {"_local_scalar_dense": 2})
    assert later.asked == {}
    assert others.asked == {}


@pytest.mark.parametrize("init", ["uniform", "kmeans", "samples"])
def test_a_training_step_needs_no_data(init: str) -> None:
    """Fake tensors have none to give."""
    with FakeTensorMode():
        module = Step(cpc=True, init=init)
        z = {m: torch.empty(B, T, D, requires_grad=True) for m in NAMES}
        masks = {m: torch.empty(B, T, dtype=torch.bool) for m in NAMES}
        loss = module(z, masks)
        loss.backward()
        assert all(x.grad is not None for x in z.values())
        for quiet in (module.quantizer.usage, module.quantizer.update_codebook):
            quiet()
        assert module.eval()(z).shape == ()


class Method(nn.Module):
    def __init__(self, quantizer: MultiModalEMAQuantizer, name: str) -> None:
        super().__init__()
        self.quantizer, self.name = quantizer, name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = getattr(self.quantizer, self.name)(x)
        return out


def test_encode_decode_and_forward_export_for_any_batch() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    quantizer(batch()[0])
    quantizer.eval()
    clips, segments = torch.export.Dim("clips"), torch.export.Dim("segments")
    free = {0: clips, 1: segments}
    x = batch()[0]["audio"].detach()
    others = {2 * B: batch(2 * B, T + 1, seed=3)[0]["audio"].detach(), 1: x[:1, :1]}
    before = state(quantizer)
    for name, example in (("encode", x), ("decode", quantizer.encode(x))):
        exported = torch.export.export(Method(quantizer, name), (example,), dynamic_shapes=(free,))
        for other in others.values():
            y = other if name == "encode" else quantizer.encode(other) - 1  # -1 among them
            assert torch.equal(exported.module()(y), getattr(quantizer, name)(y))
    whole = torch.export.export(quantizer, ({"audio": x},), dynamic_shapes=({"audio": free},))
    for other in others.values():
        out, expected = whole.module()({"audio": other}), quantizer({"audio": other})
        assert torch.equal(out.quantized["audio"], expected.quantized["audio"])
        assert torch.equal(out.indices["audio"], expected.indices["audio"])
        assert torch.equal(out.loss, expected.loss)
    agree(state(quantizer), before)
