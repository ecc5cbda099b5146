"""The report: numbers are those of the results, verdicts those of their intervals."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import figures
from experiments.claims import CLAIMS, QUESTIONS, SHARING, undecided
from experiments.matrix import EXPERIMENTS
from experiments.paper import PAPER, paper_contrast
from experiments.report import write_report
from experiments.results import (
    VERDICTS,
    Estimate,
    clips,
    contrast,
    identity,
    read_result,
    read_results,
    segments,
    write_result,
)
from experiments.train import shared_codes


def made(name: str, clip: float, segment: float) -> dict[str, Any]:
    """A run."""
    modalities = EXPERIMENTS[name].modalities
    ways = [f"{a}->{b}" for a in modalities for b in modalities if a != b]
    codes = {
        "plane": ["0 1 0 2", "1 0 0 1"],
        "counts": dict(zip(modalities, ["9 1 0 5", "1 0 0 5", "0 0 0 5"], strict=False)),
    }
    return {
        "clips": {way: {"accuracy": clip, "chance": 0.06, "upper_bound": 0.95} for way in ways},
        "segments": {way: {"segment_f1": segment, "precision": 0.9} for way in ways},
        "agreement": dict.fromkeys(ways, 0.25),
        "shared": 0.5,
        "strength": 3.0,
        "codes": codes,
        "seconds": 30.0,
    }


def write(folder: Path, name: str, runs: dict[str, Any]) -> None:
    choices = {"1.0": 0.1, "3.0": 0.3, "10.0": 0.2, "30.0": 0.0}
    experiment = EXPERIMENTS[name]
    content = {"identity": identity(experiment), "choices": choices, "runs": runs}
    write_result(folder / "results", experiment, content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All experiments: Uni-Code at 0.9 and 0.8, the others lower by 0.1, without noise."""
    for name in EXPERIMENTS:
        lower = 0.0 if name == "uni-code" else 0.1
        write(tmp_path, name, {f"{n}": made(name, 0.9 - lower, 0.8 - lower) for n in range(5)})
    return tmp_path


def test_an_interval_is_students() -> None:
    """0, 1, 2: deviation 1, so 4.303 / sqrt(3) by any table of t with two degrees of freedom."""
    found = Estimate.of([0.0, 1.0, 2.0])
    assert found.mean == 1
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert f"{found:.2f}" == "1.00 ± 2.48"
    assert f"{Estimate(0.5, 0.1, 3):+.1f}" == "+0.5 ± 0.1"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 1.2], "yes"),
        ([-1.0, -1.1, -1.2], "no"),
        ([-1.0, 1.0, 2.0], "open"),
        ([-0.001, 0.001, 0.002], "equal"),
        ([0.1, 0.1005, 0.1], "yes"),  # narrow, but not around 0
    ],
)
def test_a_verdict_is_of_the_whole_interval(values: list[float], verdict: str) -> None:
    assert Estimate.of(values).verdict == verdict
    assert Estimate.of(values[:1]).verdict == "open"  # one seed tells nothing
    assert verdict in VERDICTS


def test_a_contrast_is_taken_seed_by_seed_over_common_directions(folder: Path) -> None:
    results = read_results(folder / "results")
    for seed, level in enumerate((0.2, 0.5, 0.8)):  # seeds differ much, the difference does not
        results["avt"]["runs"][f"{seed}"] = made("avt", level + 0.1, level)
        results["uni-code"]["runs"][f"{seed}"] = made("uni-code", level, level)
    results["avt"]["runs"]["0"]["clips"]["text->audio"]["accuracy"] = 99.0  # uni-code has no text
    for seed in "34":
        del results["avt"]["runs"][seed]
    found = contrast(results, {"avt": 1, "uni-code": -1}, clips)
    assert found.seeds == 3
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert contrast(results, {"avt": 1, "uni-code": -1}, segments).mean == pytest.approx(0)


def test_a_shared_code_is_nobodys_by_80_percent() -> None:
    """Codes: audio 9 of 10, audio alone, unused, half and half."""
    counts = {"audio": torch.tensor([9, 1, 0, 5]), "video": torch.tensor([1, 0, 0, 5])}
    assert shared_codes(counts) == pytest.approx(1 / 3)


def test_the_experiments_of_open_claims_get_more_seeds(folder: Path) -> None:
    assert undecided(read_results(folder / "results")) == set()
    runs = {f"{n}": made("turn", 0.8 + 0.1 * (n - 2), 0.7) for n in range(5)}
    write(folder, "turn", runs)  # as good as the baseline, CMCM and DCID+TURN, with noise
    open_ones = undecided(read_results(folder / "results"))
    assert {"turn", "baseline", "cmcm", "dcid-turn"} == open_ones


