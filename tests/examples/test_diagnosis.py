"""Where a run loses accuracy, on codes that lose it at a known place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cmg_diagnose
import cmg_pretrain
import pytest
import torch
from torch import Tensor

from cmg.clips import BACKGROUND, Clips
from cmg.diagnosis import STAGES, diagnose, diagnosis_table
from cmg.errors import DataError

LOSSES = {"encoder", "quantization", "crossing", "head", "tokens"}
Tensors = dict[str, Tensor]


def ideal(clips: Clips) -> tuple[Tensors, Tensors]:
    """Codes of perfect encoders, and their indices."""
    book = torch.randn(clips.num_classes + 1, 8, generator=torch.Generator().manual_seed(0))
    indices = {name: x - BACKGROUND for name, x in clips.segment_labels.items()}
    return {name: book[i] for name, i in indices.items()}, indices


@pytest.mark.parametrize("test", [False, True])
def test_nothing_is_lost_with_perfect_codes(clips: Clips, test: bool) -> None:
    codes, indices = ideal(clips)
    found = diagnose(clips, codes, codes, indices, clips.num_classes + 1, test=test)
    assert found.keys() == {"clips", "segments"}
    for ways in found.values():
        assert len(ways) == 6
        for way in ways.values():
            assert way.keys() == {*STAGES, *LOSSES}
            assert all(way[stage] == 1 for stage in set(STAGES) - {"raw"})
            assert all(way[loss] == 0 for loss in LOSSES - {"encoder"})
            assert way["encoder"] == 1 - way["raw"]


def test_the_loss_is_named_where_it_happens(clips: Clips) -> None:
    codes, indices = ideal(clips)
    noise = torch.Generator().manual_seed(1)
    spoilt = {name: torch.randn(x.shape, generator=noise) for name, x in codes.items()}
    moved = codes | {"audio": codes["audio"].roll(1, dims=-1)}

    def losses(z: Tensors, quantized: Tensors) -> dict[str, float]:
        found = diagnose(clips, z, quantized, indices, clips.num_classes + 1)
        return found["clips"]["video->audio"]

    assert losses(spoilt, codes)["encoder"] < -0.2
    assert losses(codes, spoilt)["quantization"] < -0.2
    way = losses(codes, moved)
    assert way["quantization"] == 0
    assert way["crossing"] < -0.2


def test_cross_validation_reads_nothing_of_splits_0_and_2(clips: Clips) -> None:
    codes, indices = ideal(clips)
    first = diagnose(clips, codes, codes, indices, clips.num_classes + 1)
    for split in (0, 2):
        for x in codes.values():
            x[clips.rows(split)] = torch.nan
    assert diagnose(clips, codes, codes, indices, clips.num_classes + 1) == first


def test_too_few_clips_to_cross_validate(clips: Clips) -> None:
    codes, indices = ideal(clips)
    split = clips.split.clone()
    split[clips.rows(1)[2:]] = 0
    few = dataclasses.replace(clips, split=split)
    with pytest.raises(DataError, match="too few clips of audio for cross-validation"):
        diagnose(few, codes, codes, indices, clips.num_classes + 1)
    assert diagnose(few, codes, codes, indices, clips.num_classes + 1, test=True)


def test_the_table_has_a_line_for_each_direction_and_the_mean(clips: Clips) -> None:
    codes, indices = ideal(clips)
    found = diagnose(clips, codes, codes, indices, clips.num_classes + 1)
    of_clips, of_segments = diagnosis_table(found).split("\n\n")
    assert [line.split()[0] for line in of_clips.split("\n")] == ["clips", *found["clips"], "mean"]
    assert len({len(line) for line in of_segments.split("\n")}) == 1
    assert of_clips.split("\n")[-1].split()[-4:] == ["+0.000"] * 4


def test_the_command_takes_a_run_apart(
    clips_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = ["--data", str(clips_path)], str(tmp_path / "run")
    assert cmg_pretrain.main([*data, "--output", run, "--epochs", "2"]) == 0
    capsys.readouterr()
    assert cmg_diagnose.main([run, *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert cmg_diagnose.main([run, *data, "--test", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)
    assert found.keys() == tested.keys() == {"clips", "segments"}
    for way, scores in metrics["classification"].items():
        assert tested["clips"][way]["codes across"] == pytest.approx(scores["accuracy"])
        assert tested["clips"][way]["tokens across"] == pytest.approx(scores["token_accuracy"])
    assert cmg_diagnose.main([run, *data]) == 0
    assert "quantization" in capsys.readouterr().out
    assert cmg_diagnose.main([str(tmp_path), *data]) == 2
    assert capsys.readouterr().err.startswith("cmg_diagnose: ")
