"""Quantize two modalities with one codebook.

The quantizer takes a dict of features `[B, T, D]` and, where clips differ in length, padding masks.
It returns quantized features, code indices and a commitment loss. The codebook is a moving average
of the features: it needs no optimizer. After training, each modality can be encoded by itself.
"""

import torch
from torch import Tensor

import mmvq

torch.manual_seed(0)
EVENTS, D = 12, 16
prototypes = torch.randn(EVENTS, D)  # one vector for each kind of event


def batch(B: int, T: int = 10) -> tuple[dict[str, Tensor], Tensor]:
    """Unlabelled clips in which both modalities show the same events with noise, and a mask."""
    events = torch.randint(EVENTS, (B, T))
    z = {name: prototypes[events] + 0.4 * torch.randn(B, T, D) for name in ("audio", "video")}
    lengths = torch.randint(3, T + 1, (B, 1))
    return z, torch.arange(T) < lengths  # [B, T], True = valid


quantizer = mmvq.MultiModalEMAQuantizer(D, codebook_size=EVENTS, modalities=("audio", "video"))
for _ in range(100):
    z, valid = batch(32)
    quantized, indices, loss = quantizer(z, {"audio": valid, "video": valid})
    # In a model, call (task_loss + loss).backward() here. The codebook is already updated.
assert (indices["audio"][~valid] == -1).all()  # padding has the index -1

quantizer.eval()  # the codebook no longer changes
z, _ = batch(1000)
tokens = {name: quantizer.encode(x) for name, x in z.items()}  # int64 [B, T] each
codes = quantizer.decode(tokens["video"])  # [B, T, D]

agreement = mmvq.functional.code_agreement(tokens).share["audio", "video"].item()
print(f"{int(quantizer.usage().shared.sum())} of {EVENTS} codes are shared")
print(f"audio and video have the same code in {agreement:.0%} of new segments")
