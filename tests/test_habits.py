"""What the documents and the project's files promise: links, paths, names, code and pins."""

from __future__ import annotations

import ast
import builtins
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support import ROOT

import mmvq
import mmvq_kernels
from mmvq.compat import cmg

DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = {
    name: getattr(package, name)
    for package in (cmg, mmvq_kernels, mmvq.functional, mmvq)
    for name in package.__all__
}
each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
NEEDS_GPU = "<!-- needs a GPU -->"  # first in a document whose python blocks do
IN_ORDER = "<!-- its shell and python blocks run in order -->"  # tests/examples/test_files_guide.py


def prose(text: str) -> str:
    return FENCE.sub("", text)


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The first line and the code of each fenced block of a language."""
    found = [m for m in FENCE.finditer(text) if m[1].split()[:1] == [language]]
    return [(text.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def links(text: str) -> list[str]:
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", prose(text))
    targets += re.findall(r"""(?:src|href)=["']([^"']+)""", prose(text))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def named_paths(text: str) -> list[str]:
    """Spans and words of shell blocks that start with a folder or file of the repository."""
    words = spans(text) + [w for _, code in blocks(text, "bash") for w in code.split()]
    paths = [w.split("::")[0] for w in words if re.fullmatch(r"[\w.\-/]+", w)]
    top = {p.name for p in ROOT.iterdir()} | {"docs", "examples", "tests"}
    made = {".venv", "runs", "site"}
    return [p for p in paths if "/" in p and p.split("/")[0] in top - made]


def wrong_names(text: str) -> list[str]:
    """Dotted names of mmvq that do not exist, and calls with arguments that do not."""
    wrong = []
    for span in spans(text):
        try:
            node = ast.parse(span, mode="eval").body
        except SyntaxError:
            continue
        call = node if isinstance(node, ast.Call) else None
        name = ast.unparse(call.func if call else node)
        value: Any = NAMES.get(name, getattr(builtins, name, None))
        if re.match(r"(mmvq|mmvq_kernels|torch)\.", name):
            try:
                value = pkgutil.resolve_name(name)
            except (AttributeError, ImportError):
                wrong.append(span)
                continue
        if call and value is None and name[0].isupper():
            wrong.append(span)
        elif call and callable(value) and (keywords := {k.arg for k in call.keywords}):
            wrong += [span] * (not keywords <= set(inspect.signature(value).parameters))
    return wrong


def test_the_readers_see_what_is_there() -> None:
    text = (
        "# A b: c\n[x](docs/y.md#z) [w](https://w) `mmvq/cpc.py` `made/up` `mmvq.nothing`\n"
        '`CrossCPC(64, start=1)` `CrossCPC(num_steps=3)` `Nothing(1)`\n<img src="a.png">\n'
        "```python\n[n](n)\n```\n```bash\npytest tests/none.py\n```\n"
    )
    assert links(text) == ["docs/y.md#z", "a.png"]
    assert anchors(text) == {"a-b-c"}
    assert named_paths(text) == ["mmvq/cpc.py", "tests/none.py"]
    assert wrong_names(text) == ["mmvq.nothing", "CrossCPC(64, start=1)", "Nothing(1)"]
    assert blocks(text, "python") == [(6, "[n](n)\n")]
    assert cells("| message | why |\n|---|---|\n| `a` | b |\n| `c` | d |\n", "message") == [
        "`a`",
        "`c`",
    ]


@each_document
def test_links_and_paths_exist(path: Path) -> None:
    text = path.read_text()
    for link in links(text):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(file.read_text()), f"{path.name} links to {link}"
    for name in named_paths(text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


@each_document
def test_names_and_arguments_exist(path: Path) -> None:
    assert wrong_names(path.read_text()) == []


def needs_gpu(path: Path) -> bool:
    return path.read_text().startswith(NEEDS_GPU)


def needs_files(path: Path) -> bool:
    return path.read_text().startswith(IN_ORDER)


def run_blocks(path: Path, text: str, **stand_ins: object) -> dict[str, Any]:
    """In order, in one namespace, which is returned. A stand-in replaces what a block defined."""
    found = blocks(text, "python")
    assert found or path.name != "README.md", "README.md shows no use"
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, code in found:
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), namespace)
        namespace |= {name: x for name, x in stand_ins.items() if name in namespace}
    assert torch.get_default_dtype() == torch.float32
    return namespace


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own, of its exporter
@pytest.mark.parametrize(
    "path", [p for p in DOCS if not (needs_gpu(p) or needs_files(p))], ids=lambda path: path.name
)
def test_python_blocks_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_blocks(path, path.read_text())


