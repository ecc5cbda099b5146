"""The notebook runs, and what it says at its end is so."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
READ = """
import json
print(json.dumps(SETTINGS))
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the kernel's client
def test_the_story_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'examples'}")
    notebook = nbformat.read(ROOT / "examples" / "story.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    notebook.cells.append(nbformat.v4.new_code_cell(READ))
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    found = nbformat.from_dict(notebook.cells[-1].outputs[0])["text"]
    settings = json.loads(found)
    for across, own in (("audio → video", "video → video"), ("video → audio", "audio → audio")):
        assert settings["both"][across] > 0.85 * settings["both"][own]
        assert settings["neither"][across] < 0.25
    assert sum("image/png" in str(cell.get("outputs")) for cell in notebook.cells) == 3
