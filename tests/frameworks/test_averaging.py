"""Averages of weights, of torch and of Lightning: o and N are averaged, and e follows from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import close, rounding, same, state, uniform
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from mmvq import EMACodebook, MultiModalEMAQuantizer
from mmvq.averaging import settle_averaged
from mmvq.functional import laplace_smoothing

NAMES = ("audio", "video")
B, T, D, L, STEPS = 5, 6, 3, 4, 6
KEEP, EPS, SCALE = 0.75, 1e-5, 64.0
INTEGERS = ("ages", "usage", "steps", "initialized")


class Norm(nn.Module):
    """As `nn.BatchNorm1d`, without its integer, which one of torch's own averages refuses."""

    running_mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.register_buffer("running_mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
        return (x - self.running_mean) * self.weight


class Model(nn.Module):
    """Two codebooks of two sizes, beside parameters and buffers that are averaged as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.quantizer = MultiModalEMAQuantizer(
            D, L, NAMES, decay=0.5, reset_after=None, init="samples"
        )
        self.book = EMACodebook(D, L + 1, decay=0.5, init="samples")

    def forward(self, seed: int) -> Tensor:
        x = uniform(B, T, D, dtype=torch.float32, seed=seed) + 0.1 * seed
        z = self.norm(x.flatten(0, 1)).unflatten(0, (B, T))
        if self.training:
            self.book.initialize(z)
            self.book.accumulate(z, self.book.search(z))
            self.book.apply()
        loss: Tensor = self.quantizer({"audio": z, "video": x}).loss
        return loss


State = dict[str, Tensor]
Average = Callable[[Tensor, Tensor, int], Tensor]  # of the average, the newest and how many


def mean(average: Tensor, newest: Tensor, count: int) -> Tensor:
    return average + (newest - average) / (count + 1)


def ema(average: Tensor, newest: Tensor, count: int) -> Tensor:
    return KEEP * average + (1 - KEEP) * newest


WAYS: dict[str, tuple[dict[str, Any], Average]] = {
    "default": ({}, mean),
    "swa": ({"avg_fn": get_swa_avg_fn()}, mean),
    "swa, many at once": ({"multi_avg_fn": get_swa_multi_avg_fn()}, mean),
    "ema": ({"avg_fn": get_ema_avg_fn(KEEP)}, ema),
    "ema, many at once": ({"multi_avg_fn": get_ema_multi_avg_fn(KEEP)}, ema),
}


def is_mean(name: str) -> bool:
    """Whether a buffer has a mean that says something."""
    return name.endswith((".sums", ".counts", ".running_mean"))


def check(now: State, states: list[State], average: Average) -> None:
    """`now` is the average of these states, to the rounding of float32 on values below SCALE.

    Each update rounds at most four times. e is a quotient of sums and of counts that a sum of at
    most L + 1 terms has smoothed; o and N are those of the average, as they stand in float32.
    """
    newest = states[-1]
    assert now.keys() == newest.keys()
    for name in filter(is_mean, now):
        wanted = states[0][name].double()
        for count, x in enumerate(states[1:], 1):
            wanted = average(wanted, x[name].double(), count)
        assert wanted.abs().max() < SCALE
        close(now[name], wanted, rounding(torch.float32, 4 * len(states), SCALE))
        assert not torch.equal(now[name], newest[name])
    books = [name.removesuffix(".codes") for name in now if name.endswith(".codes")]
    assert len(books) == 2  # names
    for book in books:
        for name in (f"{book}.{each}" for each in INTEGERS):
            assert torch.equal(now[name], newest[name]), name
            assert now[name].dtype == torch.int64
        counts, sums = now[f"{book}.counts"].double(), now[f"{book}.sums"].double()
        assert (counts > 0.01).all()
        wanted = sums / laplace_smoothing(counts, EPS)[:, None]
        assert wanted.abs().max() < SCALE
        close(now[f"{book}.codes"], wanted, rounding(torch.float32, L + 8, SCALE))


@pytest.mark.parametrize("way", WAYS)
def test_averages_of_all_buffers(way: str) -> None:
    options, average = WAYS[way]
    averages_of_all_buffers(options, average)


def test_averages_of_all_buffers_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the default is another function of torch."""
    monkeypatch.setattr(swa_utils, "_get_foreach_kernels_supported_devices", lambda: ["cpu"])
    averages_of_all_buffers({}, mean)


def averages_of_all_buffers(options: dict[str, Any], average: Average) -> None:
    model, states = Model(), []
    averaged = AveragedModel(model, use_buffers=True, **options)
    for seed in range(1, STEPS + 1):
        model(seed)
        before = state(model)
        averaged.update_parameters(model)
        states.append(state(model))
        assert same(states[-1], before)  # the newest model is only read
        if seed > 1:
            check(state(averaged.module), states, average)
    assert int(averaged.n_averaged) == STEPS
    assert list(state(averaged.module)) == list(states[-1])  # in the same order as ever
    assert inside(averaged).quantizer.ema_codebook.steps == STEPS


def inside(averaged: AveragedModel) -> Any:
    return averaged.module


def books(model: nn.Module) -> list[EMACodebook]:
    return [module for module in model.modules() if isinstance(module, EMACodebook)]


def idle() -> Model:
    """Code 0 of each has not been chosen for a while: it kept its e, which is not o over N."""
    model = Model()
    for seed in (1, 2):
        model(seed)
    for book in books(model):
        book.set_codes(torch.cat([torch.full((1, D), 50.0), book.codes[1:]]))
    for seed in (3, 4, 5, 6, 7):
        model(seed)
    for book in books(model):
        assert torch.equal(book.codes[0], torch.full((D,), 50.0))
        e = book.sums[0] / laplace_smoothing(book.counts, EPS)[0]
        assert not torch.allclose(e, book.codes[0], rtol=1e-6)
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_first_average_is_a_copy(way: str) -> None:
    model = Model()
    averaged = AveragedModel(model, use_buffers=True, **WAYS[way][0])
    trained = idle()
    averaged.update_parameters(trained)
    assert same(state(averaged.module), state(trained))


@pytest.mark.parametrize("way", WAYS)
def test_without_use_buffers_the_codebook_is_the_newest(way: str) -> None:
    model = Model()
    averaged = AveragedModel(model, **WAYS[way][0])
    for newest in (model, idle(), idle()):
        averaged.update_parameters(newest)
        ours, theirs = state(averaged.module), state(newest)
        assert same(
            {n: x for n, x in ours.items() if "norm" not in n},
            {n: x for n, x in theirs.items() if "norm" not in n},
        )


def test_a_code_that_has_faded_keeps_its_place() -> None:
    """Once N of code 0 is below what smoothing adds to it, e is the average of 50, 50, ..."""
    model = idle()
    averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(KEEP))
    for seed in range(100):
        model(seed % 7)
        averaged.update_parameters(model)
    for theirs, ours in zip(books(model), books(averaged.module), strict=True):
        assert theirs.counts[0] < ours.counts[0] < EPS**2
        assert torch.equal(theirs.codes[0], torch.full((D,), 50.0))
        close(ours.codes[0], theirs.codes[0], 50 * KEEP**40)  # it faded 40 steps ago, or more


