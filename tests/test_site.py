"""The site as a reader gets it: every public name, every formula, and nothing from elsewhere."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from support import ROOT, once

import mmvq
import mmvq_kernels
from mmvq.compat import cmg

ALONE = ("mmvq.figures", "mmvq.onnx", "mmvq.compat", "mmvq.compat.vector_quantize_pytorch.load")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "site", build)


def build(folder: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pages(site: Path) -> dict[str, str]:
    return {str(page.relative_to(site)): page.read_text() for page in site.rglob("*.html")}


def test_the_reference_has_every_public_name(site: Path) -> None:
    _, _, names = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    found = {line.split()[0] for line in zlib.decompress(names).decode().splitlines()}
    modules = [*map(importlib.import_module, ALONE[:2]), mmvq, mmvq.functional, mmvq_kernels, cmg]
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert (public | set(ALONE)) - found == set()


def test_examples_of_docstrings_are_code(site: Path) -> None:
    text = "".join(page for name, page in pages(site).items() if name.startswith("api"))
    assert text.count("gp") > 100  # prompts
    assert "<blockquote>" not in text


def test_formulas_are_drawn(site: Path) -> None:
    text = "".join(pages(site).values())
    assert (
        text.count('class="formula" role="img" aria-label="')
        == text.count('class="arithmatex"')
        > 100
    )


def test_pages_need_nothing_from_elsewhere(site: Path) -> None:
    for name, page in pages(site).items():
        loaded = re.findall(r'<(?:script|img|link)\b[^>]*(?:src|href)="([^"]+)"', page)
        assert loaded, name
        assert not [url for url in loaded if "//" in url], name


def test_the_story_has_its_pictures(site: Path) -> None:
    pictures = re.findall(
        r'<img alt="([^"]+)" src="([^"]+)"', (site / "story/index.html").read_text()
    )
    assert len(pictures) == 5
    for _, source in pictures:
        assert (site / "story" / source).stat().st_size > 1000


def test_names_in_pages_lead_to_the_reference(site: Path) -> None:
    start = (site / "start/index.html").read_text()
    assert 'href="../api/mmvq/#mmvq.CrossCPC"' in start
    equations = (site / "equations/index.html").read_text()
    assert 'href="../api/functional/#mmvq.functional.contrastive.info_nce"' in equations
    kernels = (site / "kernels/index.html").read_text()
    assert 'href="../api/kernels/#mmvq_kernels.ema_update_"' in kernels


def test_home_and_readme_tell_the_same_figures() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    (mean,) = re.findall(r"\*\*mean\*\* .*", readme)
    ours, bound, cca = re.findall(r"\d\.\d+", mean)[:3]
    home = " ".join((ROOT / "docs/index.md").read_text().split())
    assert f"right for {ours} of the clips" in home
    assert f"that modality ({bound})" in home
    (logistic,) = re.findall(r"better for clips \(mean (\d\.\d+);", readme)
    assert f"linear CCA ({cca} with the same head, {logistic} with logistic regression)" in home
