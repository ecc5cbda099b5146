"""The model and its training: parts, repeatability, and going on from a checkpoint to the bit."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from examples.conftest import before_call, interrupt
from support import same, state
from tqdm import tqdm

from cmg.batches import Batch, Batches
from cmg.checkpoint import load_checkpoint, save_checkpoint
from cmg.clips import Clips
from cmg.encoders import BatchNorm
from cmg.errors import DataError
from cmg.model import PARTS, Config, Features, UniCode
from cmg.training import CHECKPOINT, Execution, Recipe, Trainer
from mmvq.functional import code_matching

CONFIG = Config(
    {"audio": (1, 7), "video": (4, 5)}, 6, dim=16, specific_dim=8, width=8, codebook_size=24
)
RECIPE = Recipe(epochs=4, batch_size=8)
N = 27  # no multiple of the batch
FEATURES = {
    name: torch.randn(N, 6, *shape, generator=torch.Generator().manual_seed(P))
    for P, (name, shape) in enumerate(CONFIG.shapes.items())
}
BATCHES = Batches(Clips.of(FEATURES))


def trainer(folder: Path | None, seed: int = 0, config: Config = CONFIG, **recipe: Any) -> Trainer:
    torch.manual_seed(seed)
    identity = {"seed": seed, **config.json()}
    rows, held_out = torch.arange(N).split([N - 3, 3])
    settings = replace(RECIPE, **recipe)
    return Trainer(UniCode(config), BATCHES, rows, held_out, settings, folder, identity)


def fitted(folder: Path, seed: int = 0, config: Config = CONFIG) -> Trainer:
    t = trainer(folder, seed, config)
    t.fit()
    return t


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A run that nobody disturbed."""
    return fitted(tmp_path_factory.mktemp("whole"))


def test_same_seed_same_run_to_the_bit(whole: Trainer, tmp_path: Path) -> None:
    again, other = (fitted(tmp_path / str(seed), seed) for seed in (0, 1))
    assert repr(again.history) == repr(whole.history)
    assert same(state(again.model), state(whole.model))
    assert not same(state(other.model), state(whole.model))


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_bit(
    whole: Trainer, tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = trainer(tmp_path)
    middle = stopped * cut.steps + 2  # of an epoch
    monkeypatch.setattr(cut, "_step", before_call(middle, interrupt, cut._step))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()

    resumed = trainer(tmp_path)
    torch.manual_seed(99)  # what comes next must be in the checkpoint
    resumed.fit(resume=True)
    assert repr(resumed.history) == repr(whole.history)  # NaN included
    assert same(state(resumed.model), state(whole.model))


@pytest.mark.parametrize("stopped", [1, 3])  # the codebook starts in the third epoch
def test_a_chosen_codebook_size_is_kept_or_chosen_again(
    tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, codebook_size=None)
    whole = trainer(tmp_path / "whole", config=config, spread=0.5)
    whole.fit()
    cut = trainer(tmp_path / "cut", config=config, spread=0.5)
    middle = stopped * cut.steps + 2
    monkeypatch.setattr(cut, "_step", before_call(middle, interrupt, cut._step))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed = trainer(tmp_path / "cut", config=config, spread=0.5)
    resumed.fit(resume=True)
    assert resumed.model.config == whole.model.config
    assert resumed.model.config.codebook_size == resumed.model.quantizer.codebook_size
    assert same(state(resumed.model), state(whole.model))


def test_resuming_a_finished_run_changes_nothing(whole: Trainer) -> None:
    again = trainer(whole.folder)
    again.fit(resume=True)
    assert repr(again.history) == repr(whole.history)
    assert same(state(again.model), state(whole.model))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, epochs=1).fit()
    with pytest.raises(DataError, match="of another run: seed was 0, now it is 1"):
        trainer(tmp_path, seed=1, epochs=1).fit(resume=True)
    with pytest.raises(DataError, match="of another run: epochs was 1, now it is 4"):
        trainer(tmp_path).fit(resume=True)
    bound = replace(CONFIG, club="bound")  # the recipe has a setting of this name, too
    with pytest.raises(DataError, match="of another run: club was penalty, now it is bound"):
        trainer(tmp_path, config=bound, epochs=1).fit(resume=True)
    with pytest.raises(DataError, match="no such file"):
        trainer(tmp_path / "empty").fit(resume=True)
    save_checkpoint(tmp_path / CHECKPOINT, {"epoch": 1})
    with pytest.raises(DataError, match="not a checkpoint of a run"):
        trainer(tmp_path, epochs=1).fit(resume=True)