def test_the_loop_of_the_readme_learns(capsys: pytest.CaptureFixture[str]) -> None:
    """Modalities choose the same codes for new clips, and specific features are kept apart.

    Chance is one of twelve events.
    """
    left = run_blocks(ROOT / "README.md", (ROOT / "README.md").read_text())
    losses, clips, new = left["losses"], left["clips"], slice(800, None)
    assert losses[-1] < losses[0] / 2
    z = {m: left["encode"][m](v[new]) for m, v in clips.items()}
    tokens = {m: left["quantizer"].encode(v) for m, v in z.items()}
    assert (tokens["audio"] == tokens["video"]).float().mean() > 0.6
    for m, club in left["club"].items():
        assert club.penalty(z[m], left["encode_specific"][m](clips[m][new])) < 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("path", [*filter(needs_gpu, DOCS)], ids=lambda path: path.name)
def test_python_blocks_run_on_a_gpu(path: Path) -> None:
    run_blocks(path, path.read_text())


@pytest.mark.parametrize("path", [*filter(needs_gpu, DOCS)], ids=lambda path: path.name)
def test_python_blocks_for_a_gpu_run_up_to_its_graphs(path: Path) -> None:
    """On the CPU, where a replay takes the step again."""

    class Graph:
        def __init__(self, step: Any) -> None:
            self.step, self.result = step, torch.zeros(())

        def replay(self) -> None:
            self.result.copy_(self.step())

    def capture(step: Any) -> tuple[Graph, torch.Tensor]:
        for _ in range(3):
            step()
        graph = Graph(step)
        return graph, graph.result

    text = path.read_text().replace('"cuda"', '"cpu"').replace("capturable=True", "foreach=False")
    run_blocks(path, text, capture=capture)


def cells(text: str, header: str) -> list[str]:
    """The first cells of the tables whose first column has this header."""
    tables = re.findall(rf"^\| {header} \|[^\n]*\n\|[-| ]+\n((?:\|[^\n]*\n)+)", text, re.MULTILINE)
    return [row.split("|")[1].strip() for table in tables for row in table.splitlines()]


@each_document
def test_messages_that_guides_explain_are_those_of_the_code(path: Path) -> None:
    code = "".join(
        p.read_text() for name in ("mmvq", "mmvq_kernels") for p in ROOT.glob(f"{name}/**/*.py")
    )
    for cell in cells(path.read_text(), "message"):
        quoted = re.match(
            r"`([^`]+)`(?! \()", cell
        )  # "(torch's)" and the like follow those of others
        assert quoted is None or quoted[1] in code, f"{path.name} explains {quoted[1]}"


@each_document
def test_figures_that_guides_repeat_are_those_of_the_experiments(path: Path) -> None:
    source = (ROOT / "docs/experiments/index.md").read_text()
    rows = re.findall(
        r"^\| (?:clips|segments \(F1\)|codes shared) \|.*±.*$", path.read_text(), re.MULTILINE
    )
    assert set(rows) <= set(source.splitlines())


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([\w-]+)", text)) <= targets
    assert {"make demo", "make test"} <= set(re.findall(r"\bmake [\w-]+", text))
    assert "<!-- demo -->" in text.split("<!-- /demo -->")[0]


def test_changelog_has_this_version() -> None:
    assert f"\n## [{mmvq.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pins) == sorted(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = ("triton", "examples", "samples", "dev")
    names = (*project["dependencies"], *(line for extra in wanted for line in extras[extra]))
    for requirement in map(Requirement, names):
        if requirement.name != project["name"]:
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_releases_are_those_that_the_project_admits() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = [
        *project["dependencies"],
        *(x for e in ("triton", "hub", "onnx", "cpu") for x in extras[e]),
    ]
    floors = {Requirement(x).name: Version(str(Requirement(x).specifier)[2:]) for x in names}
    pins = (ROOT / ".ci/oldest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in pins if not line.startswith("#"))
    assert {name: Version(pin) for name, pin in tested.items()} == floors
