"""Write a data set as a folder of .npy files, in float16: from media files, or from other formats.

python examples/cmg_features.py FOLDER --output STORE                videos, sound and captions
python examples/cmg_features.py clips.npz --output STORE             your own features
python examples/cmg_features.py vggsound-avel:ROOT --output STORE    the authors' features
python examples/cmg_pretrain.py --data STORE

"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cmg import data as generic
from cmg.clips import TEST, TRAIN
from cmg.command import exit_code, natural, positive_float, positive_int
from cmg.errors import DataError
from cmg.media import encoders
from cmg.media import folder as media
from cmg.media.encoders import MODALITIES, default_encoder
from cmg.media.extract import Settings, extract
from cmg.media.folder import TABLE, is_media_folder, open_folder
from cmg.ranks import local_device
from cmg.report import description
from cmg.sources import open_data
from cmg.store import write_store


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    if is_media_folder(args.data):
        stopped = "stopped. Hint: --resume continues after the last complete batch."
        return exit_code("cmg_features", lambda: run_media(args), lambda: stopped)
    return exit_code("cmg_features", lambda: run(args), lambda: "stopped. Nothing was written.")


def run(args: argparse.Namespace) -> None:
    """Open the data, and write the folder."""
    name, clips = open_data(args.data, args.modalities, args.text_encoder, "optional")
    print(description(name, clips), flush=True)
    write_store(args.output, clips)
    print(f"written to {args.output}")


def run_media(args: argparse.Namespace) -> None:
    """Encode media files."""
    chosen = {name: _encoder(name, getattr(args, name)) for name in MODALITIES}
    for name in args.modalities or ():
        if name not in chosen:
            raise DataError(f"--modalities: must be of {' '.join(MODALITIES)}; got {name!r}.")
    settings = Settings(
        args.segments, args.seconds, {name: chosen[name] for name in args.modalities or MODALITIES}
    )
    folder = open_folder(args.data)
    print(
        f"{args.data}: {len(folder.sources)} clips, {len(folder.class_names)} classes", flush=True
    )
    if 0 < sum(folder.has(split) for split in (TRAIN, TEST)) < 2:
        rule = "training takes clips of train and of test, or none of either"
        print(f"warning: {rule}; see the column split of {TABLE}.", file=sys.stderr)
    report = extract(
        folder,
        args.output,
        settings,
        workers=args.workers,
        device=local_device(args.device),
        resume=args.resume,
    )
    print(report)
    print(f"written to {args.output}")


def _encoder(modality: str, name: str | None) -> str:
    """The name of an encoder; that of a local folder is its path, for later use from anywhere."""
    if name is None:
        return default_encoder(modality)
    return os.path.abspath(name) if Path(name).is_dir() else name


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}{media.__doc__}\n{encoders.__doc__}",
        epilog=generic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "data", metavar="DATA", help="folder of media files, or as --data of cmg_pretrain.py"
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="STORE", help="new folder for the features"
    )
    parser.add_argument(
        "--modalities", nargs="+", metavar="NAME", help="modalities to write; all by default"
    )
    parser.add_argument(
        "--text-encoder", default="bert-base-uncased", help="of the prompts of the authors' sets"
    )
    files = parser.add_argument_group("media files")
    files.add_argument(
        "--segments", type=positive_int, default=10, metavar="T", help="of a clip (default: 10)"
    )
    files.add_argument(
        "--seconds", type=positive_float, default=10.0, help="length of a clip (default: 10)"
    )
    for name in MODALITIES:
        files.add_argument(
            f"--{name}", metavar="ENCODER", help=f"see above; default: {default_encoder(name)}"
        )
    files.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="processes that decode; default: one for each core, at most 8",
    )
    files.add_argument(
        "--resume", action="store_true", help="continue an extraction that was interrupted"
    )
    files.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