@pytest.mark.parametrize("around", ["averaged", "newest"])
def test_a_wrapper_on_one_side_only(around: str) -> None:
    """As DDP is: the codebooks are paired by their order, as torch pairs the buffers."""
    model, states = Model(), []
    wrapped = nn.DataParallel(model)
    averaged = AveragedModel(wrapped if around == "averaged" else model, use_buffers=True)
    for seed in (1, 2, 3):
        model(seed)
        averaged.update_parameters(wrapped if around == "newest" else model)
        states.append(state(model))
    average = inside(averaged).module if around == "averaged" else averaged.module
    check(state(average), states, mean)


def test_a_subclass_that_says_when() -> None:
    class EveryOther(AveragedModel):
        calls = 0

        def update_parameters(self, model: nn.Module) -> None:
            self.calls += 1
            if self.calls % 2:
                super().update_parameters(model)

    model, states = Model(), []
    averaged = EveryOther(model, use_buffers=True)
    for seed in (1, 2, 3, 4, 5):
        model(seed)
        averaged.update_parameters(model)
        if seed % 2:
            states.append(state(model))
    check(state(averaged.module), states, mean)


def test_models_without_a_codebook_are_averaged_as_ever() -> None:
    norm = Norm()
    model = nn.Sequential(nn.Linear(D, D), norm)
    averaged = AveragedModel(model, use_buffers=True)
    sums = torch.zeros(D, dtype=torch.float64)
    for seed in range(STEPS):
        model(uniform(B, D, dtype=torch.float32, seed=seed))
        averaged.update_parameters(model)
        sums += norm.running_mean
    close(inside(averaged)[1].running_mean, sums / STEPS, rounding(torch.float32, 4 * STEPS))


