"""Quantize two modalities with one codebook.

What goes in is a dict of features `[B, T, D]`, with masks where clips are shorter; what comes out
are codes, their indices and a loss. The codebook moves by itself. Later one modality is enough, and
two modalities that show the same thing have the same code.
"""

import torch
from torch import Tensor

import mmvq

torch.manual_seed(0)
EVENTS, D = 12, 16
meaning = torch.randn(EVENTS, D)  # what a segment can be about


def batch(B: int, T: int = 10) -> tuple[dict[str, Tensor], Tensor]:
    """Clips without labels: both modalities show the same events, in noise of their own; a mask."""
    events = torch.randint(EVENTS, (B, T))
    z = {name: meaning[events] + 0.4 * torch.randn(B, T, D) for name in ("audio", "video")}
    lengths = torch.randint(3, T + 1, (B, 1))
    return z, torch.arange(T) < lengths  # [B, T], True = valid


quantizer = mmvq.MultiModalEMAQuantizer(D, codebook_size=EVENTS, modalities=("audio", "video"))
for _ in range(100):
    z, valid = batch(32)
    quantized, indices, loss = quantizer(z, {"audio": valid, "video": valid})
    # in a model: (task + loss).backward(); the codebook has moved already
assert (indices["audio"][~valid] == -1).all()  # padding has no code

quantizer.eval()  # from here on nothing moves
z, _ = batch(1000)
tokens = {name: quantizer.encode(x) for name, x in z.items()}  # each alone, int64 [B, T]
codes = quantizer.decode(tokens["video"])  # [B, T, D]

agreement = mmvq.functional.code_agreement(tokens).share["audio", "video"].item()
print(f"{int(quantizer.usage().shared.sum())} of {EVENTS} codes are shared")
print(f"audio and video of a segment have the same code in {agreement:.0%} of new segments")
