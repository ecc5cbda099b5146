"""Which tests execute each line, and runs of chosen tests: the pytest side of `mutants.py`.

Both need a word with pytest from within, so this module is a plugin of those runs, and reads its
orders from variables of the environment that start with MUTANTS_.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETED = "tests/kernels/interpreter/"  # in a process of their own, with TRITON_INTERPRET=1
Recorded = dict[str, Any]  # see `measure`
CONFIG = """
[run]
data_file = {folder}/data
parallel = true
source = {tree}/mmvq, {tree}/mmvq_kernels
context = ${{MUTANTS_CONTEXT-}}
patch = _exit
disable_warnings = no-data-collected
"""


def pytest_configure(config: pytest.Config) -> None:
    if "MUTANTS_RECORD" in os.environ:
        config.pluginmanager.register(Recorder())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests that were asked for, in that order."""
    if path := os.environ.get("MUTANTS_TESTS"):
        place = {name: i for i, name in enumerate(Path(path).read_text().splitlines())}
        kept = [item for item in items if item.nodeid in place]
        items[:] = sorted(kept, key=lambda item: place[item.nodeid])


class Recorder:
    """Tells coverage, here and in child processes, which test or wide fixture runs."""

    def __init__(self) -> None:
        self.fixtures = dict[str, tuple[str, str]]()  # context: where it is seen, its name
        self.tests: dict[str, dict[str, Any]] = defaultdict(lambda: {"seconds": 0.0, "passed": []})

    def enter(self, context: str) -> str:
        import coverage

        before = os.environ.get("MUTANTS_CONTEXT", "")
        os.environ["MUTANTS_CONTEXT"] = context
        coverage.Coverage.current().switch_context(context)
        return before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.enter(item.nodeid)
        result = yield
        self.enter("")
        names = getattr(item, "fixturenames", ())
        found = self.fixtures.items()
        used = [c for c, (at, x) in found if x in names and item.nodeid.startswith(at)]
        self.tests[item.nodeid]["contexts"] = [item.nodeid, *used]
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        context = f"fixture {fixturedef.baseid}::{fixturedef.argname}"
        self.fixtures[context] = fixturedef.baseid, fixturedef.argname
        before = self.enter(context)
        try:
            return (yield)
        finally:
            self.enter(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tests[report.nodeid]["seconds"] += report.duration
        self.tests[report.nodeid]["passed"].append(report.passed)

    def pytest_sessionfinish(self) -> None:
        ran = {name: x for name, x in self.tests.items() if "contexts" in x and all(x["passed"])}
        worker = os.environ.get("PYTEST_XDIST_WORKER", "")
        Path(os.environ["MUTANTS_RECORD"], f"tests{worker}.json").write_text(json.dumps(ran))


def files() -> list[str]:
    """All of the working tree that git does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in names.splitlines() if (ROOT / name).is_file())


def copy(tree: Path) -> Path:
    for name in files():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    return tree


def run_tests(
    tree: Path, *arguments: str, extra: dict[str, str], interpret: bool, limit: float | None = None
) -> tuple[int | None, str]:
    """The exit code of pytest, None if it took too long, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}", **extra}
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    options = ("-p", "mutant_runs", "-p", "no:cacheprovider", "--tb=no", "-rfE")
    command, code = [sys.executable, "-m", "pytest", *options, *arguments], None
    said = tree / "said.txt"  # a pipe would stay open for as long as a forgotten child lives
    with said.open("w") as out, suppress(subprocess.TimeoutExpired):
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            code = process.wait(limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, said.read_text()


def record(kept: Path, jobs: int) -> Recorded:
    """Which tests execute each line; read from the file `kept` where the code is still the same."""
    code = [x for x in files() if x.endswith(".py") and not x.startswith("tests/mutant")]
    digest = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in code)).hexdigest()
    if not kept.exists() or json.loads(kept.read_text())["digest"] != digest:
        print("One run of all tests under coverage ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), jobs)
        kept.write_text(json.dumps({"digest": digest, **found}))
    recorded: Recorded = json.loads(kept.read_text())
    return recorded


def measure(folder: Path, jobs: int) -> Recorded:
    """`{"tests": [[name, seconds], ...], "lines": {file: {line: [number of a test, ...]}}}`."""
    import coverage

    tree, config = copy(folder / "tree"), folder / "coverage.ini"
    config.write_text(CONFIG.format(folder=folder, tree=tree))
    start = f"import sys; sys.path.append({str(Path(coverage.__file__).parents[1])!r})\n"
    start += "import coverage; coverage.process_startup()\n"
    (tree / "sitecustomize.py").write_text(start)  # for child processes
    ours = {"COVERAGE_PROCESS_START": str(config), "COVERAGE_CORE": "ctrace"}
    tests = dict[str, dict[str, Any]]()
    for interpret in (False, True):
        names = [INTERPRETED] if interpret else ["--ignore=tests/kernels/test_interpreter.py"]
        (out := folder / str(interpret)).mkdir()
        ours["MUTANTS_RECORD"] = str(out)
        code, said = run_tests(tree, f"-n{jobs}", *names, extra=ours, interpret=interpret)
        if code not in (0, 1):  # tests that fail without a mutant are left out
            raise RuntimeError(f"pytest ended with {code}\n{said}")
        print(said, flush=True)
        for path in out.iterdir():
            tests |= json.loads(path.read_text())
    users = defaultdict[str, list[int]](list)  # of a context
    for i, test in enumerate(tests.values()):
        for context in test["contexts"]:
            users[context].append(i)
    combined = coverage.Coverage(config_file=str(config))
    combined.combine()
    data, lines = combined.get_data(), dict[str, dict[int, list[int]]]()
    for path in data.measured_files():
        found = data.contexts_by_lineno(path).items()
        lines[str(Path(path).relative_to(tree))] = {
            line: sorted({i for context in contexts for i in users[context]})
            for line, contexts in found
        }
    return {"tests": [[name, test["seconds"]] for name, test in tests.items()], "lines": lines}
