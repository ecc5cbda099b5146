"""The runner: one JSON file a run, nothing twice, one failure stops nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cmg_experiments
import pytest
import torch

from cmg.checkpoint import load_model
from cmg.data import load_clips
from cmg.errors import DataError
from cmg.run import TrainedRun
from experiments import runner
from experiments.matrix import EVALUATED, EXPERIMENTS, Experiment
from experiments.results import read_results
from experiments.train import evaluate_stored, identity, read_result, train, write_result


def small(name: str, path: Path) -> Experiment:
    return replace(EXPERIMENTS[name], data=str(path), epochs=1)


def test_a_run_is_one_result_and_one_model(clips_path: Path, tmp_path: Path) -> None:
    for name in ("dcid-mst", "codis"):
        experiment = small(name, clips_path)
        train(experiment, [5], tmp_path / "results", tmp_path / "runs")
        result = read_result(tmp_path / "results" / f"{name}-seed5.json")
        assert result["identity"] == identity(experiment, 5)
        assert set(result["classification"]) == {"audio->video", "video->audio"}
        run = TrainedRun.load(
            tmp_path / "runs" / f"{name}-seed5", load_clips(clips_path, ["audio", "video"]), 5
        )
        counts = [int(n) for n in result["codes"]["counts"]["video"].split()]
        held_out = run.codes[1]["video"][run.clips.rows(2)]
        assert counts == held_out.flatten().bincount(minlength=128).tolist()
    assert set(read_results(tmp_path / "results")) == {"dcid-mst", "codis"}
    assert {p.name for p in (tmp_path / "runs" / "codis-seed5").glob("*.*")} == {
        "config.json",
        "model.safetensors",
    }


def test_seeds_of_one_process_are_as_if_alone(clips_path: Path, tmp_path: Path) -> None:
    experiment = small("dcid-cmcm", clips_path)
    train(experiment, [0, 1], tmp_path / "both", tmp_path / "runs")
    train(experiment, [1], tmp_path / "alone", tmp_path / "runs-alone")
    one, other = (
        read_result(tmp_path / folder / "dcid-cmcm-seed1.json") for folder in ("both", "alone")
    )
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    tensors, _ = load_model(tmp_path / "runs" / "dcid-cmcm-seed1")
    for name, x in load_model(tmp_path / "runs-alone" / "dcid-cmcm-seed1")[0].items():
        torch.testing.assert_close(tensors[name], x, rtol=0, atol=0)


def test_what_is_done_is_not_done_again(
    clips_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In real processes; an experiment that cannot run is named and stops no other."""
    good, bad = small("baseline", clips_path), small("uni-code", tmp_path / "nowhere.npz")
    places = (tmp_path / "results", tmp_path / "runs")
    with pytest.raises(DataError, match=r"uni-code \(exit code 1\)"):
        runner.run_missing([good, bad], [0, 1], *places, jobs=2)
    assert "nowhere.npz: no such file" in capfd.readouterr().err
    files = sorted((tmp_path / "results").iterdir())
    assert [path.name for path in files] == ["baseline-seed0.json", "baseline-seed1.json"]
    written = [path.stat().st_mtime_ns for path in files]
    runner.run_missing([good], [0, 1], *places, jobs=2)
    assert "2 of 2 runs are done; 0 to go" in capfd.readouterr().out
    assert [path.stat().st_mtime_ns for path in files] == written
    for other in (replace(good, epochs=2), replace(good, clips=60)):
        assert not runner.is_done(other, 0, tmp_path / "results")
    assert not runner.is_done(good, 2, tmp_path / "results")


def test_stored_models_are_scored_on_the_tasks_that_their_results_lack(
    clips_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small("avt-without-cpc", clips_path)
    places = (tmp_path / "results", tmp_path / "runs")
    train(experiment, [0, 1], *places)
    before = read_result(places[0] / "avt-without-cpc-seed1.json")
    fake = {name: lambda run: {"codes": len(run.codes[0])} for name in EVALUATED}
    monkeypatch.setattr("experiments.train.all_tasks", fake)
    monkeypatch.setattr("experiments.train.all_followups", {})
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(runner, "_in_processes", lambda made, jobs: calls.extend(made.values()))
    runner.evaluate_missing([experiment, small("uni-code", clips_path)], [0, 1], *places, jobs=1)
    ((function, *arguments),) = calls  # nothing more is asked of Uni-Code
    function(*arguments)
    after = read_result(places[0] / "avt-without-cpc-seed1.json")
    scored = {"across_sets": {"codes": 3}, "unpaired": {"codes": 3}}
    assert after == before | {"tasks": scored}
    calls.clear()
    runner.evaluate_missing([experiment], [0, 1], *places, jobs=1)
    assert calls == []


def test_the_command_line_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cmg_experiments.main(["--only", "uni-cod"]) == 2
    assert "--only uni-cod: no such experiment" in capsys.readouterr().err
    assert cmg_experiments.main(["--report", "--results", str(tmp_path)]) == 2
    assert "has no results" in capsys.readouterr().err
    for odd in ("0", "-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit, match="2"):
            cmg_experiments.main(["--scale", odd])
        assert "argument --scale" in capsys.readouterr().err
    for content in ('{"identity', "[" * 10**5):
        (tmp_path / "uni-code-seed0.json").write_text(content)
        for action in (["--report"], ["--only", "uni-code"]):
            assert cmg_experiments.main([*action, "--results", str(tmp_path)]) == 2
            assert "uni-code-seed0.json: not a result, or cut short" in capsys.readouterr().err


def test_without_an_action_it_says_what_is_left_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of 21 epochs took 42 s, so three of a twice as long experiment take 252."""
    experiment = EXPERIMENTS["baseline"]
    made = {"identity": identity(experiment, 0), "seconds": 2.0 * experiment.epochs}
    write_result(tmp_path / "baseline-seed0.json", made)
    arguments = ["--results", str(tmp_path), "--seeds", "0", "5", "6", "--jobs", "3"]
    assert cmg_experiments.main([*arguments, "--only", "baseline", "long-uni-code"]) == 0
    minutes = 2 * (2 * 21 + 3 * 42) / 60 / 3
    assert capsys.readouterr().out.splitlines() == [
        f"{'baseline':<28}seeds 5 6",
        f"{'long-uni-code':<28}seeds 0 5 6",
        f"1 of 6 runs are done; 5 to go, about {minutes:.0f} min with --jobs 3, by 1 results. "
        "--run starts them.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["baseline-seed0.json"]
    assert cmg_experiments.main(arguments) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:-1] == list(EXPERIMENTS)


def test_a_model_that_is_missing_is_one_line(clips_path: Path, tmp_path: Path) -> None:
    """The line that its process ends with."""
    with pytest.raises(SystemExit, match=r"^avt: .*avt-seed0: no such folder\. Hint: .*$"):
        runner._one_line_of(evaluate_stored, small("avt", clips_path), [0], tmp_path, tmp_path)


def test_a_scale_is_of_epochs(tmp_path: Path) -> None:
    (half,) = runner.pick(["uni-code"], 0.5)
    assert half.epochs == round(EXPERIMENTS["uni-code"].epochs / 2)
    assert json.dumps(identity(half, 0)) != json.dumps(identity(EXPERIMENTS["uni-code"], 0))
