"""Mutation testing of both packages: how many small faults do the tests notice?

    pip install coverage                         # the one thing that `make setup` does not bring
    python tests/mutants.py                      # 150 mutants, the same number of each operator
    python tests/mutants.py --count 0            # the hand-written mutants alone
    python tests/mutants.py --only losses.py --budget 0 --output runs/losses.json

A mutant is the code with one small fault. Tests kill it by failing, or by not ending. They run in
copies of the working tree. One run of all tests under coverage.py records which tests execute each
line, in child processes too. Then each mutant runs the tests that execute its line until one fails.
Both results are kept in files, so that a run that was stopped goes on; they are made again when the
code or a test changes.

`mutants.toml` lists hand-written mutants, and survivors that were reviewed and found equivalent: no
test can tell them from the code. The score is the share of the other mutants that were killed.

Limits: the tests of one mutant are cut off at `--budget` seconds, the slowest first. Statements
outside functions run the tests of their own module only. Code that torch.compile reads but does not
run is not seen as executed. Strings and what is raised are never changed.
"""

from __future__ import annotations

import argparse
import ast
import json
import queue
import random
import re
import signal
import subprocess
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice, zip_longest
from pathlib import Path

from mutant_runs import INTERPRETED, ROOT, Recorded, copy, files, record, run_tests
from mutant_sites import Mutant, Sites

RESULT = Path("runs/mutants.json")
PACKAGES = ("mmvq", "mmvq_kernels")
KERNELS = "mmvq_kernels/gpu/"  # read by a compiler too, by these tests:
COMPILED = ("tests/kernels/test_aot.py", "tests/kernels/test_graph_safety.py")
SLOW = ("tests/distributed/", "tests/examples/", "tests/frameworks/", "tests/test_")  # to start
STAGES = ((1, INTERPRETED), (2, SLOW), (3, COMPILED), (0, ""))  # which tests run when
STATUSES = ("killed", "timeout", "survived", "equivalent", "not run")
ENDS = {None: "timeout", -signal.SIGKILL: "not run", -signal.SIGTERM: "not run"}  # by others
LIMIT = 600  # s, beside ten times what its tests take: a machine may be busy


def choose(recorded: Recorded, mutant: Mutant, budget: float) -> list[list[tuple[str, float]]]:
    """The tests that may kill it, with their seconds, in groups that share a process.

    First those of the file that has the most of them, then by STAGES; the quickest first.
    """
    lines, tests = recorded["lines"].get(mutant.file, {}), recorded["tests"]
    near = [] if mutant.imported else [lines.get(str(i), []) for i in mutant.statement]
    numbers = {i for some in (near if any(near) else lines.values()) for i in some}
    if mutant.file.startswith(KERNELS):
        numbers |= {i for i, (name, _) in enumerate(tests) if name.startswith(COMPILED)}
    found = [(name, seconds) for name, seconds in (tests[i] for i in numbers or range(len(tests)))]
    stages = {name: next(i for i, x in STAGES if name.startswith(x)) for name, _ in found}
    first = Counter(file_of(name) for name in stages if stages[name] == min(stages.values()))
    (most, _), *_ = first.most_common(1)
    groups = defaultdict[int, list[tuple[str, float]]](list)
    spent = 0.0
    for name, seconds in sorted(found, key=lambda test: test[1]):
        stage = -1 if file_of(name) == most else stages[name]
        spent += seconds
        if spent <= budget or not budget or name.startswith(COMPILED):
            groups[stage].append((name, seconds))
    return [groups[stage] for stage in sorted(groups)]


def file_of(test: str) -> str:
    return test.split("::")[0]


def examine(mutant: Mutant, groups: list[list[tuple[str, float]]], tree: Path) -> None:
    """Run its tests on a tree and write down what came of it."""
    path, listed = tree / mutant.file, tree / "chosen.txt"
    source, start = path.read_bytes(), time.monotonic()
    path.write_bytes(mutant.apply(source))
    mutant.status, mutant.tests = "survived", sum(map(len, groups))
    for group in groups:
        listed.write_text("\n".join(name for name, _ in group))
        code, said = run_tests(
            tree,
            "-x",
            *sorted({file_of(name) for name, _ in group}),
            extra={"MUTANTS_TESTS": str(listed)},
            limit=LIMIT + 10 * sum(seconds for _, seconds in group),
            interpret=group[0][0].startswith(INTERPRETED),
        )
        if code != 0:
            failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
            mutant.status = ENDS.get(code, "killed")
            mutant.killer = failed[1] if failed else said[-500:]
            break
    path.write_bytes(source)
    mutant.seconds = round(time.monotonic() - start, 1)


