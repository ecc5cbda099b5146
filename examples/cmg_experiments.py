"""The paper's experiments on the built-in digits: systems, ablations, tasks, figures, report.

    python examples/cmg_experiments.py                           run what has no result yet
    python examples/cmg_experiments.py --only uni-code baseline  some experiments; --list names all
    python examples/cmg_experiments.py --evaluate                more tasks on the stored models
    python examples/cmg_experiments.py --report                  pages and pictures from the results

An experiment with a seed is a run and one JSON file in --results; an interrupted matrix goes on
where it was. Models stay in --runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg_pretrain import natural, positive

from cmg.errors import DataError
from experiments.matrix import EXPERIMENTS
from experiments.report import write_report
from experiments.runner import evaluate_missing, pick, run_missing

DOCS = Path(__file__).parents[1] / "docs" / "experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 if something cannot be done."""
    args = _parse(argv)
    try:
        if args.list:
            print("\n".join(EXPERIMENTS))
        elif args.report:
            write_report(args.results, args.docs)
        else:
            work = evaluate_missing if args.evaluate else run_missing
            chosen = pick(args.only, args.scale)
            work(chosen, args.seeds, args.results, args.runs, args.jobs)
    except (DataError, OSError) as error:
        print(f"cmg_experiments: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="name the experiments")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="which; all if not given")
    parser.add_argument("--seeds", nargs="+", type=natural, default=[0, 1, 2], metavar="S")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all epochs")
    parser.add_argument("--jobs", type=positive, default=1, help="processes at a time")
    parser.add_argument("--evaluate", action="store_true", help="more tasks on stored models")
    parser.add_argument("--report", action="store_true", help="write --docs from --results")
    parser.add_argument("--results", type=Path, default=DOCS / "results", metavar="DIR")
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"), metavar="DIR")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
