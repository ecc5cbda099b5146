"""Pre-training on unlabelled clips, with a checkpoint after every epoch and a log."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmvq.distributed import average_, rank, world_size

from .batches import Batch, Batches, Loader, Order
from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .errors import DataError
from .model import UniCode
from .ranks import on_all_ranks

CHECKPOINT = "checkpoint.safetensors"
_WARMUP = 20  # steps
_ADDED = {
    "recipe.accumulate": 1,
    "matching": "segments",
}  # settings that older checkpoints lack, and their value
History = dict[str, list[float]]  # quantity -> value of each epoch, NaN before it is measured


@dataclass(frozen=True)
class Recipe:
    """Settings of training.

    Attributes:
        epochs: Number of passes over the clips of split 0.
        batch_size: Clips in a batch; all clips if there are fewer.
        accumulate: Batches whose gradients and codebook statistics make one step. Negatives of
            contrasts, and the statistics of batch normalisation, are of one batch.
        segments: Fraction of the segments of a clip, drawn at random, that a step uses. Fewer make
            steps shorter, and clips harder to recognise by rote.
        most_segments: Number of segments that a step uses at most; None: no limit.
        learning_rate: Learning rate of AdamW, which trains all parameters except those of CLUB.
        weight_decay: Weight decay of AdamW.
        schedule: Schedule of the learning rate. "cosine" is a short warm-up, then cosine decay.
        club_learning_rate: Learning rate of Adam, which trains the networks of CLUB.
        club_steps: Steps of CLUB's networks for each batch, before its gradients.
        clip_norm: Maximum norm of the gradient.
        reconstruction: Weight of the reconstruction error.
        cpc: Weight of Cross-CPC.
        contrast: Weight of the contrast between the features themselves.
        club: Weight of CLUB.
        commitment: Weight of the commitment loss.
        matching: Weight of code matching.
        spread: Fraction of the epochs before the codebook is used, so that features first spread
            over their space. The last epoch always uses it.
        ramp: Fraction of the epochs over which the weights of CLUB, commitment and code matching
            then grow to their full values.
    """

    epochs: int = 84
    batch_size: int = 64
    accumulate: int = 1
    segments: float = 0.5
    most_segments: int | None = 10
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    club_learning_rate: float = 1e-3
    club_steps: int = 1
    clip_norm: float = 5.0
    reconstruction: float = 1.0
    cpc: float = 0.5
    contrast: float = 1.0
    club: float = 1.0
    commitment: float = 0.5
    matching: float = 0.6
    spread: float = 0.25
    ramp: float = 0.15

    def lasting(self, clips: int) -> Recipe:
        """The same settings; 840 steps for up to 700 clips, and 840 sqrt(clips / 700) for more.

        But at most 300 epochs, which fewer than 192 clips reach: on three sets of 60, 60 and 120
        clips, 840 epochs were worse (cross-validation on split 1: .45, .74, .89; 300: .52, .76,
        .93).
        """
        steps = 840 * max(1.0, clips / 700) ** 0.5
        epoch = max(1, clips // (self.batch_size * self.accumulate))  # in steps
        return replace(self, epochs=min(math.ceil(steps / epoch), 300))


@dataclass(frozen=True)
class Execution:
    """How a model is trained. The result depends on it through rounding alone.

    Attributes:
        precision: "fp32", "bf16" (autocast of encoders, decoders and losses; weights, codebook and
            search stay in float32), or "auto": bf16 on a GPU that has it, otherwise fp32.
        compile: Whether to compile encoders and decoders with `torch.compile`.
        workers: Processes that read batches ahead; None: 0 if features are in memory, otherwise
            2, or as many as there are other CPU cores if they are fewer.
    """

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    workers: int | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of forward passes."""
        bf16 = self.precision == "bf16"
        if self.precision == "auto" and device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    def readers(self, batches: Batches) -> int:
        """Number of worker processes for a data set."""
        if self.workers is not None:
            return self.workers
        return min(2, max(1, (os.cpu_count() or 1) - 1)) if batches.streamed else 0


