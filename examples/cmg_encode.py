"""Encode clips with a trained model: write their tokens, and their classes, to a Parquet file.

    python examples/cmg_encode.py runs/clips --data STORE --output tokens.parquet
    python examples/cmg_encode.py runs/clips --data FOLDER --output tokens.parquet    media files
    python examples/cmg_encode.py runs/clips --data sounds.npz --output tokens.parquet
        --labels-from video                    also the class, by a classifier of codes of video
    python examples/cmg_encode.py user/name --data STORE --output tokens.parquet    from the Hub

RUN is the --output of cmg_pretrain.py. The data need no labels and no split, one modality of the
run is enough, and clips may have any number of segments. Features must be of the encoders that the
run was trained with; a folder of media files (see cmg_features.py) is encoded by them. A row is a
clip in a modality, with the columns id, modality, tokens (-1 where not valid), mask, and, null
without --labels-from, label and probability.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cmg.clips import Clips
from cmg.command import exit_code, positive_float, positive_int
from cmg.errors import DataError
from cmg.media.encoders import MODALITIES
from cmg.media.extract import Settings, temporary_store
from cmg.media.folder import is_media_folder, open_folder
from cmg.model import UniCode
from cmg.ranks import local_device
from cmg.sources import open_to_encode
from cmg.token_table import require_parquet, write_tokens
from cmg.trained import TrainedModel


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    return exit_code("cmg_encode", lambda: run(args), lambda: "stopped. Nothing was written.")


def run(args: argparse.Namespace) -> None:
    """Load the model, open the data, and write the file."""
    device = local_device(args.device)
    model = UniCode.from_pretrained(args.run).to(device)
    if args.labels_from:
        model.classify_tokens({}, args.labels_from)  # raises before the work is done
    require_parquet(args.output)
    with ExitStack() as held:
        data = args.data
        if is_media_folder(data):
            folder = open_folder(data)
            store = temporary_store(folder, _settings(model, args), device)
            data, report = held.enter_context(store)
            print(report)
        clips = open_to_encode(str(data), [*model.semantic], args.modalities, args.text_encoder)
        for text in _other_encoders(model, clips):
            print(f"warning: {text}", file=sys.stderr)
        write_tokens(args.output, model, clips, args.labels_from)
    names = " ".join(clips.modalities)
    print(f"{len(clips.split):,} clips of {names}, {len(model.codebook)} codes: {args.output}")


def _settings(model: TrainedModel, args: argparse.Namespace) -> Settings:
    """How the clips of the run were encoded, but for what the arguments say."""
    wanted = set(args.modalities or MODALITIES)
    encoders = {name: x for name, x in model.about.encoders.items() if name in wanted}
    if not encoders or model.about.seconds is None:
        rule = "does not say how its features were made from files"
        hint = "encode them with cmg_features.py as those of the run were, and give that folder"
        raise DataError(f"{model.source}: {rule}. Hint: {hint}.")
    segments, seconds = args.segments or model.config.segments, args.seconds or model.about.seconds
    return Settings(segments, seconds, encoders)


def _other_encoders(model: TrainedModel, clips: Clips) -> list[str]:
    """What is wrong with the encoders of the features, as far as they are known."""
    return [
        f"{name}: the features are of {clips.encoders[name]}, and the run was trained with {known}."
        for name, known in model.about.encoders.items()
        if clips.encoders.get(name, known) != known
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, or user/name on the Hub")
    parser.add_argument(
        "--data", required=True, help="folder of media files, or as --data of cmg_pretrain.py"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="Parquet file")
    parser.add_argument(
        "--labels-from", metavar="NAME", help="also classify, by labels of this modality"
    )
    parser.add_argument(
        "--modalities", nargs="+", metavar="NAME", help="modalities to encode; all by default"
    )
    for name, kind in (("segments", positive_int), ("seconds", positive_float)):
        text = "of a clip of media files; default: as in training"
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--text-encoder", default="bert-base-uncased", help="see cmg_pretrain.py")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
