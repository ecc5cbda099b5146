"""`python -m mmvq`."""

from __future__ import annotations

import runpy

import pytest
import torch

import mmvq
from mmvq import __main__
from mmvq.__main__ import report


def test_it_prints_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(__main__.__file__, run_name="__main__")
    found = capsys.readouterr().out.splitlines()
    lines = dict(line.split(None, 1) for line in found if "backend" not in line)
    assert lines["mmvq"] == mmvq.__version__
    assert lines["torch"].startswith(torch.__version__)


@pytest.mark.parametrize("reason", [None, "torch sees no GPU"])
def test_a_backend_that_is_off_says_why(
    monkeypatch: pytest.MonkeyPatch, reason: str | None
) -> None:
    monkeypatch.setattr("mmvq.__main__.reason_unavailable", lambda _: reason)
    assert dict(report())["backend triton"] == ("runs" if reason is None else f"off: {reason}")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmvq.__main__._PACKAGES", ("no-such-package",))
    assert dict(report())["no-such-package"] == "not installed"
