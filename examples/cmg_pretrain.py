"""Cross-modal generalisation: train on labels of one modality, test on another.

Pre-trains Uni-Code on unlabelled clips that show the same events in several modalities. Then trains
a classifier on labels of ONE modality and tests it on ANOTHER, in every direction.

    python examples/cmg_pretrain.py                            the built-in digits, 2 minutes
    python examples/cmg_pretrain.py --data numbers             a harder built-in set
    python examples/cmg_pretrain.py --data clips.npz           your own file or folder, see below
    python examples/cmg_pretrain.py --data datasets:clips      the same in Hugging Face datasets
    python examples/cmg_pretrain.py --modalities audio video   two of the modalities
    python examples/cmg_pretrain.py --without cpc              without a part of the method
    python examples/cmg_pretrain.py --data vggsound-avel:ROOT  the authors' files
        --preset cmg-released --downstream ave:ROOT avvp:ROOT
    torchrun --nproc-per-node 2 examples/cmg_pretrain.py       the same run on two processes

Without labels in the data, it trains the model, and leaves the classifiers out.

Writes metrics.json, model.safetensors, config.json, codes.png and training.png into --output; with
--downstream also downstream.json, the scores on each of these sets.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmg import data as generic
from cmg.advice import about_data, about_run
from cmg.batches import IN_MEMORY, Batches
from cmg.clips import PRETRAIN, TEST, TRAIN
from cmg.command import exit_code, natural, natural_float, positive_int, seed
from cmg.evaluation import Scores, evaluate, fit_heads
from cmg.figures import plot_codes, plot_training, require_matplotlib
from cmg.files import in_use, make_writable, write_atomic
from cmg.heads import Codes
from cmg.model import PARTS, Config, UniCode
from cmg.presets import PRESETS
from cmg.ranks import is_first, joined, local_device
from cmg.reference import cca_reference, check_reference
from cmg.released import SETS
from cmg.report import code_counts, codebook_summary, description, headline, table, write_metrics
from cmg.sources import open_data, open_downstream
from cmg.standardize import Standardizer
from cmg.stored import save_run
from cmg.training import CHECKPOINT, Execution, Recipe, Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    return exit_code("cmg_pretrain", lambda: run(args), lambda: _stopped(args.output))


def run(args: argparse.Namespace) -> None:
    """Open the data, pre-train, evaluate and report."""
    with ExitStack() as held:
        _run(args, held)


def _run(args: argparse.Namespace, held: ExitStack) -> None:
    began = time.monotonic()
    require_matplotlib()
    device = local_device(args.device)
    name, clips = open_data(args.data, args.modalities, args.text_encoder, "optional")
    if args.reference:
        check_reference(clips)
    if not clips.labelled:
        clips = clips.holding_out()
    downstream = {x: open_downstream(x, clips, args.text_encoder) for x in args.downstream}
    folder = args.output = args.output or Path("runs") / name
    make_writable(folder)
    if is_first():
        held.enter_context(in_use(folder))
        print(description(name, clips), flush=True)
        _warn(about_data(clips))
    standardizer = Standardizer.of(clips)
    batches = Batches(clips, standardizer, args.in_memory)

    settings, training = PRESETS[args.preset]
    torch.manual_seed(args.seed)
    without = tuple(sorted({*args.without, *settings.get("without", ())}))
    config = Config.of(batches, **{**settings, "without": without})
    model = UniCode(config).to(device)
    rows = clips.rows(PRETRAIN)
    recipe = Recipe(**training, accumulate=args.accumulate)
    if "epochs" not in training:
        recipe = recipe.lasting(len(rows))
    if args.epochs:
        recipe = replace(recipe, epochs=args.epochs)
    execution = Execution(args.precision, args.compile, args.workers)
    identity = {
        "data": f"{name} {standardizer.fingerprint():08x}",
        "seed": args.seed,
        **config.json(),
    }
    with joined(device):
        trainer = Trainer(
            model, batches, rows, clips.validation_rows(), recipe, folder, identity, execution
        )
        history = trainer.fit(resume=args.resume)
    if not is_first():
        return

    save_run(folder, model, standardizer, clips)  # whatever happens in the evaluation
    codes, indices = _quantized(model, batches)
    heads = fit_heads(codes, clips)
    save_run(folder, model, standardizer, clips, heads)
    codebook = model.quantizer.codebook
    held_out = {m: i[clips.test_rows()] for m, i in indices.items()}
    metrics = {
        "dataset": name,
        "modalities": list(clips.modalities),
        "seed": args.seed,
        "epochs": recipe.epochs,
        **evaluate(codes, indices, clips, len(codebook), heads),
        "codebook": codebook_summary(held_out, len(codebook)),
        "seconds": time.monotonic() - began,
    }
    plot_codes(folder / "codes.png", codebook, code_counts(held_out, len(codebook)))
    plot_training(folder / "training.png", history)
    write_metrics(folder / "metrics.json", metrics)
    transferred: dict[str, dict[str, Scores]] = {}
    for data, others in downstream.items():
        coded = _quantized(model, Batches(others, standardizer, args.in_memory))
        transferred[data] = evaluate(*coded, others, len(codebook))
    if transferred:
        write_atomic(folder / "downstream.json", json.dumps(transferred, indent=2).encode())
    else:  # remove the file of an earlier run, which would pass for this model's
        (folder / "downstream.json").unlink(missing_ok=True)
    reference = cca_reference(clips) if args.reference else None
    saturation = model.club_saturation(batches, rows[:100])
    _warn(about_run(metrics, history, trainer.batch_size, saturation))
    print(headline(metrics, folder))
    print(table(metrics, reference))
    for data, found in transferred.items():
        print(f"\n{data}, without further pre-training:\n\n{table(found)}")


def _quantized(model: UniCode, batches: Batches) -> tuple[dict[str, Codes], dict[str, Tensor]]:
    """Codes, and their indices, of the clips of splits 1 and 2, or without labels of split 3."""
    clips = batches.clips
    rows = clips.rows(TRAIN, TEST) if clips.labelled else clips.test_rows()
    indices = model.quantize(batches, rows)
    return {name: Codes(i, model.quantizer.codebook) for name, i in indices.items()}, indices


def _warn(texts: list[str]) -> None:
    for text in texts:
        print(f"warning: {text}", file=sys.stderr)


def _stopped(folder: Path | None) -> str:
    """The message of a run that was interrupted."""
    if folder is not None and (folder / CHECKPOINT).is_file():
        return "stopped. Hint: --resume continues after the last complete epoch."
    return "stopped before the end of the first epoch; there is nothing to resume."


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=generic.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data",
        default="digits",
        help="digits (default) or numbers, digits:SEED for another rendering, an npz file, a "
        "folder of .npy files, datasets:FOLDER or datasets:NAME for Hugging Face datasets on disk "
        f"or on the Hub, or the authors' features as {', '.join(f'{kind}:ROOT' for kind in SETS)}",
    )
    parser.add_argument(
        "--modalities", nargs="+", metavar="NAME", help="modalities to use; all by default"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=PARTS, help="leave out parts of the method"
    )
    parser.add_argument(
        "--preset",
        default="digits",
        choices=PRESETS,
        help="settings of model and training, see cmg/presets.py",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        help="by default those of the preset; with the preset digits, on any data, as many as make "
        "840 steps, or more if there are more than 700 clips of split 0, but at most 300",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batches")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/NAME-OF-DATA")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoint in --output"
    )
    parser.add_argument(
        "--in-memory",
        type=natural_float,
        default=IN_MEMORY,
        metavar="GIB",
        help="standardised features up to this size are kept in memory (default: 1 GiB); larger "
        "ones are stored in float16, in the folder of the data, and read batch by batch",
    )
    parser.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="processes that read batches ahead; default: none if features are in memory, else 2",
    )
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="bf16: autocast of encoders, decoders and losses; auto: bf16 on a GPU that has it",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile encoders and decoders with torch.compile"
    )
    parser.add_argument(
        "--accumulate",
        type=positive_int,
        default=1,
        metavar="N",
        help="batches whose gradients and codebook statistics make one step (default: 1)",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--downstream",
        nargs="+",
        default=[],
        metavar="DATA",
        help="also train and test heads on these sets with the frozen pre-trained model, in the "
        "modalities that both have",
    )
    parser.add_argument(
        "--text-encoder",
        default="bert-base-uncased",
        help="for the prompts of the authors' sets: a Hugging Face name or folder",
    )
    parser.add_argument(
        "--reference",
        choices=["cca"],
        help="also print the scores of linear CCA, which reads all features into memory",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
