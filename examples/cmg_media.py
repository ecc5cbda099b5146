"""Write the built-in digits as media files: video with sound, captions and a table of the clips.

python examples/cmg_media.py FOLDER
python examples/cmg_features.py FOLDER --output STORE
python examples/cmg_pretrain.py --data STORE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg.command import exit_code, natural, positive_int, seed
from cmg.digits import media


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    return exit_code("cmg_media", lambda: run(args), lambda: "stopped. Nothing was written.")


def run(args: argparse.Namespace) -> None:
    """Write the folder."""
    media.write_media(args.folder, args.seed, clips=tuple(args.clips), workers=args.workers)
    print(f"written to {args.folder}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=media.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument("--seed", type=seed, default=0, help="seed of the rendering; default: 0")
    parser.add_argument(
        "--clips",
        nargs=3,
        type=natural,
        default=(700, 400, 300),
        metavar="N",
        help="number of clips of the splits pretrain, train and test; default: 700 400 300",
    )
    parser.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="number of processes; default: the number of CPUs, 8 at most",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
