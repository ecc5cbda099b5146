"""Convert a data set to a folder of .npy files, in float16, to train from without loading it.

python examples/cmg_features.py vggsound-avel:ROOT --output STORE    the authors' files
python examples/cmg_features.py clips.npz --output STORE             your own file
python examples/cmg_pretrain.py --data STORE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg import data as generic
from cmg.command import exit_code
from cmg.report import description
from cmg.sources import open_data
from cmg.store import write_store


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    return exit_code("cmg_features", lambda: run(args), lambda: "stopped. Nothing was written.")


def run(args: argparse.Namespace) -> None:
    """Open the data, and write the folder."""
    name, clips = open_data(args.data, args.modalities, args.text_encoder)
    print(description(name, clips), flush=True)
    write_store(args.output, clips)
    print(f"written to {args.output}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=generic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="as --data of cmg_pretrain.py")
    parser.add_argument("--output", type=Path, required=True, metavar="STORE", help="new folder")
    parser.add_argument(
        "--modalities", nargs="+", metavar="NAME", help="modalities to convert; all by default"
    )
    parser.add_argument("--text-encoder", default="bert-base-uncased", help="see cmg_pretrain.py")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
