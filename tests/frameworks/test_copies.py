"""What torch does to a module: copies, groups, devices, modes, calls with other buffers."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parts import MODULES
from quantizers import NAMES, D, L, batch, book_of, dtypes, kinds, trained
from support import same, state, uniform
from torch import Tensor, nn

from mmvq import (
    CLUBEstimator,
    CrossCPC,
    EMACodebook,
    MultiModalEMAQuantizer,
)

# Copies and process groups


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone, which is not the default one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group([0])
    assert isinstance(group, dist.ProcessGroup)
    assert group is not dist.group.WORLD
    yield group
    if dist.is_initialized():
        dist.destroy_process_group()


def group_of(module: nn.Module) -> Any:
    return getattr(module, "ema_codebook", module).process_group


def independent(copied: nn.Module, source: nn.Module) -> bool:
    """Equal, and nothing is shared."""
    mine, theirs = state(copied), state(source)
    pointers = {x.data_ptr() for x in source.state_dict().values()}
    shared = [x for x in copied.state_dict().values() if x.data_ptr() in pointers]
    return same(mine, theirs) and not shared


@pytest.mark.parametrize("name", MODULES)
def test_a_deep_copy_keeps_the_group(group: dist.ProcessGroup, name: str) -> None:
    source = nn.Sequential(MODULES[name](process_group=group))  # a teacher of a whole model
    copied = copy.deepcopy(source)
    assert group_of(copied[0]) is group
    assert group_of(source[0]) is group
    assert independent(copied, source)
    assert copied[0].extra_repr() == source[0].extra_repr()


@pytest.mark.parametrize("name", MODULES)
def test_a_pickle_finds_the_group_again(group: dist.ProcessGroup, name: str) -> None:
    source = nn.Sequential(MODULES[name](process_group=group))
    again = pickle.loads(pickle.dumps(source))
    assert group_of(again[0]) is group
    assert group_of(source[0]) is group
    assert independent(again, source)
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    assert group_of(torch.load(file, weights_only=False)[0]) is group


@pytest.mark.parametrize("name", MODULES)
def test_a_pickle_without_its_group_falls_back(group: dist.ProcessGroup, name: str) -> None:
    source = MODULES[name](process_group=group)
    data = pickle.dumps(source)
    dist.destroy_process_group()
    with pytest.warns(UserWarning, match="process group"):
        again = pickle.loads(data)
    assert group_of(again) is None
    assert independent(again, source)


@pytest.mark.parametrize("name", MODULES)
def test_the_default_group_needs_no_name(name: str) -> None:
    source = MODULES[name]()
    for again in (pickle.loads(pickle.dumps(source)), copy.deepcopy(source)):
        assert group_of(again) is None
        assert independent(again, source)


def test_a_copied_teacher_stays_while_the_student_moves(group: dist.ProcessGroup) -> None:
    student = MultiModalEMAQuantizer(D, L, NAMES, process_group=group)
    student(batch())
    teacher = copy.deepcopy(student)
    before = state(teacher)
    student(batch(seed=1))
    assert same(state(teacher), before)
    teacher(batch(seed=1))
    assert same(state(teacher), state(student))


def test_what_waits_for_an_update_is_copied() -> None:
    quantizer = trained(update="manual")
    quantizer.update_codebook()
    quantizer(batch())
    copied = copy.deepcopy(quantizer)
    for each in (quantizer, copied):
        each.update_codebook()
    assert same(state(copied), state(quantizer))
    assert int(book_of(copied).steps) == 2


# DataParallel


def test_replicas_of_data_parallel() -> None:
    """On the first device they share the buffers: what they do there is done to the module."""
    quantizer, alone = trained(), trained()
    replica = quantizer._replicate_for_data_parallel()
    for name, module in quantizer.named_children():
        setattr(replica, name, module._replicate_for_data_parallel())
    for seed in (1, 2):
        ours, theirs = replica(batch(seed=seed)), alone(batch(seed=seed))
        assert torch.equal(ours.loss, theirs.loss)
    assert same(state(quantizer), state(alone))
    assert dtypes(quantizer) == kinds(torch.float32)


# Devices


def outputs(module: nn.Module, z: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """All that a module gives for features, and for rows x [L, D]."""
    if isinstance(module, MultiModalEMAQuantizer):
        quantized, indices, loss = module(z)
        again = module.decode(module.encode(x))
        counts = module.usage().counts
        return [*quantized.values(), *indices.values(), loss, again, *counts.values()]
    if isinstance(module, EMACodebook):
        module.initialize(x)
        module.accumulate(x, module.search(x))
        return [module.apply().weight.clone()]
    if isinstance(module, CrossCPC):
        loss, accuracy = module(z)
        return [loss, *accuracy.values()]
    if isinstance(module, CLUBEstimator):
        return [module(z["audio"], z["text"]), module.learning_loss(z["audio"], z["text"])]
    return [module(z, x)]


@pytest.mark.parametrize("name", MODULES)
def test_modules_work_where_they_live(name: str) -> None:
    """Whatever the default device is: the same outputs, gradients and states."""
    z, x = batch(), uniform(L, D, dtype=torch.float32)
    module = MODULES[name]()
    results = []
    for device in ("cpu", "meta"):
        each = copy.deepcopy(module)
        leaves = {m: y.clone().requires_grad_() for m, y in z.items()}
        torch.manual_seed(2)
        with torch.device(device):
            out = outputs(each, leaves, x)
            for y in out:
                if y.requires_grad:
                    y.sum().backward(retain_graph=True)
        grads = [y.grad for y in leaves.values() if y.grad is not None]
        assert grads or name == "codebook"
        results.append([*out, *grads, *state(each).values()])
    for found, wanted in zip(*results, strict=True):
        assert found.device.type == wanted.device.type == "cpu"
        assert torch.equal(found, wanted)


def test_resets_under_a_default_device() -> None:
    batches, states = [batch(seed=seed) for seed in range(4)], []
    for device in ("cpu", "meta"):
        torch.manual_seed(2)
        quantizer = MultiModalEMAQuantizer(D, L, NAMES, reset_after=1)
        with torch.device(device):
            for z in batches:
                quantizer(z)
        states.append(state(quantizer))
    assert same(*states)


# Inference mode


@pytest.mark.parametrize("where", ["built", "loaded", "cast", "trained"])
def test_what_inference_mode_touched_trains_on(where: str) -> None:
    """Its tensors refuse to be written to outside."""
    wanted = trained()
    with torch.inference_mode(where == "built"):
        quantizer = MultiModalEMAQuantizer(D, L, NAMES)
    with torch.inference_mode(where == "loaded"):
        quantizer.load_state_dict(state(wanted), assign=where == "loaded")
    if where == "cast":
        with torch.inference_mode():
            quantizer.double().type(torch.float32)
    with torch.inference_mode(where == "trained"):
        for each in (quantizer, wanted):
            each(batch(seed=1))
    features = {m: x.requires_grad_() for m, x in batch(seed=2).items()}
    ours, theirs = quantizer(features).loss, wanted(features).loss
    ours.backward()
    assert torch.equal(ours, theirs)
    assert same(state(quantizer), state(wanted))
    assert dtypes(quantizer) == kinds(torch.float32)


def test_evaluation_in_inference_mode_writes_nothing() -> None:
    quantizer = trained().eval()
    before = state(quantizer)
    with torch.inference_mode():
        quantizer(batch())
        quantizer.decode(quantizer.encode(batch()["audio"]))
    assert same(state(quantizer), before)


# Calls with other buffers


def test_a_call_with_other_buffers_moves_those() -> None:
    quantizer, other = trained(), trained(init="samples")
    given, own = state(other), state(quantizer)
    out = torch.func.functional_call(quantizer, given, (batch(),))
    wanted = other(batch())
    assert torch.equal(out.loss, wanted.loss)
    assert all(torch.equal(out.indices[m], wanted.indices[m]) for m in NAMES)
    assert same(given, state(other))
    assert same(state(quantizer), own)
    quantizer(batch(seed=9))  # and the module's own go on as if nothing had been
    again = trained()
    again(batch(seed=9))
    assert same(state(quantizer), state(again))


@pytest.mark.parametrize("training", [True, False])
def test_a_call_with_narrow_buffers_leaves_the_modules_own_alone(training: bool) -> None:
    quantizer = trained().train(training)
    own = state(quantizer)
    given = {n: x.half() if x.is_floating_point() else x for n, x in state(quantizer).items()}
    torch.func.functional_call(quantizer, given, (batch(),))
    assert same(state(quantizer), own)
    moved = given["ema_codebook.steps"] > own["ema_codebook.steps"]
    assert bool(moved) is training


@pytest.mark.parametrize("trained_first", [False, True])
def test_a_call_with_new_buffers_gives_them_their_own_first_codes(trained_first: bool) -> None:
    """And one with trained buffers leaves a new module new."""
    old, new = trained(), MultiModalEMAQuantizer(D, L, NAMES)
    module, lent = (old, new) if trained_first else (new, old)
    given, own = state(lent), state(module)
    torch.manual_seed(5)
    torch.func.functional_call(module, given, (batch(),))
    torch.manual_seed(5)
    lent(batch())
    assert same(given, state(lent))
    assert same(state(module), own)
    assert int(given["ema_codebook.initialized"]) == 1
    torch.manual_seed(5)
    module(batch())
    assert int(book_of(module).initialized) == 1
    assert int(book_of(module).steps) == (3 if trained_first else 1)


# Errors


class Failing(nn.Module):
    def forward(self, *_: object) -> Tensor:
        raise RuntimeError("out of memory")


def test_a_loss_that_raises_leaves_a_new_codebook_as_built() -> None:
    quantizer = MultiModalEMAQuantizer(D, L, NAMES, commitment=Failing())
    before = state(quantizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        quantizer(batch())
    assert same(state(quantizer), before)
    assert int(book_of(quantizer).initialized) == 0
    quantizer.commitment = None
    other = copy.deepcopy(quantizer)
    for each in (quantizer, other):
        torch.manual_seed(3)
        each(batch())
    assert same(state(quantizer), state(other))
    assert int(book_of(quantizer).steps) == int(book_of(quantizer).initialized) == 1


def test_a_loss_that_raises_later_leaves_the_state() -> None:
    quantizer, other = trained(), trained()
    before, commitment = state(quantizer), quantizer.commitment
    quantizer.commitment = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        quantizer(batch(seed=1))
    assert same(state(quantizer), before)
    quantizer.commitment = commitment
    for each in (quantizer, other):
        each(batch(seed=1))
    assert same(state(quantizer), state(other))