def test_a_checkpoint_from_before_a_setting_was_added_is_resumed(
    tmp_path: Path, whole: Trainer
) -> None:
    trainer(tmp_path).fit()
    state_of_run = load_checkpoint(tmp_path / CHECKPOINT)
    for added in ("recipe.accumulate", "matching"):
        del state_of_run["identity"][added]
    save_checkpoint(tmp_path / CHECKPOINT, state_of_run)
    again = trainer(tmp_path)
    again.fit(resume=True)
    assert same(state(again.model), state(whole.model))


def test_the_codebook_waits_until_features_have_spread(tmp_path: Path) -> None:
    t = trainer(tmp_path, epochs=8, spread=0.5, ramp=0.25)
    weights = []
    for t.epoch in range(8):
        weights.append(t._weights())
    assert ["commitment" in w for w in weights] == [False] * 4 + [True] * 4
    assert [w["club"] / RECIPE.club for w in weights] == [0, 0, 0, 0, 0.5, 1, 1, 1]
    assert [w["matching"] / RECIPE.matching for w in weights[4:]] == [0.5, 1, 1, 1]
    assert all(w["cpc"] == RECIPE.cpc for w in weights)


def test_a_run_of_one_epoch_has_a_codebook(tmp_path: Path) -> None:
    t = trainer(tmp_path, epochs=1)
    assert "commitment" in t.fit()
    assert t.model.quantizer.ema_codebook.initialized


@pytest.mark.parametrize(
    ("clips", "epochs"), [(1, 300), (64, 300), (200, 280), (700, 84), (2800, 40), (70_000, 8)]
)
def test_few_clips_are_seen_more_often(clips: int, epochs: int) -> None:
    """The digits have 700, and 84 epochs of 10 batches."""
    assert Recipe().lasting(clips) == Recipe(epochs=epochs)


@pytest.mark.parametrize(("most", "seen"), [(None, 6), (4, 4), (10, 6)])
def test_a_step_sees_at_most_so_many_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int | None, seen: int
) -> None:
    t = trainer(tmp_path, segments=1.0, most_segments=most)
    lengths: list[int] = []
    encode = t.model.encode

    def watched(batch: Batch) -> Features:
        lengths.append(batch.features["audio"].shape[1])
        return encode(batch)

    monkeypatch.setattr(t.model, "encode", watched)
    t._backward(BATCHES[torch.arange(8)], t._weights())
    assert lengths == [seen]


def test_a_step_sees_some_segments_the_same_of_all_modalities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = trainer(tmp_path, segments=0.5)
    seen: list[dict[str, torch.Tensor]] = []
    encode = t.model.encode
    monkeypatch.setattr(t.model, "encode", lambda x: seen.append(x.features) or encode(x))
    times = torch.arange(6.0).view(1, 6, 1, 1)
    for _ in range(5):
        x = {m: times.expand(8, 6, *shape) for m, shape in CONFIG.shapes.items()}
        t._backward(Batch(x), t._weights())
    drawn = {tuple(x["audio"][0, :, 0, 0].tolist()) for x in seen}
    assert len(drawn) > 1
    for x in seen:
        assert torch.equal(x["audio"][0, :, 0, 0], x["video"][3, :, 2, 1])
        assert x["audio"].shape[1] == 3
        assert (x["audio"][0, 1:, 0, 0] > x["audio"][0, :-1, 0, 0]).all()