def test_an_average_of_ones_own() -> None:
    """Over the floating point buffers, as EMA callbacks outside torch write it."""
    model, states = Model(), []
    teacher = copy.deepcopy(model)
    for count in range(STEPS):
        model(count + 1)
        states.append(state(model))
        for mine, theirs in zip(teacher.buffers(), model.buffers(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs, 1 - KEEP if count else 1.0)
        settle_averaged(teacher, model)
    check(state(teacher), states, ema)
    before = state(teacher)
    with pytest.raises(ValueError, match=r"codebook|shorter"):
        settle_averaged(teacher, model.book)
    assert same(state(teacher), before)


def test_the_average_trains_on() -> None:
    """It is a codebook like any other: one step of it is Eq. 7."""
    model = Model()
    averaged = AveragedModel(model, use_buffers=True)
    for seed in (1, 2, 3):
        model(seed)
        averaged.update_parameters(model)
    book = inside(averaged).quantizer.ema_codebook
    book.accumulate(uniform(1, D, dtype=torch.float32), torch.tensor([1]))
    book.apply()
    assert int(book.steps) == 4
    smoothed = laplace_smoothing(book.counts.double(), book.eps)
    close(book.codes[1], book.sums[1].double() / smoothed[1], rounding(torch.float32, L + 8, 4.0))


# Lightning


def lightning() -> Any:
    return pytest.importorskip("lightning")


BATCHES, EPOCHS = 5, 2
quiet = pytest.mark.filterwarnings(  # Lightning about itself
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:The dirpath has changed",
)


def module(seen: dict[str, list[State]]) -> Any:
    """What each training batch left, and what validation found, is put into `seen`."""

    class Module(lightning().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Model()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(int(batch[0]))
            return loss

        def on_train_batch_end(self, *_: Any) -> None:
            seen["trained"].append(state(self.model))

        def validation_step(self, batch: list[Tensor], index: int) -> None:
            self.model(int(batch[0]))
            seen["validated"].append(state(self.model))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def fit(
    callback: Any, folder: Path, epochs: int = EPOCHS, resume: Path | None = None
) -> tuple[nn.Module, dict[str, list[State]]]:
    """The model that fit leaves; a checkpoint is in `folder` after each epoch."""
    seen: dict[str, list[State]] = {"trained": [], "validated": []}
    seeds = torch.utils.data.TensorDataset(torch.arange(1, BATCHES + 1))
    loader = torch.utils.data.DataLoader(seeds)
    from lightning.pytorch.callbacks import ModelCheckpoint

    ours = module(seen)
    trainer = lightning().Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
        num_sanity_val_steps=0,
    )
    trainer.fit(ours, loader, loader, ckpt_path=resume)
    return ours.model, seen


def callback(way: str) -> Any:
    from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

    return WeightAveraging() if way == "mean" else EMAWeightAveraging(decay=KEEP)


@quiet
@pytest.mark.parametrize("way", ["mean", "ema"])
def test_lightning_averages(tmp_path: Path, way: str) -> None:
    """Validation finds the average, training goes on without it, fit leaves it, a file holds it."""
    lightning()
    average = mean if way == "mean" else ema
    model, seen = fit(callback(way), tmp_path)
    trained, validated = seen["trained"], seen["validated"]
    assert len(trained) == len(validated) == EPOCHS * BATCHES
    for epoch in range(EPOCHS):
        last = (epoch + 1) * BATCHES
        check(validated[last - 1], trained[:last], average)
        file = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        for now, key in ((trained[last - 1], "current_model_state"), (validated[-1], "state_dict")):
            if key == "current_model_state" or epoch == EPOCHS - 1:
                found = {n.removeprefix("model."): x for n, x in file[key].items()}
                assert same(found, now)
    assert same(state(model), validated[-1])
    assert [int(x["book.steps"]) for x in trained] == [*range(1, EPOCHS * BATCHES + 1)]


@quiet
@pytest.mark.parametrize("way", ["mean", "ema"])
def test_lightning_resumes_an_average(tmp_path: Path, way: str) -> None:
    lightning()
    whole, _ = fit(callback(way), tmp_path)
    resumed, seen = fit(callback(way), tmp_path / "2", resume=tmp_path / "epoch=0.ckpt")
    assert len(seen["trained"]) == BATCHES
    assert same(state(resumed), state(whole))


@quiet
def test_lightning_that_never_averaged_leaves_a_new_codebook(tmp_path: Path) -> None:
    """Its copy is from before the first batch: the next training starts from data again."""
    lightning()
    from lightning.pytorch.callbacks import EMAWeightAveraging

    late = EMAWeightAveraging(decay=KEEP, update_starting_at_step=1000)
    model, seen = fit(late, tmp_path, epochs=1)
    assert [int(x["book.steps"]) for x in seen["trained"]] == [*range(1, BATCHES + 1)]
    for book in books(model):
        assert int(book.steps) == int(book.initialized) == 0
    model.train()(3)
    for book in books(model):
        assert int(book.steps) == int(book.initialized) == 1
        assert (book.codes.norm(dim=1) > 0.05).all()  # data, where the start was within 1 / L
