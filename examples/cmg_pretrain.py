"""Cross-modal generalisation: labels of one modality, tests on another.

Pre-trains Uni-Code on unlabelled clips that show the same events in several modalities, then trains
a classifier on labels of ONE modality and tests it on ANOTHER, in every direction.

    python examples/cmg_pretrain.py                            the built-in digits, 2 minutes
    python examples/cmg_pretrain.py --data clips.npz           a file of yours, as below
    python examples/cmg_pretrain.py --modalities audio video   two of the modalities
    python examples/cmg_pretrain.py --without cpc              without a part of the method
    python examples/cmg_pretrain.py --data vggsound-avel:ROOT  the authors' files
        --preset cmg-released --downstream ave:ROOT avvp:ROOT
    torchrun --nproc-per-node 2 examples/cmg_pretrain.py       the same run on two processes

Writes metrics.json, model.safetensors, config.json, codes.png and training.png into --output; with
--downstream also downstream.json, the scores on each of these sets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cmg import data as generic
from cmg import digits
from cmg.checkpoint import save_model
from cmg.data import PRETRAIN, TEST, Clips, load_clips
from cmg.errors import DataError
from cmg.evaluation import Scores, evaluate
from cmg.figures import plot_codes, plot_training, require_matplotlib
from cmg.files import make_writable, write_atomic
from cmg.model import PARTS, Config, UniCode
from cmg.presets import PRESETS
from cmg.ranks import is_first, joined
from cmg.reference import cca_reference
from cmg.released import SETS, load_released
from cmg.report import code_counts, codebook_summary, table, write_metrics
from cmg.standardize import Standardizer
from cmg.training import Recipe, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if all went well, 2 if the input cannot be used, 130 if stopped."""
    try:
        run(_parse(argv))
    except (DataError, OSError) as error:
        return _end(f"{error}", 2)
    except KeyboardInterrupt:
        return _end("stopped. Hint: --resume goes on after the last whole epoch.", 130)
    return 0


def _end(message: str, code: int) -> int:
    if is_first():
        print(f"cmg_pretrain: {message}", file=sys.stderr)
    return code


def run(args: argparse.Namespace) -> None:
    """Data, pre-training, evaluation, report: in this order."""
    began = time.monotonic()
    require_matplotlib()
    device = _device(args.device)
    name, clips = open_data(args.data, args.modalities, args.text_encoder)
    elsewhere = {data: _open_elsewhere(data, clips, args) for data in args.downstream}
    folder = args.output or Path("runs") / name
    make_writable(folder)
    standardizer = Standardizer.fit(clips)
    features = standardizer.cells(clips.features)

    settings, training = PRESETS[args.preset]
    torch.manual_seed(args.seed)
    config = Config.of(features, without=tuple(sorted(set(args.without))), **settings)
    model = UniCode(config).to(device)
    rows = clips.rows(PRETRAIN)
    recipe = Recipe(**training)
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    elif "epochs" not in training:
        recipe = recipe.lasting(len(rows))
    identity = {
        "data": f"{name} {standardizer.fingerprint():08x}",
        "seed": args.seed,
        **config.json(),
    }
    with joined(device):
        trainer = Trainer(model, features, rows, recipe, folder, identity)
        history = trainer.fit(resume=args.resume)
    if not is_first():
        return

    codes, indices = model.quantize(features)
    scores = evaluate(codes, clips, args.seed)
    held_out = {m: i[clips.rows(TEST)] for m, i in indices.items()}
    metrics = {
        "dataset": name,
        "modalities": list(clips.modalities),
        "seed": args.seed,
        "epochs": recipe.epochs,
        **scores,
        "codebook": codebook_summary(held_out, config.codebook_size),
        "seconds": time.monotonic() - began,
    }
    save_model(folder, model.state_dict() | standardizer.tensors(), config.json())
    plot_codes(
        folder / "codes.png", model.quantizer.codebook, code_counts(held_out, config.codebook_size)
    )
    plot_training(folder / "training.png", history)
    write_metrics(folder / "metrics.json", metrics)
    scored = {
        data: _score_as_it_is(model, standardizer, other, args.seed)
        for data, other in elsewhere.items()
    }
    if scored:
        write_atomic(folder / "downstream.json", json.dumps(scored, indent=2).encode())
    else:  # one of an earlier run would be taken for this model's
        (folder / "downstream.json").unlink(missing_ok=True)
    reference = cca_reference(clips, args.seed) if args.reference else None
    print(_summary(metrics, folder))
    print(table(metrics, reference))
    for data, found in scored.items():
        print(f"\n{data}, the model as it is:\n\n{table(found)}")


