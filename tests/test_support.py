"""The helper that runs other processes: it shows what they said, and they run this tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import run_python

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