def test_the_page_says_what_the_results_say(folder: Path) -> None:
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    lines: dict[str, str] = {}
    for line in page.splitlines():
        lines.setdefault(line.split(" | ")[0].strip("| "), line)
    assert "| Uni-Code over DCID+CMCM | +0.10 ± 0.00 | yes | +10.4 " in page
    assert re.search(r"S-MiT over the baseline \| \+0.00 ± 0.00 \| equal \|", page)
    assert lines["Uni-Code"].count("0.90 ± 0.00") == 4  # clips twice, precision twice
    assert "| 0.50 ± 0.00 | 0.25 ± 0.00 | 3 | 5 | 47.7 | 52.3 | 64.0 | 65.6" in lines["Uni-Code"]
    assert "half of the clips over all | -0.10 ± 0.00 | **no**" in page
    assert "half of the clips over all (no)" in " ".join(page.split())  # what does not repeat
    assert "is right for 0.06 of the clips" in " ".join(page.split())
    assert "Not yet run" not in page
    assert "| Uni-Code is the best (Table 1) | 5 yes | " in page
    (total,) = re.findall(r"\*\*all\*\* \| (\d+) yes.* \| (\d+) yes", page)
    assert sum(map(int, total)) == len(re.findall(r"(?<=0 \| )yes(?= \|)", page)) > 5
    for claim in [*(c for group in CLAIMS.values() for c in group), *QUESTIONS, *SHARING]:
        assert claim.text in page
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", page)
    assert len(pictures) == 7
    assert all((folder / "docs" / name).is_file() for name in pictures)
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({row.count(" | ") for row in block.splitlines() if "---" not in row}) == 1


def test_experiments_that_were_not_run_are_named_and_left_out(folder: Path) -> None:
    for path in (folder / "results").iterdir():
        if path.stem not in ("baseline", "uni-code", "without-cpc"):
            path.unlink()
    write(folder, "without-cpc", {f"{n}": made("without-cpc", 0.8, 0.7) for n in range(2)})
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    assert "Not yet run with every seed: s-mit, dcid-s-mit" in page
    assert "with Cross-CPC over without | +0.10" in page
    assert "without-cpc, " in page
    assert "CMCM over" not in page


def test_the_tables_of_tasks_appear_with_their_scores(folder: Path) -> None:
    ways = [f"{a}->{b}" for a in ("audio", "video", "text") for b in ("audio", "video", "text")]
    result = read_result(folder / "results", EXPERIMENTS["avt"])
    for run in result["runs"].values():
        run["tasks"] = {
            "across_sets": {way: {"segment_f1": 0.5} for way in ways},
            "unpaired": {
                "own->other": {way: {"accuracy": 0.2} for way in ways},
                "other->own": {way: {"accuracy": 0.4} for way in ways},
            },
            "retrieval": {way: {"r5": 0.1, "r10": 0.2, "chance_r5": 0.02} for way in ways},
        }
    write(folder, "avt", result["runs"])
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    half, third = "0.50 ± 0.00", "0.30 ± 0.00"
    assert f"| full model | {half} | {half} | {third} | {third} | 53.0 | 52.4 | 67.1" in page
    assert "## Table 5" in page
    assert "## Table 4" not in page  # nothing was segmented
    assert "## Fig. 5" not in page
    (folder / "results" / "masks-avt.png").touch()
    write_report(folder / "results", folder / "docs")
    assert "(../results/masks-avt.png)" in (folder / "docs" / "index.md").read_text()


def test_the_picture_of_claims_has_every_claim(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(figures, "write_figure", lambda figure, path: drawn.append((figure, path)))
    monkeypatch.setattr(figures, "plot_codes", lambda *_: None)
    write_report(folder / "results", folder / "docs")
    (figure,) = (figure for figure, path in drawn if path.name == "claims.png")
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    expected = [[group, *(claim.text for claim in claims)] for group, claims in CLAIMS.items()]
    assert labels == [label for group in expected for label in group]


def test_claims_name_experiments_and_the_papers_numbers() -> None:
    for group in CLAIMS.values():
        for claim in group:
            assert set(claim.weights) <= set(EXPERIMENTS)
            assert sum(claim.weights.values()) == 0
    assert PAPER["without-mm-ema"] == PAPER["dcid-cmcm"]  # Tables 1 and 2 print the same numbers
    printed = [
        claim for group in CLAIMS.values() for claim in group if paper_contrast(claim.in_paper)
    ]
    assert {c.text for group in CLAIMS.values() for c in group} - {c.text for c in printed} == {
        "128 codes over 32",
        "128 codes over 512",  # a curve, Fig. 3
    }
    assert paper_contrast({"uni-code": 1, "without-cpc": -1}) == pytest.approx((43.85, 46.6))
