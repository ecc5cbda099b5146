"""Code usage, metrics.json and the table, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cmg.report import code_counts, codebook_summary, table, write_metrics


def test_counts_leave_out_what_is_not_there() -> None:
    counts = code_counts({"audio": torch.tensor([[0, 2, -1], [2, 2, -1]])}, size=4)
    assert counts["audio"].tolist() == [1, 0, 3, 0]


def test_codebook_summary_by_hand() -> None:
    audio = torch.tensor([[0] * 8 + [1] * 8])
    video = torch.tensor([[0] * 8 + [2] * 8])
    assert codebook_summary({"audio": audio, "video": video}, size=5) == {
        "size": 5,
        "used": 3,
        "perplexity": pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
        "shared_fraction": pytest.approx(1 / 3),
        "per_modality": {
            "audio": {"used": 2, "perplexity": pytest.approx(2.0)},
            "video": {"used": 2, "perplexity": pytest.approx(2.0)},
        },
    }


@pytest.mark.parametrize(("few", "shared"), [(5, 0.0), (6, 1.0)])
def test_a_modality_holds_a_code_above_the_share(few: int, shared: float) -> None:
    indices = {"audio": torch.zeros(100 - few).long(), "video": torch.zeros(few).long()}
    assert codebook_summary(indices, size=1, share=0.05)["shared_fraction"] == shared


def test_no_codes_at_all() -> None:
    summary = codebook_summary({"audio": torch.full((2, 3), -1)}, size=4)
    assert (summary["used"], summary["shared_fraction"], summary["perplexity"]) == (0, 0.0, 0.0)


def metrics() -> dict[str, Any]:
    clip = {"accuracy": 0.9, "chance": 0.1, "upper_bound": 0.96, "token_accuracy": 0.88}
    sharing = {"share": 0.5, "chance": 0.03}
    segment = {
        "segment_f1": 0.6,
        "precision": 0.7,
        "recall": 0.5,
        "segment_accuracy": 0.8,
        "chance": 0.5,
        "upper_bound": 0.75,
        "upper_bound_accuracy": 1.0,
        "token_accuracy": 0.7,
    }
    return {
        "seed": 0,
        "dataset": "digits",
        "modalities": ["audio", "video"],
        "seconds": 1.5,
        "epochs": 2,
        "classification": {"audio->video": clip, "video->audio": clip | {"accuracy": 0.8}},
        "localization": {"audio->video": segment, "video->audio": segment},
        "agreement": {"audio->video": sharing, "video->audio": sharing},
        "codebook": codebook_summary({"audio": torch.tensor([0, 1])}, 4),
    }


def test_metrics_json_has_the_fields_in_order(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json", metrics())
    there = json.loads((tmp_path / "metrics.json").read_text())
    assert there == metrics()
    assert list(there)[:3] == ["dataset", "modalities", "seed"]
    assert list(there["codebook"]) == [
        "size",
        "used",
        "perplexity",
        "shared_fraction",
        "per_modality",
    ]


def test_metrics_json_takes_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write_metrics: fields must be"):
        write_metrics(tmp_path / "metrics.json", metrics() | {"extra": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_metrics(tmp_path / "metrics.json", metrics() | {"seconds": math.nan})
    assert not list(tmp_path.iterdir())


def test_the_table_line_by_line() -> None:
    clip, segment = table(metrics()).split("\n\n")
    assert [line.split() for line in clip.split("\n")] == [
        "clip accuracy chance upper bound of bound tokens same code by chance".split(),
        ["audio->video", "0.900", "0.100", "0.960", "94%", "0.880", "0.500", "0.030"],
        ["video->audio", "0.800", "0.100", "0.960", "83%", "0.880", "0.500", "0.030"],
        ["mean", "0.850", "0.100", "0.960", "89%", "0.880", "0.500", "0.030"],
    ]
    assert segment.split("\n")[1].split() == [
        *("audio->video", "0.800", "0.500", "1.000", "80%", "0.700", "0.600", "0.750"),
    ]
    assert len({len(line) for line in clip.split("\n")}) == 1


def test_the_table_with_the_reference() -> None:
    found = metrics()
    blocks = {name: found[name] for name in ("classification", "localization")}
    clip, segment = table(found, blocks | {"logistic_regression": blocks}).split("\n\n")
    assert clip.split("\n")[1].split()[6:8] == ["0.900", "0.900"]
    assert segment.split("\n")[0].split()[-4:] == ["CCA", "CCA", "+", "LR"]


def test_the_table_without_labels() -> None:
    found = table(metrics() | {"classification": {}, "localization": {}})
    note, block = found.split("\n\n")
    assert note.startswith("no labels, so there are no classifiers")
    assert [line.split() for line in block.split("\n")] == [
        ["same", "code", "by", "chance"],
        *([way, "0.500", "0.030"] for way in ("audio->video", "video->audio", "mean")),
    ]


def test_the_table_without_localization() -> None:
    assert "segment" not in table(metrics() | {"localization": {}})