def open_data(
    data: str, modalities: Sequence[str] | None, text_encoder: str = ""
) -> tuple[str, Clips]:
    """The clips, and what to call them."""
    kind, _, rest = data.partition(":")
    if kind in SETS:
        name, clips = kind, load_released(kind, rest, modalities, text_encoder)
    elif kind == "digits" and (rest.isdecimal() or data == "digits"):
        name, clips = data.replace(":", "-"), load_clips(digits.load(int(rest or 0)), modalities)
    else:
        name, clips = Path(data).stem, load_clips(data, modalities)
    if len(clips.modalities) < 2:
        raise DataError(
            f"{data}: cross-modal training takes two modalities or more; "
            f"came {' '.join(clips.modalities)}. Hint: each is a float array [N, T, ..., C]."
        )
    return name, clips


def _open_elsewhere(data: str, clips: Clips, args: argparse.Namespace) -> Clips:
    """Another set of the same features, in the modalities that both have."""
    _, other = open_data(data, None, args.text_encoder)
    both = [name for name in clips.modalities if name in other.features]
    if len(both) < 2:
        raise DataError(
            f"--downstream {data}: must have two of {' '.join(clips.modalities)} or more; "
            f"came {' '.join(other.modalities)}."
        )
    other = other.only(both)
    for name, x in other.features.items():
        T, C = clips.features[name].shape[1], clips.features[name].shape[-1]
        if (x.shape[1], x.shape[-1]) != (T, C):
            rule = f"must be [N, {T}, ..., {C}], as in pre-training"
            raise DataError(f"--downstream {data}: {name}: {rule}; came {list(x.shape)}.")
    return other


def _score_as_it_is(
    model: UniCode, standardizer: Standardizer, clips: Clips, seed: int
) -> dict[str, Scores]:
    """Every direction on other clips, without any training but that of the heads."""
    codes, _ = model.quantize(standardizer.cells(clips.features))
    return evaluate(codes, clips, seed)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        number = torch.zeros((), device=name)
        number.item()  # "meta" has none
        return number.device
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: torch cannot use it here ({error}).") from error


def _summary(metrics: dict[str, object], folder: Path) -> str:
    book = metrics["codebook"]
    assert isinstance(book, dict)
    return (
        f"{metrics['dataset']}: {metrics['epochs']} epochs, {metrics['seconds']:.0f} s in all; "
        f"{book['used']} of {book['size']} codes in use, {book['shared_fraction']:.0%} of them "
        f"shared; results in {folder}\n"
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=generic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (default), digits:SEED for another rendering, an npz file, or the authors' "
        f"features as {', '.join(f'{kind}:ROOT' for kind in SETS)}",
    )
    parser.add_argument(
        "--modalities",
        nargs="+",
        metavar="NAME",
        help="which of the data's modalities; all if not given",
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=PARTS, help="leave out parts of the method"
    )
    parser.add_argument(
        "--preset",
        default="digits",
        choices=PRESETS,
        help="of model and recipe, see cmg/presets.py",
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        help="default: those of the preset; of digits, more where clips are few, for 420 steps",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of weights, batches and heads")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/NAME-OF-DATA")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --output"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--downstream",
        nargs="+",
        default=[],
        metavar="DATA",
        help="also train heads and test on these sets, the pre-trained model as it is, in the "
        "modalities that it and a set have in common",
    )
    parser.add_argument(
        "--text-encoder",
        default="bert-base-uncased",
        help="for the prompts of the authors' sets: a Hugging Face name or folder",
    )
    parser.add_argument("--reference", choices=["cca"], help="also print what linear CCA reaches")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """A number of things, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; came {text}")
    return value


def natural(text: str) -> int:
    """A seed, for argparse."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be 0 to 2**32 - 1; came {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
