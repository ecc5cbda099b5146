"""The report: numbers are those of the results, verdicts those of their intervals."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from experiments.claims import CLAIMS, QUESTIONS, SHARING
from experiments.matrix import EXPERIMENTS
from experiments.paper import PAPER, paper_contrast
from experiments.report import write_report
from experiments.results import Estimate, clips, contrast, read_results, segments, shared_codes
from experiments.train import identity, read_result, run_name, write_result


def result(name: str, seed: int, clip: float, segment: float) -> dict[str, Any]:
    experiment = EXPERIMENTS[name]
    ways = [f"{a}->{b}" for a in experiment.modalities for b in experiment.modalities if a != b]
    counts = ["9 1 0 5", "1 0 0 5", "0 0 0 5", "0 0 0 5"]
    return {
        "identity": identity(experiment, seed),
        "classification": {way: {"accuracy": clip, "chance": 0.1} for way in ways},
        "localization": {way: {"segment_f1": segment, "precision": 0.9} for way in ways},
        "codes": {
            "plane": ["0 1 0 2", "1 0 0 1"],
            "counts": dict(zip(experiment.modalities, counts, strict=False)),
        },
        "seconds": 30.0,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All experiments: Uni-Code at 0.9 and 0.8, the others lower by 0.1, without noise."""
    for name, experiment in EXPERIMENTS.items():
        for seed in range(3):
            lower = 0.0 if name == "uni-code" else 0.1
            made = result(name, seed, 0.9 - lower, 0.8 - lower)
            write_result(tmp_path / "results" / f"{run_name(experiment, seed)}.json", made)
    return tmp_path


def test_an_interval_is_students() -> None:
    """0, 1, 2: deviation 1, so 4.303 / sqrt(3) by any table of t with two degrees of freedom."""
    found = Estimate.of([0.0, 1.0, 2.0])
    assert found.mean == 1
    assert found.half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert f"{found:.2f}" == "1.00 ± 2.48"
    assert f"{Estimate(0.5, 0.1, 3):+.1f}" == "+0.5 ± 0.1"


@pytest.mark.parametrize(
    ("values", "sign"), [([1.0, 1.1, 1.2], 1), ([-1.0, -1.1, -1.2], -1), ([-1.0, 1.0, 2.0], 0)]
)
def test_a_verdict_needs_the_whole_interval(values: list[float], sign: int) -> None:
    assert Estimate.of(values).sign == sign
    assert Estimate.of(values[:1]).sign == 0  # one seed tells nothing


def test_a_contrast_is_taken_seed_by_seed_over_common_directions(folder: Path) -> None:
    results = read_results(folder / "results")
    for seed, level in enumerate((0.2, 0.5, 0.8)):  # seeds differ much, the difference does not
        results["avt"][seed] = result("avt", seed, level + 0.1, level)
        results["uni-code"][seed] = result("uni-code", seed, level, level)
    results["avt"][0]["classification"]["text->audio"]["accuracy"] = 99.0  # uni-code has no text
    found = contrast(results, {"avt": 1, "uni-code": -1}, clips)
    assert found.mean == pytest.approx(0.1)
    assert found.half == pytest.approx(0, abs=1e-9)
    assert contrast(results, {"avt": 1, "uni-code": -1}, segments).mean == pytest.approx(0)


def test_a_shared_code_is_nobodys_by_80_percent() -> None:
    """Codes: audio 9 of 10, audio alone, unused, half and half."""
    assert shared_codes(result("uni-code", 0, 0.5, 0.5)) == pytest.approx(1 / 3)


def test_the_page_says_what_the_results_say(folder: Path) -> None:
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    lines: dict[str, str] = {}
    for line in page.splitlines():
        lines.setdefault(line.split(" | ")[0].strip("| "), line)
    assert "| Uni-Code over DCID+CMCM | +0.10 ± 0.00 | yes | +10.4 " in page
    assert re.search(r"S-MiT over the baseline \| \+0.00 ± 0.00 \| open \|", page)
    assert lines["Uni-Code"].count("0.90 ± 0.00") == 4  # clips twice, precision twice
    assert "47.7 | 52.3 | 64.0 | 65.6" in lines["Uni-Code"]
    assert "half of the clips over all | -0.10 ± 0.00 | **no**" in page
    assert "Not yet run" not in page
    assert "| Uni-Code is the best (Table 1) | 5 yes | " in page
    (total,) = re.findall(r"\*\*all\*\* \| (\d+) yes.* \| (\d+) yes", page)
    assert sum(map(int, total)) == len(re.findall(r"(?<=0 \| )yes(?= \|)", page)) > 5
    for claim in [*(c for group in CLAIMS.values() for c in group), *QUESTIONS, *SHARING]:
        assert claim.text in page
    pictures = re.findall(r"\]\(([\w-]+\.png)\)", page)
    assert len(pictures) == 5
    assert all((folder / "docs" / name).is_file() for name in pictures)
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({row.count(" | ") for row in block.splitlines() if "---" not in row}) == 1


def test_experiments_that_were_not_run_are_named_and_left_out(folder: Path) -> None:
    for path in (folder / "results").iterdir():
        if not path.name.startswith(("baseline-", "uni-code-", "without-cpc-")):
            path.unlink()
    (folder / "results" / "without-cpc-seed2.json").unlink()
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    assert "Not yet run with every seed: s-mit, dcid-s-mit" in page
    assert "with Cross-CPC over without | +0.10" in page
    assert "without-cpc, " in page
    assert "CMCM over" not in page


def test_the_tables_of_tasks_appear_with_their_scores(folder: Path) -> None:
    ways = [f"{a}->{b}" for a in ("audio", "video", "text") for b in ("audio", "video", "text")]
    for seed in range(3):
        path = folder / "results" / f"avt-seed{seed}.json"
        tasks = {
            "across_sets": {way: {"segment_f1": 0.5} for way in ways},
            "unpaired": {
                "own->other": {way: {"accuracy": 0.2} for way in ways},
                "other->own": {way: {"accuracy": 0.4} for way in ways},
            },
            "retrieval": {way: {"r5": 0.1, "r10": 0.2, "chance_r5": 0.02} for way in ways},
        }
        write_result(path, read_result(path) | {"tasks": tasks})
    write_report(folder / "results", folder / "docs")
    page = (folder / "docs" / "index.md").read_text()
    half, third = "0.50 ± 0.00", "0.30 ± 0.00"
    assert f"| full model | {half} | {half} | {third} | {third} | 53.0 | 52.4 | 67.1" in page
    assert "## Table 5" in page
    assert "## Table 4" not in page  # nothing was segmented
    assert "## Fig. 5" not in page
    (folder / "results" / "avt-seed0.png").touch()
    write_report(folder / "results", folder / "docs")
    assert "(../results/avt-seed0.png)" in (folder / "docs" / "index.md").read_text()


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


@pytest.mark.parametrize(("clip", "segment"), [(0.9, 0.4), (0.5, 0.9)])
def test_how_many_pairs_keep_their_order_when_trained_for_longer(
    folder: Path, clip: float, segment: float
) -> None:
    """Uni-Code is above each of the four others, which are equal; then in one score below them."""
    for seed in range(3):
        made = result("long-uni-code", seed, clip, segment)
        write_result(folder / "results" / f"long-uni-code-seed{seed}.json", made)
    write_report(folder / "results", folder / "docs")
    kept = "for clips 4, for segments 0" if clip > segment else "for clips 0, for segments 4"
    said = f"Pairs of systems, out of 10, whose order is unchanged: {kept}."
    assert said in (folder / "docs" / "index.md").read_text()
