"""Take a run apart: what encoders, quantization, crossing and head lose, in each direction.

    python examples/cmg_diagnose.py runs/digits                          the demo's digits
    python examples/cmg_diagnose.py runs/clips --data clips.npz          your own data
    python examples/cmg_diagnose.py runs/clips --data clips.npz --test   once, at the end

RUN is the --output of cmg_pretrain.py. It measures by cross-validation on split 1, or with --test
on split 2. "raw", "z" and "codes" are trained and tested on b; "z across" and "codes across" are
trained on a; "weak penalty" is "codes across" with a tenth of the head's penalty.

"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg import diagnosis
from cmg.command import exit_code
from cmg.diagnosis import diagnose, diagnosis_table
from cmg.run import TrainedRun
from cmg.sources import open_data


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    return exit_code("cmg_diagnose", lambda: run(args), lambda: "stopped.")


def run(args: argparse.Namespace) -> None:
    """Load a run and its clips, measure, and print."""
    _, clips = open_data(args.data, None, args.text_encoder)
    trained = TrainedRun.load(args.run, clips, seed=0)
    z, size = trained.semantic(), trained.model.quantizer.codebook_size
    clips = clips.only(trained.config.shapes)
    found = diagnose(clips, z, *trained.codes, size, test=args.test)
    print(json.dumps(found, indent=2) if args.json else diagnosis_table(found))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{diagnosis.__doc__}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--data", default="digits", help="the --data of the run; default: digits")
    parser.add_argument("--test", action="store_true", help="test on split 2")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--text-encoder", default="bert-base-uncased", help="see cmg_pretrain.py")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
