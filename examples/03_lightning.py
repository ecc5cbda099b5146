"""Train with Lightning and monitor the codebook.

The module logs each loss term, the accuracy of Cross-CPC, and what a `CodebookMonitor` measures:
perplexity, shared codes, dead codes and agreement. The monitor runs in a hook after each batch.
With several ranks all have the same values, so rank 0 alone logs them.
"""

import lightning as L  # pip install 'mmvq[samples]'
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import mmvq

WIDTHS, D = {"audio": 24, "video": 40}, 16


class SharedCodes(L.LightningModule):
    """An encoder and a decoder for each modality, and one codebook."""

    def __init__(self, codes: int = 16) -> None:
        super().__init__()
        names = tuple(WIDTHS)
        self.encode = nn.ModuleDict({m: nn.Linear(width, D) for m, width in WIDTHS.items()})
        self.decode = nn.ModuleDict({m: nn.Linear(D, width) for m, width in WIDTHS.items()})
        self.quantizer = mmvq.MultiModalEMAQuantizer(D, codes, names)
        self.cpc = mmvq.CrossCPC(D, names, first_step=0, normalize=True, temperature=0.1)
        self.matching = mmvq.CrossModalCodeMatchingLoss()
        self.monitor = mmvq.CodebookMonitor(
            self.quantizer,
            lambda name, value, step: self.log(name, value, rank_zero_only=True),
            every=20,
        )

    def training_step(self, x: dict[str, Tensor]) -> Tensor:
        """Return the loss of a batch.

        With gradient accumulation, build the quantizer with `update="manual"` and call its
        `update_codebook()` once for each optimizer step.
        """
        z = {name: self.encode[name](v) for name, v in x.items()}
        quantized, _, commitment = self.quantizer(z)
        errors = [nn.functional.mse_loss(self.decode[m](quantized[m]), x[m]) for m in x]
        cpc, accuracy = self.cpc(z, start="all")
        terms = {
            "reconstruction": torch.stack(errors).mean(),
            "commitment": commitment,
            "cpc": cpc,
            "matching": 3 * self.matching(z, self.quantizer.codebook),
        }
        self.log_dict({f"loss/{name}": term for name, term in terms.items()})
        self.log_dict({f"accuracy/{a}-{b}": share for (a, b), share in accuracy.items()})
        return torch.stack(list(terms.values())).sum()

    def on_train_batch_end(self, *_: object) -> None:
        """Count the step; every 20 steps the monitor logs."""
        self.monitor.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return an optimizer of all parameters; the codebook is a buffer and not among them."""
        return torch.optim.Adam(self.parameters(), 3e-3)


torch.manual_seed(0)
events = torch.randint(12, (1024, 10))  # of 1024 clips; both modalities show the same
views = {m: torch.randn(12, width)[events] for m, width in WIDTHS.items()}
clips = [{m: v[i] + 0.5 * torch.randn_like(v[i]) for m, v in views.items()} for i in range(1024)]

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
