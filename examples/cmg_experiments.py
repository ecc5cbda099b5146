"""The paper's experiments on the built-in digits: systems, ablations, tasks, figures, report.

    python examples/cmg_experiments.py                  what there is, and how long the rest takes
    python examples/cmg_experiments.py --run            train what has no result yet
    python examples/cmg_experiments.py --run --only uni-code baseline
    python examples/cmg_experiments.py --evaluate       more tasks on the stored models
    python examples/cmg_experiments.py --report         pages and pictures from the results

An experiment with a seed is a run and one JSON file in --results; an interrupted matrix goes on
where it was. Models stay in --runs. The results that come with the code took a minute each (the
median, on one core), and all of them more than two hours.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg_pretrain import natural, positive

from cmg.errors import DataError
from experiments.report import write_report
from experiments.runner import evaluate_missing, outlook, pick, run_missing

DOCS = Path(__file__).parents[1] / "docs" / "experiments"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 if something cannot be done, 130 if stopped."""
    args = _parse(argv)
    try:
        chosen = pick(args.only, args.scale)
        if args.run:
            run_missing(chosen, args.seeds, args.results, args.runs, args.jobs)
        elif args.evaluate:
            evaluate_missing(chosen, args.seeds, args.results, args.runs, args.jobs)
        elif args.report:
            write_report(args.results, args.docs)
        else:
            print(outlook(chosen, args.seeds, args.results, args.jobs))
    except (DataError, OSError) as error:
        print(f"cmg_experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cmg_experiments: stopped. The same command goes on.", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--run", action="store_true", help="train and test")
    action.add_argument("--evaluate", action="store_true", help="more tasks on stored models")
    action.add_argument("--report", action="store_true", help="write --docs from --results")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="experiments; all if not given")
    parser.add_argument(
        "--seeds", nargs="+", type=natural, default=[0, 1, 2], metavar="S", help="0 1 2 by default"
    )
    parser.add_argument("--scale", type=factor, default=1.0, help="factor of all epochs")
    parser.add_argument("--jobs", type=positive, default=1, help="processes at a time")
    parser.add_argument(
        "--results", type=Path, default=DOCS / "results", metavar="DIR", help="of JSON files"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/experiments"), metavar="DIR", help="of models"
    )
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="of the report")
    return parser.parse_args(argv)


def factor(text: str) -> float:
    """A factor, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, and finite; came {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
