"""The runner: choices before tests, nothing twice, and one failure stops nothing else."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmg_experiments
import numpy as np
import pytest

from cmg import digits
from cmg.clips import PRETRAIN, TEST, TRAIN, VALIDATION, Clips
from cmg.data import load_clips
from cmg.digits.style import NUMBERS
from cmg.errors import DataError
from experiments import runner, train
from experiments.matrix import CLIPS, EXPERIMENTS, STRENGTHS, TASK_SEEDS
from experiments.results import identity, read_result, write_result
from experiments.runner import CHOICE, MORE_SEEDS, SEEDS, Run

WAYS = ("audio->video", "video->audio")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    path = tmp_path_factory.mktemp("numbers") / "numbers.npz"
    np.savez(path, **digits.render(4, clips=(20, 42, 21, 22), style=NUMBERS))
    return load_clips(path)


@pytest.fixture
def small(numbers: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clips, and two epochs."""
    monkeypatch.setattr(train, "_numbers", lambda seed: numbers)
    monkeypatch.setattr(train, "EPOCHS", 2)


@pytest.mark.usefixtures("small")
def test_a_run_is_the_same_again_and_has_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    one, again, other = (train.measure("dcid-turn", 3.0, seed) for seed in (5, 5, 6))
    assert {**one, "seconds": 0} == {**again, "seconds": 0}
    assert one["segments"] != other["segments"]
    assert set(one["clips"]) == set(one["segments"]) == set(one["agreement"]) == set(WAYS)
    assert set(one["clips"]["audio->video"]) == {"accuracy", "chance", "upper_bound"}
    assert not {"tasks", "codes"} & set(one)
    monkeypatch.setattr(train, "all_tasks", {"across_sets": lambda run: {"seed": run.seed}})
    monkeypatch.setattr(train, "all_followups", {"unpaired": lambda run: {"n": len(run.codes[0])}})
    three = train.measure("avt-without-cpc", 1.0, 2)
    assert three["tasks"] == {"across_sets": {"seed": 2}, "unpaired": {"n": 3}}
    assert "tasks" not in train.measure("avt-without-cpc", 1.0, 2, VALIDATION)
    assert "tasks" not in train.measure("avt-without-cpc", 1.0, TASK_SEEDS)
    counts = train.measure("uni-code", 1.0, 0)["codes"]["counts"]
    assert {sum(map(int, n.split())) for n in counts.values()} == {21 * 10}  # of the test


def test_a_choice_is_tested_on_split_3_and_a_test_on_split_2(numbers: Clips) -> None:
    for split in (TEST, VALIDATION):
        found = train._select(numbers, EXPERIMENTS["baseline"], split)
        assert found.rows(TEST).tolist() == numbers.rows(split).tolist()
        assert found.rows(PRETRAIN, TRAIN).tolist() == numbers.rows(PRETRAIN, TRAIN).tolist()
        assert not len(found.rows(VALIDATION))
        assert found.modalities == ("audio", "video")