def by_hand(entries: list[dict[str, str]]) -> list[Mutant]:
    """Those of `mutants.toml`."""
    found = []
    for entry in entries:
        source, old = (ROOT / entry["file"]).read_bytes(), entry["before"].encode()
        assert source.count(old) == 1, f"{entry['file']} holds {source.count(old)} times {old!r}"
        start = source.index(old)
        line = source.count(b"\n", 0, start) + 1
        place = Sites(entry["file"], source).places[line]
        mutant = Mutant("by hand", entry["file"], start, start + len(old), entry["after"], *place)
        found.append(mutant.describe(source))
    return found


def draw(sites: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """As many of each operator in each package as there are, in turns, until there are `count`."""
    kinds = defaultdict[tuple[str, str], list[Mutant]](list)
    for site in sites:
        kinds[site.operator, site.file.split("/")[0]].append(site)
    rng = random.Random(seed)
    shuffled = [rng.sample(kinds[kind], len(kinds[kind])) for kind in sorted(kinds)]
    turns = [site for turn in zip_longest(*shuffled) for site in turn if site is not None]
    return list(islice(filter(compiles, turns), count))


def compiles(mutant: Mutant) -> bool:
    try:
        ast.parse(mutant.apply((ROOT / mutant.file).read_bytes()))
    except SyntaxError:
        return False
    return True


def summary(mutants: list[Mutant], sites: Counter[str]) -> dict[str, dict[str, int]]:
    """The counts of each operator and of all, and the score in percent."""
    rows = dict[str, dict[str, int]]()
    for name in [*dict.fromkeys(mutant.operator for mutant in mutants), "all"]:
        some = Counter(x.status for x in mutants if name in (x.operator, "all"))
        dead = some["killed"] + some["timeout"]
        score = round(100 * dead / max(dead + some["survived"], 1))
        found = sites.total() if name == "all" else sites[name]
        rows[name] = {"sites": found, **{x: some[x] for x in STATUSES}, "score": score}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=150, help="mutants to draw (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULT, help="(%(default)s)")
    parser.add_argument("--only", default="", metavar="NAME", help="a part of file.py:line")
    parser.add_argument("--budget", type=float, default=120, help="s (%(default)s); 0: no limit")
    args = parser.parse_args()

    listed = tomllib.loads((ROOT / "tests/mutants.toml").read_text())
    equivalent = {(x["file"], x["before"], x["after"]) for x in listed.get("equivalent", [])}
    names = [name for name in files() if name.split("/")[0] in PACKAGES and name.endswith(".py")]
    sites = [site for name in names for site in Sites(name, (ROOT / name).read_bytes()).found]
    sites, hand = (
        [x for x in some if args.only in f"{x.file}:{x.line}"]
        for some in (sites, by_hand(listed["mutant"]))
    )
    mutants = hand + draw(sites, args.count, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    recorded = record(args.output.with_name("mutants.coverage.json"), args.jobs)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    result = {"commit": commit.stdout.strip(), "digest": recorded["digest"], "seed": args.seed}
    if args.output.exists():
        old = json.loads(args.output.read_text())
        runs = {(x["file"], x["start"], x["end"], x["text"]): x for x in old["mutants"]}
        for mutant in mutants if old["digest"] == result["digest"] else []:
            mutant.recall(runs.get((mutant.file, mutant.start, mutant.end, mutant.text), {}))
    totals = Counter(site.operator for site in sites)
    trees = queue.SimpleQueue[Path]()

    def work(mutant: Mutant) -> Mutant:
        tree = trees.get()
        try:
            examine(mutant, choose(recorded, mutant, args.budget), tree)
        finally:
            trees.put(tree)
        return mutant

    def keep() -> dict[str, dict[str, int]]:
        for x in mutants:
            if x.status in ("survived", "equivalent"):
                known = (x.file, x.before, x.after) in equivalent
                x.status = "equivalent" if known else "survived"
        rows = summary(mutants, totals)
        everything = {**result, "operators": rows, "mutants": [vars(x) for x in mutants]}
        args.output.write_text(json.dumps(everything, indent=1, default=list))
        return rows

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for i in range(args.jobs):
            trees.put(copy(Path(folder) / str(i)))
        todo = [pool.submit(work, x) for x in mutants if x.status == "not run"]
        try:
            for done in as_completed(todo):
                x = done.result()
                print(f"{x.status} {x.file}:{x.line} {x.operator} ({x.seconds:.0f} s) {x.killer}")
                print(f"    - {x.before}\n    + {x.after}", flush=True)
                keep()
        finally:
            pool.shutdown(cancel_futures=True)
    for name, row in keep().items():
        print(f"{name:18}" + "".join(f"{number:5} {what}" for what, number in row.items()))


if __name__ == "__main__":
    main()