def test_clips_must_be_long_enough_to_predict() -> None:
    short = replace(CONFIG, segments=2, cpc={"min_context": 2})
    with pytest.raises(DataError, match="takes 3 or more; got 2"):
        UniCode(short)
    UniCode(replace(short, without=("cpc",)))
    UniCode(replace(short, segments=3))


def test_one_clip_is_no_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two clips of split 0 or more; got 1"):
        Trainer(UniCode(CONFIG), BATCHES, torch.arange(1), torch.arange(1), RECIPE, tmp_path, {})


@pytest.mark.parametrize(("quiet", "said"), [(False, None), (True, True)])
def test_a_progress_bar_unless_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: bool, said: bool | None
) -> None:
    """Not a word on `disable` otherwise, or TQDM_DISABLE would not count."""
    bars: list[dict[str, Any]] = []

    def bar(**options: Any) -> Any:
        bars.append(options)
        return tqdm(**options)

    monkeypatch.setattr("cmg.training.tqdm", bar)
    monkeypatch.setattr(Trainer, "quiet", quiet)
    fitted(tmp_path)
    assert [options.get("disable") for options in bars] == [said]


@pytest.mark.parametrize("without", [(), *((part,) for part in PARTS), PARTS])
def test_parts_can_be_left_out(tmp_path: Path, without: tuple[str, ...]) -> None:
    t = trainer(tmp_path, config=replace(CONFIG, without=without))
    history = t.fit()
    terms = {"reconstruction", "commitment"} | (
        {"cpc", "contrast", "club", "matching"} - set(without)
    )
    assert set(history) == terms | {"codes in use", "codes shared"}
    assert all(len(values) == 4 and math.isfinite(values[-1]) for values in history.values())
    quantizer = t.model.quantizer
    joint = "mm-ema" not in without
    assert quantizer.partner == ("aligned" if joint else "none")
    assert quantizer.assignment == ("mixed" if joint else "own")
    assert (quantizer.commitment.cross_ratio > 0) == joint
    assert (quantizer.ema_codebook.reset_after is None) == ("reset" in without)


def test_code_matching_is_of_segments_or_of_clips() -> None:
    batch, found = Batch(FEATURES), {}
    for kind in ("segments", "clips"):
        torch.manual_seed(0)
        model = UniCode(replace(CONFIG, matching=kind)).eval()
        model.quantizer.set_codes(torch.randn(24, 16))
        features = model.encode(batch)
        found[kind] = model.losses(batch, features, quantize=True)["matching"]
    z, codebook = features.semantic, model.quantizer.codebook
    torch.testing.assert_close(found["clips"], code_matching(z, codebook))
    apart = {name: x.flatten(0, 1)[:, None] for name, x in z.items()}
    torch.testing.assert_close(found["segments"], code_matching(apart, codebook))


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert trainer(None, epochs=2).fit()
    assert list(tmp_path.iterdir()) == []


def test_clubs_own_step_reaches_only_club() -> None:
    model = UniCode(CONFIG)
    model.club_fit(model.encode(Batch(FEATURES)), None).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"club"}


def test_what_a_segment_holds_does_not_depend_on_its_clip() -> None:
    model = UniCode(CONFIG).eval()
    x = FEATURES["video"]
    changed = x.clone()
    changed[:, 1:] += 1
    before, after = model.semantic["video"](x), model.semantic["video"](changed)
    assert torch.equal(before[:, 0, :8], after[:, 0, :8])
    assert not torch.allclose(before[:, 0, 8:], after[:, 0, 8:])
    assert model.semantic["video"](x[:, :2]).shape == (N, 2, 16)  # any T
    torch.testing.assert_close(before.norm(dim=-1), torch.full((N, 6), CONFIG.dim**0.5))


