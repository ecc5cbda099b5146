"""Write tests/golden/state: what this version saves, for every later one to load.

    PYTHONPATH=. python tests/golden/make_state.py FOLDER

Run by hand once for a version of the state, never over an older folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import mmvq

NAMES = ("video", "audio", "text")


def main(folder: Path) -> None:
    """Three small modules, what they answer, and one state_dict as torch saves it."""
    torch.manual_seed(0)
    quantizer = mmvq.MultiModalEMAQuantizer(
        4,
        6,
        NAMES,
        decay=0.9,
        partner="aligned",
        update_from=("audio", "video"),
        reset_after=3,
        commitment=mmvq.CrossModalCommitmentLoss(0.5, {("audio", "video"): 0.25}),
    )
    cpc = mmvq.CrossCPC(4, NAMES, context_dim=3, num_layers=2, num_steps=2)
    club = mmvq.CLUBEstimator(4, 3, 5)
    for _ in range(8):
        quantizer({name: torch.randn(2, 5, 4) for name in NAMES})
    modules = {"quantizer": quantizer, "cpc": cpc, "club": club}
    folder.mkdir(parents=True)
    for name, module in modules.items():
        module.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
    torch.save({name: module.state_dict() for name, module in modules.items()}, folder / "state.pt")
    save_file(answers(quantizer, cpc, club), folder / "answers.safetensors")


def answers(
    quantizer: mmvq.MultiModalEMAQuantizer,
    cpc: mmvq.CrossCPC,
    club: mmvq.CLUBEstimator,
    x: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What the modules make of `x` [3, 2, 5, 4], one batch for each name; the quantizer moves."""
    x = torch.randn(3, 2, 5, 4) if x is None else x
    z = dict(zip(NAMES, x, strict=True))
    quantized, indices, loss = quantizer.train()(z)
    after = {f"after/{name}": value for name, value in quantizer.state_dict().items()}
    return {
        "x": x,
        "indices": torch.stack([indices[name] for name in NAMES]),
        "quantized": torch.stack([quantized[name] for name in NAMES]),
        "commitment": loss,
        "cpc": cpc(z, start="all").loss.detach(),
        "club": club(x[0], x[1, ..., :3]).detach(),
        **{name: value.clone() for name, value in after.items()},
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
