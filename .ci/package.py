"""Build sdist and wheel into dist/, look inside, and use the wheel where nothing else is installed.

`make package` runs it. The wheel is built from the sdist, so that the sdist is known to be enough.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
LARGEST = {".whl": 200_000, ".gz": 5_000_000}  # bytes; golden files 2.3 MB, experiments 1.2 MB
PACKAGES = ("mmvq", "mmvq_kernels")
WHAT_TESTS_NEED = {
    ".ci", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile", "README.md", "conftest.py",
    "constraints.txt", "mkdocs.yml", "pyproject.toml", "docs", "examples", "tests", *PACKAGES,
}  # fmt: skip


def expect(found: set[str], wanted: set[str], where: Path) -> None:
    """Stop unless `where` holds what it should."""
    if found != wanted:
        missing, extra = sorted(wanted - found), sorted(found - wanted)
        sys.exit(f"{where.name}: missing {missing}, should not be there {extra}")


def check_wheel(wheel: Path) -> None:
    """Both packages as they are in the tree, their metadata with the licence, and nothing else."""
    paths = [p for name in PACKAGES for p in (ROOT / name).rglob("*") if p.is_file()]
    files = {p.relative_to(ROOT).as_posix() for p in paths if p.suffix in (".py", ".typed")}
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    about = ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    found = set(zipfile.ZipFile(wheel).namelist())
    expect(found, files | {f"{info}/{name}" for name in about}, wheel)


def check_sdist(sdist: Path) -> None:
    """What the tests need, and what packaging adds."""
    with tarfile.open(sdist) as file:
        found = {name.split("/")[1] for name in file.getnames()}
    expect(found - {".gitignore"}, WHAT_TESTS_NEED | {"PKG-INFO"}, sdist)


def use(wheel: Path, folder: Path) -> None:
    """Install the wheel without extras; print the report and run the first code of the README."""
    venv.create(folder / "env", symlinks=True)
    python = str(folder / "env" / "bin" / "python")
    pip = sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python
    install = *pip, "install", "-qq", "--no-compile", "-c", str(ROOT / "constraints.txt")
    pins = (ROOT / "constraints.txt").read_text()
    torch = re.search(r"^torch==.+$", pins, re.MULTILINE)
    assert torch is not None
    for what in (torch[0], str(wheel)):  # torch alone first, as in the Makefile
        subprocess.run([*install, what], check=True)
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert code is not None
    for args in (["-m", "mmvq"], ["-c", code[1]]):
        subprocess.run([python, "-W", "error", *args], check=True, cwd=folder)


shutil.rmtree(DIST, ignore_errors=True)
build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT)]
subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
(sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
for file in (sdist, wheel):
    size = file.stat().st_size
    print(f"{file.relative_to(ROOT)}: {size:,} bytes")
    if size > LARGEST[file.suffix]:
        sys.exit(f"{file.name} is larger than {LARGEST[file.suffix]:,} bytes: look at what is new")
check_wheel(wheel)
check_sdist(sdist)
with tempfile.TemporaryDirectory() as folder:
    use(wheel, Path(folder))