def test_tensorboard_gets_every_epoch_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, float, int]] = []
    opened: list[tuple[Path, int]] = []

    class SummaryWriter:
        def __init__(self, folder: Path, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, epoch: int) -> None:
            written.append((name, value, epoch))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    module = ModuleType("torch.utils.tensorboard")
    vars(module)["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    t = fitted(tmp_path)
    assert opened == [(tmp_path / "tensorboard", 0)]
    assert written.pop()[0] == "closed"
    for name, values in t.history.items():
        seen = [(value, epoch) for key, value, epoch in written if key == name]
        assert seen == [(v, e) for e, v in enumerate(values) if not math.isnan(v)]


def test_steps_of_several_batches_average_gradients_and_join_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the terms that see a batch as a whole, two batches of 4 are one of 8."""
    config = replace(CONFIG, dropout=0.0, without=("club", "contrast", "cpc", "matching"))
    monkeypatch.setattr(BatchNorm, "forward", lambda self, x, mask=None: x)
    found = []
    for settings in ({"batch_size": 8}, {"batch_size": 4, "accumulate": 2}):
        alone = {"reconstruction": 0.0, "segments": 1.0, "spread": 0.0}
        t = trainer(tmp_path, config=config, epochs=1, **alone, **settings)
        t.fit()
        assert t.steps == 3
        found.append(t)
    one, two = (x.model.state_dict() for x in found)
    for name in ("quantizer.ema_codebook.counts", "quantizer.ema_codebook.codes"):
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-4)
    assert two["quantizer.ema_codebook.steps"] == one["quantizer.ema_codebook.steps"] == 3
    torch.testing.assert_close(one["semantic.audio.skip.weight"], two["semantic.audio.skip.weight"])
    assert found[0].history["commitment"] == pytest.approx(found[1].history["commitment"])


def test_a_step_of_more_clips_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 batches of 8 clips takes 32 clips of split 0; got 24"):
        trainer(tmp_path, accumulate=4)


def test_bf16_keeps_weights_and_codebook_in_float32(whole: Trainer, tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.execution = Execution(precision="bf16")
    seen: list[torch.dtype] = []
    t.model.specific["audio"].gather.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    history = t.fit()
    assert set(seen) == {torch.bfloat16}
    assert {x.dtype for x in t.model.state_dict().values() if x.is_floating_point()} == {
        torch.float32
    }
    for name in ("reconstruction", "contrast"):
        assert history[name][-1] == pytest.approx(whole.history[name][-1], rel=0.1)
    assert Execution().autocast(torch.device("cpu")).__class__ is nullcontext


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo
def test_compiled_networks_train_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the graphs of torch.compile; its code for them is torch's affair."""
    original, seen = torch.nn.Module.compile, []
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: seen.append(self) or original(self, backend="eager"),
    )
    config, recipe = replace(CONFIG, dropout=0.0), replace(RECIPE, epochs=1)
    rows, held_out = torch.arange(N).split([N - 3, 3])
    found = []
    for execution in (Execution(), Execution(compile=True)):
        torch.manual_seed(0)
        t = Trainer(UniCode(config), BATCHES, rows, held_out, recipe, tmp_path, {}, execution)
        found.append((t.fit(), t.model.state_dict()))
    assert len(seen) == 6  # an encoder of both kinds and a decoder for each modality
    (one, before), (two, after) = found
    assert before.keys() == after.keys()
    for name in ("reconstruction", "cpc", "contrast"):
        assert one[name] == pytest.approx(two[name], rel=1e-4)


def test_workers_read_the_same_batches(whole: Trainer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, held_out = torch.arange(N).split([N - 3, 3])
    identity = {"seed": 0, **CONFIG.json()}
    t = Trainer(
        UniCode(CONFIG), BATCHES, rows, held_out, RECIPE, tmp_path, identity, Execution(workers=1)
    )
    t.fit()
    assert same(state(t.model), state(whole.model))
