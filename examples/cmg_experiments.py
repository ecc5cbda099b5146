"""The paper's experiments on the built-in digits: systems, ablations, tasks, figures, report.

    python examples/cmg_experiments.py                  list the experiments and the time left
    python examples/cmg_experiments.py --run            train those that have no result yet
    python examples/cmg_experiments.py --run --only uni-code baseline
    python examples/cmg_experiments.py --evaluate       more tasks on the stored models
    python examples/cmg_experiments.py --report         pages and pictures from the results

An experiment with one seed is one run and one JSON file in --results. If interrupted, the same
command continues with what is missing. Models are kept in --runs. A run of the stored results took
one minute (the median, on one core), and all of them together more than two hours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg.command import exit_code, positive_float, positive_int, seed
from experiments.report import write_report
from experiments.runner import evaluate_missing, outlook, pick, run_missing

DOCS = Path(__file__).parents[1] / "docs" / "experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    stopped = "stopped. The same command continues."
    return exit_code("cmg_experiments", lambda: run(args), lambda: stopped)


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, report, or list what is missing."""
    chosen = pick(args.only, args.scale)
    if args.run:
        run_missing(chosen, args.seeds, args.results, args.runs, args.jobs)
    elif args.evaluate:
        evaluate_missing(chosen, args.seeds, args.results, args.runs, args.jobs)
    elif args.report:
        write_report(args.results, args.docs)
    else:
        print(outlook(chosen, args.seeds, args.results, args.jobs))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--run", action="store_true", help="train and test")
    action.add_argument("--evaluate", action="store_true", help="more tasks on stored models")
    action.add_argument("--report", action="store_true", help="write --docs from --results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments; all by default")
    parser.add_argument(
        "--seeds", nargs="+", type=seed, default=[0, 1, 2], metavar="S", help="0 1 2 by default"
    )
    parser.add_argument("--scale", type=positive_float, default=1.0, help="factor of all epochs")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes at a time")
    parser.add_argument(
        "--results", type=Path, default=DOCS / "results", metavar="DIR", help="of JSON files"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), metavar="DIR", help="of models"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="of the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