def test_fewer_clips_are_the_first_and_take_as_many_steps(numbers: Clips) -> None:
    fewer = replace(EXPERIMENTS["clips-300"], clips=15)
    found = train._select(numbers, fewer, TEST)
    assert found.rows(PRETRAIN).tolist() == numbers.rows(PRETRAIN)[:15].tolist()
    for experiment in EXPERIMENTS.values():
        steps = experiment.clips // 64  # of an epoch
        assert train.recipe(experiment).epochs * steps == train.EPOCHS * (CLIPS // 64)


def test_only_choices_are_made_on_split_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure", lambda *arguments: arguments)
    assert runner._measure(Run("cmcm", 3.0, CHOICE), tmp_path)[3] == VALIDATION
    for seed in (*SEEDS, *MORE_SEEDS):
        assert runner._measure(Run("cmcm", 3.0, seed), tmp_path)[3] == TEST
    assert CHOICE not in (*SEEDS, *MORE_SEEDS)


def fake(run: Run, folder: Path) -> dict[str, Any]:
    """In place of a training, in its process."""
    if run in (("uni-code", STRENGTHS[-1], 1), ("cmcm", STRENGTHS[0], CHOICE)):
        raise DataError("the disk is full.")
    if run == ("mst", STRENGTHS[0], CHOICE):
        os.kill(os.getpid(), signal.SIGKILL)
    score = run.strength if run.choosing else run.seed / 10 + len(run.name)
    return {
        "clips": {way: {"accuracy": score, "upper_bound": 1.0} for way in WAYS},
        "segments": {way: {"segment_f1": -run.strength / 2} for way in WAYS},
        "strength": run.strength,
        "seconds": 60.0,
    }


def test_choices_come_first_and_a_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In real processes; a second call does what is missing, and nothing again.

    CMCM lacks a choice and is not tested.
    """
    monkeypatch.setattr(runner, "_measure", fake)
    chosen = runner.pick(["baseline", "uni-code", "cmcm"])
    with pytest.raises(DataError, match=rf"above: cmcm \(seed {CHOICE}\), uni-code \(seed 1\)"):
        runner.run_missing(chosen, tmp_path, jobs=2)
    assert "uni-code, strength 30, seed 1: failed: the disk is full." in capsys.readouterr().out
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["baseline.json", "cmcm.json", "uni-code.json"]
    one, two, three = (read_result(tmp_path, experiment) for experiment in chosen)
    assert (len(three["choices"]), three["runs"]) == (len(STRENGTHS) - 1, {})
    expected = {str(x): pytest.approx(x / 4) for x in STRENGTHS}  # means of x, x, -x/2 and -x/2
    assert one["choices"] == two["choices"] == expected
    assert list(one["runs"]) == [str(seed) for seed in SEEDS]
    assert list(two["runs"]) == [str(seed) for seed in SEEDS if seed != 1]
    assert {run["strength"] for run in two["runs"].values()} == {max(STRENGTHS)}
    capsys.readouterr()
    with pytest.raises(DataError, match="seed 1"):
        runner.run_missing(chosen[:2], tmp_path, jobs=1)
    assert "testing: 1 runs" in capsys.readouterr().out
    assert json.loads((tmp_path / "baseline.json").read_text())["runs"] == one["runs"]


def test_a_killed_process_costs_its_own_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_measure", fake)
    chosen = runner.pick(["mst", "baseline", "baseline"])
    assert [experiment.name for experiment in chosen] == ["mst", "baseline"]
    with pytest.raises(DataError, match=rf"above: mst \(seed {CHOICE}\)$"):
        runner.run_missing(chosen, tmp_path, jobs=1)
    assert len(read_result(tmp_path, chosen[1])["runs"]) == len(SEEDS)


def test_open_claims_get_more_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[Run]] = []
    monkeypatch.setattr(runner, "_in_processes", lambda _, runs, *__: asked.append([*runs]) or [])
    names = ["uni-code", "without-club", "baseline"]
    for n, name in enumerate(names):
        experiment = EXPERIMENTS[name]
        runs = {}
        for seed in SEEDS:
            noise = 0.1 * (seed - 2) * (name == "without-club")
            runs[str(seed)] = fake(Run(name, STRENGTHS[0], 2), tmp_path)
            for way in WAYS:
                runs[str(seed)]["clips"][way]["accuracy"] = noise
                runs[str(seed)]["segments"][way]["segment_f1"] = n
        choices = dict.fromkeys(map(str, STRENGTHS), 0.5)
        content = {"identity": identity(experiment), "choices": choices, "runs": runs}
        write_result(tmp_path, experiment, content)
    runner.run_missing(runner.pick(names), tmp_path, jobs=1)
    first, second, third = asked
    assert first == second == []
    more = [Run(name, STRENGTHS[0], seed) for seed in MORE_SEEDS for name in names[:2]]
    assert third == more  # of equal choices the lowest strength
    for name in names[:2]:  # whatever one more seed says
        result = read_result(tmp_path, EXPERIMENTS[name])
        result["runs"]["5"] = result["runs"]["4"]
        write_result(tmp_path, EXPERIMENTS[name], result)
    runner.run_missing(runner.pick(names), tmp_path, jobs=1)
    assert asked[-1] == [run for run in more if run.seed != 5]


def test_results_of_other_settings_do_not_count(tmp_path: Path) -> None:
    experiment = EXPERIMENTS["baseline"]
    content = {"identity": identity(experiment), "choices": {"1.0": 0.5}, "runs": {}}
    write_result(tmp_path, experiment, content)
    assert read_result(tmp_path, experiment) == content
    assert len(runner.to_choose([experiment], tmp_path)) == len(STRENGTHS) - 1
    content["identity"] = {**identity(experiment), "code": 1}
    write_result(tmp_path, experiment, content)
    assert read_result(tmp_path, experiment)["choices"] == {}
    runs = runner.to_choose([experiment], tmp_path)
    assert [*runs] == [Run("baseline", x, CHOICE) for x in STRENGTHS]
    content["identity"] = identity(experiment)
    content["choices"] = dict(zip(map(str, STRENGTHS), (1.0, 3.0, 2.0, 2.0), strict=True))
    runs = {seed: fake(Run("baseline", 3.0 + seed, seed), tmp_path) for seed in (0, 1)}
    content["runs"] = {str(seed): run for seed, run in runs.items()}
    write_result(tmp_path, experiment, content)
    assert list(read_result(tmp_path, experiment)["runs"]) == ["0"]  # 1 is of another strength


def test_the_command_line_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cmg_experiments.main(["--only", "uni-cod"]) == 2
    assert "--only uni-cod: no such experiment" in capsys.readouterr().err
    assert cmg_experiments.main(["--report", "--results", str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err
    whole = {"identity": identity(EXPERIMENTS["uni-code"]), "choices": {}, "runs": {}}
    odd = ({"choices": 1}, {"choices": {"1.0": None}}, {"runs": {"0": {}}}, {"runs": {"0": 1}})
    for content in ('{"identity', "[" * 10**5, "[]", *(json.dumps(whole | x) for x in odd)):
        (tmp_path / "uni-code.json").write_text(content)
        for action in (["--report"], ["--only", "uni-code"], ["--run", "--only", "uni-code"]):
            assert cmg_experiments.main([*action, "--results", str(tmp_path)]) == 2
            assert "uni-code.json: not a result, or cut short" in capsys.readouterr().err


def test_without_an_action_it_says_what_is_left_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = EXPERIMENTS["baseline"]
    runs = {"0": fake(Run("baseline", 3.0, 0), tmp_path)}
    content = {"identity": identity(experiment), "choices": {"1.0": 0.5}, "runs": runs}
    write_result(tmp_path, experiment, content)
    arguments = ["--results", str(tmp_path), "--jobs", "3"]
    assert cmg_experiments.main([*arguments, "--only", "baseline", "uni-code"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{'baseline':<28}1 of 4 choices, 1 seeds",
        f"{'uni-code':<28}0 of 4 choices, 0 seeds",
        "16 runs to go, about 5 min with --jobs 3. --run starts them.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["baseline.json"]
    assert cmg_experiments.main(arguments) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:-1] == list(EXPERIMENTS)
