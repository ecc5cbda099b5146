"""The helpers that run other processes: errors show, and the processes run this tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import once, peak_growth, run_processes, run_python

import mmvq
import mmvq_kernels

SAYS = "import sys, time; print('said this', flush=True); print('and that', file=sys.stderr)"


@pytest.mark.parametrize(
    ("end", "timeout", "reason"),
    [
        ("sys.exit(3)", 600.0, "ended with 3\n"),
        ("sys.stderr.flush(); time.sleep(600)", 3.0, "after 3.0 s, which was too long\n"),
    ],
    ids=["status", "time"],
)
def test_a_process_that_fails_shows_both_its_outputs(end: str, timeout: float, reason: str) -> None:
    with pytest.raises(AssertionError) as error:
        run_python("-c", f"{SAYS}; {end}", timeout=timeout)
    assert all(text in str(error.value) for text in (reason, "said this\n", "and that\n"))


def test_a_process_runs_this_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a script elsewhere, for which the working directory is on no path, and its children."""
    other = tmp_path / "script.py"
    other.write_text("import mmvq, mmvq_kernels; print(mmvq.__file__, mmvq_kernels.__file__)")
    monkeypatch.chdir(tmp_path)
    start = "import subprocess, sys; subprocess.run([sys.executable, sys.argv[1]], check=True)"
    found = run_python("-c", start, str(other))
    for file, package in zip(found.split(), (mmvq, mmvq_kernels), strict=True):
        assert Path(file).parent.samefile(package.__path__[0])


def fail(rank: int, found: Path) -> None:
    (found / str(rank)).write_text(f"{mmvq.__file__} {mmvq_kernels.__file__}")
    assert rank == 0, "rank 1 has failed"


def test_processes_run_this_tree_and_raise_what_one_raises(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="rank 1 has failed"):
        run_processes(2, fail, tmp_path)
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text() == f"{mmvq.__file__} {mmvq_kernels.__file__}"


def test_growth_is_that_of_the_call() -> None:
    setup = "x = torch.ones(50 * 2**18)"
    assert 95 < peak_growth(setup, "y = torch.ones(100 * 2**18)") < 105
    assert peak_growth(setup, "del x") < 5


def test_what_is_made_once_is_made_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    made: list[Path] = []
    folders = [once(tmp_path_factory, __name__, made.append) for _ in "ab"]
    assert len(made) <= 1  # or none, where another worker was first
    assert folders[0] == folders[1]
