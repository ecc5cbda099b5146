"""The paper's experiments on the numbers: systems, ablations, tasks, figures, report.

    python examples/cmg_experiments.py                  list what is done and what is left
    python examples/cmg_experiments.py --run --jobs 2   choose, train and test what is missing
    python examples/cmg_experiments.py --run --only uni-code baseline
    python examples/cmg_experiments.py --report         pages and pictures from the results

Every experiment gets three choices on the validation split of a rendering that is used for nothing
else, then five seeds, and five more while a claim that needs it is open. An experiment is one JSON
file in --results, written after every run: if interrupted, the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg.command import exit_code, positive_int
from experiments.report import write_report
from experiments.runner import outlook, pick, run_missing

DOCS = Path(__file__).parents[1] / "docs" / "experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    stopped = "stopped. The same command continues."
    return exit_code("cmg_experiments", lambda: run(args), lambda: stopped)


def run(args: argparse.Namespace) -> None:
    """Train, report, or list what is missing."""
    chosen = pick(args.only)
    if args.run:
        run_missing(chosen, args.results, args.jobs)
    elif args.report:
        write_report(args.results, args.docs)
    else:
        print(outlook(chosen, args.results, args.jobs))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--run", action="store_true", help="choose, train and test")
    action.add_argument("--report", action="store_true", help="write --docs from --results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments; all by default")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes at a time")
    parser.add_argument(
        "--results", type=Path, default=DOCS / "results", metavar="DIR", help="of JSON files"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="of the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