class Trainer:
    """Trains a model. The result depends only on the arguments and the seed.

    With several ranks, each processes an equal part of every batch, and all get the same model.

    Args:
        model: Model to train, on its device.
        batches: The data set.
        rows: int64, indices of the clips to train on.
        held_out: int64, indices of other clips, to choose the size of the codebook on.
        recipe: Settings of training.
        folder: Folder of the checkpoint, and of the TensorBoard log if TensorBoard is installed;
            None: neither is written.
        identity: Numbers and strings that must be the same if the run is resumed.
        execution: Precision, compilation and reading.

    Raises:
        DataError: There are fewer than two clips, or fewer than a step takes, or a batch cannot be
            divided by the ranks.
    """

    quiet = False  # no progress bar

    def __init__(
        self,
        model: UniCode,
        batches: Batches,
        rows: Tensor,
        held_out: Tensor,
        recipe: Recipe,
        folder: Path | None,
        identity: Mapping[str, Any],
        execution: Execution = Execution(),
    ) -> None:
        self.model, self.batches, self.recipe = model, batches, recipe
        self.execution = execution
        self.rows, self.held_out = rows, held_out
        self.folder = folder
        self.identity = {**identity, **{f"recipe.{k}": x for k, x in asdict(recipe).items()}}
        if len(rows) < 2:
            raise DataError(f"pre-training takes two clips of split 0 or more; got {len(rows)}.")
        self.batch_size = min(recipe.batch_size, len(rows))
        if self.batch_size % world_size():
            raise DataError(
                f"a batch of {self.batch_size} clips cannot be divided by {world_size()} ranks. "
                "Hint: start a number of ranks that divides it."
            )
        self.device = next(model.parameters()).device
        self.order = Order(rows, self.batch_size, recipe.accumulate)
        self.steps = self.order.steps  # in an epoch
        if not self.steps:
            step = self.batch_size * recipe.accumulate
            raise DataError(
                f"a step of {recipe.accumulate} batches of {self.batch_size} clips takes {step} "
                f"clips of split 0; got {len(rows)}. Hint: a smaller --accumulate."
            )
        self.loader = Loader(batches, self.order, execution.readers(batches), self.device)
        if execution.compile:
            # a class has a graph for each modality, with gradients and without
            torch._dynamo.config.recompile_limit = 64  # type: ignore[attr-defined]
            for part in (model.semantic, model.specific, model.decoder):
                for network in part.values():
                    network.compile()
        club = list(model.club.parameters())
        self.others = [p for part, p in model.named_parameters() if not part.startswith("club.")]
        self.optimizer = torch.optim.AdamW(
            self.others, recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.club_optimizer = torch.optim.Adam(club, recipe.club_learning_rate) if club else None
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.history: History = {}
        self.epoch = 0

    def fit(self, *, resume: bool = False) -> History:
        """Train to the last epoch; with `resume`, from the last checkpoint in the folder.

        Raises:
            DataError: There is no checkpoint to resume from, or it belongs to another run.
        """
        if resume and self.folder is not None:
            path = self.folder / CHECKPOINT
            hint = "Hint: --output must be a folder that all machines share."
            rule = f"{path}: other ranks do not find this checkpoint. {hint}"
            on_all_ranks(lambda: self._load(path), self.device, rule)
        kept = None if rank() else self.folder
        log = None if kept is None else _tensorboard(kept, self.epoch)
        clips = len(self.order) * self.batch_size
        silent = {"disable": True} if self.quiet or rank() else {}  # otherwise by TQDM_DISABLE
        with tqdm(
            desc="pre-training",
            initial=self.epoch * clips,
            total=self.recipe.epochs * clips,
            unit="clip",
            **silent,
        ) as bar:
            while self.epoch < self.recipe.epochs:
                for name, value in self._train_epoch(bar).items():
                    self.history.setdefault(name, [math.nan] * self.epoch).append(value)
                    if log is not None:
                        log.add_scalar(name, value, self.epoch)
                self.epoch += 1
                if kept is not None:
                    self._save(kept / CHECKPOINT)
        if log is not None:
            log.close()
        self.loader.close()
        return self.history

    def _train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        self.model.train()
        self.order.shuffle()
        weights, group = self._weights(), self.recipe.accumulate
        if "commitment" in weights and not self.model.quantizer.ema_codebook.ready:
            rows, held_out = self._some(self.rows), self._some(self.held_out)
            self.model.start_codebook(self.batches, rows, held_out)
        self.model.quantizer.update = "auto" if group == 1 else "manual"
        self.model.quantizer.usage(reset=True)
        total: dict[str, Tensor] = {}
        for n, batch in enumerate(self.loader):
            terms = self._backward(batch, weights)
            for name, term in terms.items():
                total[name] = total.get(name, 0) + term.detach() / len(self.order)
            if (n + 1) % group == 0:
                self._step(weights)
            bar.update(self.batch_size)
        average_(total.values())
        record = {name: float(value) for name, value in total.items()}
        bar.set_postfix({name: f"{value:.2f}" for name, value in record.items()}, refresh=False)
        usage = self.model.quantizer.usage()
        record["codes in use"] = float((~usage.dead).sum())
        record["codes shared"] = float(usage.shared.sum())
        return record

    def _some(self, rows: Tensor, most: int = 20_000) -> Tensor:
        """Clips spread evenly over `rows`, of at most `most` segments."""
        count = min(len(rows), max(2, most // self.batches.segments))
        return rows[torch.linspace(0, len(rows) - 1, count).long()]

    def _backward(self, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Update the networks of CLUB; compute the terms and their gradients on some segments."""
        T = self.batches.segments
        S = min(math.ceil(T * self.recipe.segments), self.recipe.most_segments or T)
        chosen = torch.randperm(T)[:S].sort().values
        batch = self.batches.ready(batch, self.device, chosen)
        with self.execution.autocast(self.device):
            features = self.model.encode(batch)
        if self.club_optimizer is not None:
            for _ in range(self.recipe.club_steps):
                self.club_optimizer.zero_grad()
                self.model.club_fit(features, batch.masks).backward()
                average_([p.grad for p in self.model.club.parameters()])
                self.club_optimizer.step()
        with self.execution.autocast(self.device):
            terms = self.model.losses(batch, features, quantize="commitment" in weights)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        (loss / self.recipe.accumulate).backward()
        return terms

    def _step(self, weights: Mapping[str, float]) -> None:
        """Update the other parameters, and the codebook if that waits for several batches."""
        average_([p.grad for p in self.others if p.grad is not None])
        nn.utils.clip_grad_norm_(self.others, self.recipe.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.accumulate > 1 and "commitment" in weights:
            self.model.quantizer.update_codebook()
        self.schedule.step()

    def _weights(self) -> dict[str, float]:
        """The weight of every term in this epoch; without the codebook, its terms are absent."""
        r = self.recipe
        progress = self.epoch / r.epochs
        begun = max(0.0, progress - r.spread + 1 / r.epochs)
        grown = min(1.0, begun / r.ramp) if r.ramp else float(begun > 0)
        weights = {"reconstruction": r.reconstruction, "cpc": r.cpc, "contrast": r.contrast}
        weights["club"] = r.club * grown
        if progress >= r.spread or self.epoch == r.epochs - 1:
            weights |= {"commitment": r.commitment * grown, "matching": r.matching * grown}
        return weights

    def _rate(self, step: int) -> float:
        """Learning rate relative to the highest."""
        if self.recipe.schedule == "constant":
            return 1.0
        total = self.recipe.epochs * self.steps
        return min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / total)) / 2

    def _save(self, path: Path) -> None:
        club = None if self.club_optimizer is None else self.club_optimizer.state_dict()
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "history": self.history,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "club_optimizer": club,
            "schedule": self.schedule.state_dict(),
            "random": random_state(),
        }
        save_checkpoint(path, state)

    def _load(self, path: Path) -> int:
        """Restore a checkpoint; its epoch."""
        state = load_checkpoint(path)
        if not isinstance(state.get("identity"), dict):
            raise DataError(f"{path}: not a checkpoint of a run.")
        for name, value in self.identity.items():
            if (was := state["identity"].get(name, _ADDED.get(name))) != value:
                setting = name.removeprefix("recipe.")
                raise DataError(
                    f"{path}: the checkpoint is of another run: {setting} was {was}, now it is "
                    f"{value}. Hint: use the same arguments, or another --output."
                )
        try:
            self.epoch, self.history = state["epoch"], state["history"]
            if type(self.epoch) is not int or not 0 <= self.epoch <= self.recipe.epochs:
                raise ValueError(f"its epoch is {self.epoch!r}")
            if any(len([float(x) for x in y]) > self.epoch for y in self.history.values()):
                raise ValueError(f"its history is longer than {self.epoch} epochs")
            if odd := [name for name, x in state["model"].items() if not x.isfinite().all()]:
                raise ValueError(f"{odd[0]} is not finite")
            if state["model"]["quantizer.ema_codebook.initialized"]:
                self.model.resize_codebook(len(state["model"]["quantizer.ema_codebook.codes"]))
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.club_optimizer is not None:
                self.club_optimizer.load_state_dict(state["club_optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            set_random_state(state["random"])
            return self.epoch
        except Exception as error:  # modules and optimizers raise many types
            raise DataError(f"{path}: the checkpoint does not fit ({error!r}).") from error


def _tensorboard(folder: Path, epoch: int) -> Any:
    """A SummaryWriter that replaces the log from `epoch` on; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=epoch)
