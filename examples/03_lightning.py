"""Train all four modules with Lightning and monitor the codebook.

CLUB has an optimizer of its own, so optimization is manual. The module logs each loss term, the
accuracy of Cross-CPC, and what a `CodebookMonitor` measures: perplexity, shared codes, dead codes,
agreement and the saturation of CLUB. The monitor runs in a hook after each batch. With several
ranks all have the same values, so rank 0 alone logs them.
"""

import lightning as L  # pip install 'mmvq[samples]'
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mmvq

WIDTHS, D, S = {"audio": 24, "video": 40}, 16, 8


class SharedCodes(L.LightningModule):
    """Two encoders, a decoder and a CLUB for each modality, and one codebook."""

    def __init__(self, codes: int = 16) -> None:
        super().__init__()
        self.automatic_optimization = False
        names = tuple(WIDTHS)
        self.encode = nn.ModuleDict({m: nn.Linear(width, D) for m, width in WIDTHS.items()})
        self.specific = nn.ModuleDict({m: nn.Linear(width, S) for m, width in WIDTHS.items()})
        self.decode = nn.ModuleDict({m: nn.Linear(D + S, width) for m, width in WIDTHS.items()})
        self.quantizer = mmvq.MultiModalEMAQuantizer(D, codes, names)
        self.cpc = mmvq.CrossCPC(D, names, first_step=0, normalize=True, temperature=0.1)
        self.matching = mmvq.CrossModalCodeMatchingLoss()
        self.club = nn.ModuleDict({m: mmvq.CLUBEstimator(D, S, hidden_dim=64) for m in names})
        self.monitor = mmvq.CodebookMonitor(
            self.quantizer,
            lambda name, value, step: self.log(name, value, rank_zero_only=True),
            every=20,
            club=self.club,
        )

    def training_step(self, x: dict[str, Tensor]) -> None:
        """Fit CLUB, then train the rest.

        With gradient accumulation, build the quantizer with `update="manual"` and call its
        `update_codebook()` once for each step of the optimizer.
        """
        optimizer, club_optimizer = self.optimizers()
        z = {m: self.encode[m](v) for m, v in x.items()}
        specific = {m: self.specific[m](v) for m, v in x.items()}

        club_optimizer.zero_grad()
        fits = [self.club[m].learning_loss(z[m], specific[m]) for m in x]
        self.manual_backward(torch.stack(fits).sum())
        club_optimizer.step()

        quantized, _, commitment = self.quantizer(z)
        decoded = {m: self.decode[m](torch.cat([quantized[m], specific[m]], -1)) for m in x}
        cpc, accuracy = self.cpc(z, start="all")
        terms = {
            "reconstruction": sum(nn.functional.mse_loss(decoded[m], x[m]) for m in x),
            "commitment": commitment,
            "cpc": cpc,
            "matching": 3 * self.matching(z, self.quantizer.codebook),
            "club": sum(self.club[m].penalty(z[m], specific[m]) for m in x),
        }
        optimizer.zero_grad()
        self.manual_backward(torch.stack(list(terms.values())).sum())
        optimizer.step()
        self.log_dict({f"loss/{name}": term for name, term in terms.items()})
        self.log_dict({f"accuracy/{a}-{b}": share for (a, b), share in accuracy.items()})

    def on_train_batch_end(self, *_: object) -> None:
        """Count the step; every 20 steps the monitor logs."""
        self.monitor.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return two optimizers; the codebook is a buffer and in neither."""
        others = nn.ModuleList([self.encode, self.specific, self.decode, self.cpc])
        return [torch.optim.Adam(part.parameters(), 3e-3) for part in (others, self.club)]


torch.manual_seed(0)
events = torch.randint(12, (1024, 10))  # of 1024 clips; both modalities show the same
views = {m: torch.randn(12, width)[events] for m, width in WIDTHS.items()}
for m, width in WIDTHS.items():  # and each something of its own
    views[m] += torch.randn(1024, 10, 4) @ torch.randn(4, width) / 2
clips = [{m: v[i] for m, v in views.items()} for i in range(1024)]

model = SharedCodes()
trainer = L.Trainer(
    max_epochs=5,
    accelerator="cpu",
    logger=False,  # or a CSVLogger, a TensorBoardLogger, ...
    enable_checkpointing=False,
    enable_model_summary=False,
    enable_progress_bar=False,
)
trainer.fit(model, DataLoader(clips, batch_size=32, shuffle=True))
for name, value in trainer.callback_metrics.items():
    print(f"{name:24} {value:.3f}")
