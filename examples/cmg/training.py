"""Pre-training on unlabelled clips: two optimisers in turn, a checkpoint every epoch, a log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmvq.distributed import average_, rank, world_size

from .checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from .errors import DataError
from .model import UniCode
from .ranks import share

CHECKPOINT = "checkpoint.safetensors"
_RISE = 20  # steps until the learning rate is full
History = dict[str, list[float]]  # quantity -> its value in every epoch, NaN before its first


@dataclass(frozen=True)
class Recipe:
    """How to train; a fraction of training is a fraction of its epochs.

    Attributes:
        epochs: Passes over the clips of split 0.
        batch_size: Clips a step; all of them if there are fewer.
        learning_rate: AdamW's, for everything but CLUB.
        weight_decay: AdamW's.
        schedule: Of the learning rate: "cosine" is a short rise, then cosine decay to 0.
        club_learning_rate: Adam's, for the networks of CLUB.
        club_steps: Steps of CLUB's own likelihood before each step of all else.
        clip_norm: The largest norm of a gradient.
        reconstruction, cpc, club, commitment, matching: Weights of the terms.
        spread: The fraction that goes by without the codebook: features spread over their space
            first, then codes are taken from them, in the last epoch at the latest.
        ramp: The fraction over which the terms that push on features then grow to their weights.
    """

    epochs: int = 42
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    schedule: Literal["cosine", "constant"] = "cosine"
    club_learning_rate: float = 1e-3
    club_steps: int = 1
    clip_norm: float = 5.0
    reconstruction: float = 1.0
    cpc: float = 1.0
    club: float = 0.02
    commitment: float = 0.5
    matching: float = 0.6
    spread: float = 0.25
    ramp: float = 0.15

    def lasting(self, clips: int, steps: int = 420) -> Recipe:
        """With epochs for so many steps or more: the fewer the clips, the more often each."""
        epoch = max(1, clips // self.batch_size)  # in steps
        return replace(self, epochs=max(self.epochs, math.ceil(steps / epoch)))


class Trainer:
    """Trains a model; what `fit` does depends on its arguments and the seed only.

    Under several ranks each takes its share of every batch, and all end with the same model.

    Args:
        model: What to train, on its device.
        features: Name -> standardised [N, T, P, C] of all clips.
        rows: int64, the clips to train on.
        recipe: How.
        folder: Where the checkpoint goes, and TensorBoard's log if that is installed.
        identity: What a resumed run must have in common with this one: numbers and texts.

    Raises:
        DataError: There are fewer than two clips, or those of a batch cannot be shared out equally.
    """

    quiet = False  # no progress bar

    def __init__(
        self,
        model: UniCode,
        features: Mapping[str, Tensor],
        rows: Tensor,
        recipe: Recipe,
        folder: Path,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.features, self.rows, self.recipe = model, features, rows, recipe
        self.folder = folder
        self.identity = {**identity, **asdict(recipe)}
        if len(rows) < 2:
            raise DataError(f"pre-training takes two clips of split 0 or more; came {len(rows)}.")
        self.batch_size = min(recipe.batch_size, len(rows))
        if self.batch_size % world_size():
            raise DataError(
                f"a batch of {self.batch_size} clips has no {world_size()} equal parts. "
                "Hint: start as many ranks as divide it."
            )
        self.steps = len(rows) // self.batch_size  # an epoch's; clips left over sit it out
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
        """Train to the last epoch, with `resume` from the last checkpoint in the folder.

        Raises:
            DataError: There is no checkpoint to resume from, or it is of another run.
        """
        if resume:
            self._load(self.folder / CHECKPOINT)
        log = None if rank() else _tensorboard(self.folder, self.epoch)
        clips = self.steps * self.batch_size
        silent = {"disable": True} if self.quiet or rank() else {}  # else as TQDM_DISABLE has it
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
                if rank() == 0:
                    self._save(self.folder / CHECKPOINT)
        if log is not None:
            log.close()
        return self.history

    def _train_epoch(self, bar: tqdm[Any]) -> dict[str, float]:
        self.model.train()
        device = next(self.model.parameters()).device
        order = self.rows[torch.randperm(len(self.rows))]
        batches = order[: self.steps * self.batch_size].split(self.batch_size)
        weights = self._weights()
        self.model.quantizer.usage(reset=True)
        total: dict[str, Tensor] = {}
        for batch in batches:
            mine = share(batch)
            terms = self._step({m: x[mine].to(device) for m, x in self.features.items()}, weights)
            for name, term in terms.items():
                total[name] = total.get(name, 0) + term.detach() / len(batches)
            bar.update(self.batch_size)
        average_(total.values())
        record = {name: float(value) for name, value in total.items()}
        bar.set_postfix({name: f"{value:.2f}" for name, value in record.items()}, refresh=False)
        usage = self.model.quantizer.usage()
        record["codes in use"] = float((~usage.dead).sum())
        record["codes shared"] = float(usage.shared.sum())
        return record

    def _step(self, x: Mapping[str, Tensor], weights: Mapping[str, float]) -> dict[str, Tensor]:
        """One step of CLUB's networks, then one of all else."""
        features = self.model.encode(x)
        if self.club_optimizer is not None:
            for _ in range(self.recipe.club_steps):
                self.club_optimizer.zero_grad()
                self.model.club_fit(features).backward()
                average_([p.grad for p in self.model.club.parameters()])
                self.club_optimizer.step()
        terms = self.model.losses(x, features, quantize="commitment" in weights)
        self.optimizer.zero_grad()
        torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
        average_([p.grad for p in self.others if p.grad is not None])
        nn.utils.clip_grad_norm_(self.others, self.recipe.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        return terms

    def _weights(self) -> dict[str, float]:
        """The weight of every term in this epoch; those of the codebook are absent before it."""
        r = self.recipe
        progress = self.epoch / r.epochs
        begun = max(0.0, progress - r.spread + 1 / r.epochs)
        grown = min(1.0, begun / r.ramp) if r.ramp else float(begun > 0)
        weights = {"reconstruction": r.reconstruction, "cpc": r.cpc, "club": r.club * grown}
        if progress >= r.spread or self.epoch == r.epochs - 1:
            weights |= {"commitment": r.commitment * grown, "matching": r.matching * grown}
        return weights

    def _rate(self, step: int) -> float:
        """Learning rate relative to the highest."""
        if self.recipe.schedule == "constant":
            return 1.0
        total = self.recipe.epochs * self.steps
        return min(1.0, (step + 1) / _RISE) * (1 + math.cos(math.pi * step / total)) / 2

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

    def _load(self, path: Path) -> None:
        state = load_checkpoint(path)
        if not isinstance(state.get("identity"), dict):
            raise DataError(f"{path}: not a checkpoint of a run.")
        for name, value in self.identity.items():
            if (was := state["identity"].get(name)) != value:
                raise DataError(
                    f"{path}: the checkpoint is of another run: {name} was {was}, now it is "
                    f"{value}. Hint: repeat the arguments, or give another --output."
                )
        try:
            self.epoch, self.history = state["epoch"], state["history"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.club_optimizer is not None:
                self.club_optimizer.load_state_dict(state["club_optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            set_random_state(state["random"])
        except Exception as error:  # whatever modules and optimizers raise for foreign state
            raise DataError(f"{path}: the checkpoint does not fit ({error!r}).") from error


def _tensorboard(folder: Path, epoch: int) -> Any:
    """A SummaryWriter that drops what was logged from `epoch` on; None without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=epoch)
