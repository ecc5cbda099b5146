"""Quantize the features of a `transformers` encoder, and save everything as for the Hub.

A feature extractor pads sounds of different lengths and returns a padding mask. An encoder turns
them into features, and the quantizer turns these into tokens. All three are saved to a folder and
loaded again, which works the same way with the Hub. The weights are random, to avoid a download.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers as hf  # pip install 'mmvq[samples]'
from torch import Tensor

import mmvq

torch.manual_seed(0)
rng = np.random.default_rng(0)
conv = {"conv_dim": (32, 32, 32), "conv_kernel": (10, 8, 4), "conv_stride": (10, 8, 4)}
config = hf.Wav2Vec2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **conv)
encoder = hf.AutoModel.from_config(config).eval()  # or from_pretrained("facebook/wav2vec2-base")
extractor = hf.Wav2Vec2FeatureExtractor(return_attention_mask=True)


def tones(clips: int, rate: int = 16_000) -> list[np.ndarray]:
    """Sounds of 1/3 to 1 second, each with one of eight pitches."""
    return [
        np.sin(2 * math.pi * 220 * 2 ** (rng.integers(8) / 4) * np.arange(n) / rate)
        for n in rng.integers(rate // 3, rate, clips)
    ]


@torch.no_grad()
def features(sounds: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Features `[B, T, D]` and a mask `[B, T]`, True = valid."""
    batch = extractor(sounds, sampling_rate=16_000, padding=True, return_tensors="pt")
    z = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :: encoder.config.inputs_to_logits_ratio]  # one per frame
    return z, mask[:, : z.shape[1]].bool()


quantizer = mmvq.MultiModalEMAQuantizer(config.hidden_size, 64, ("audio",), decay=0.9)
for _ in range(20):  # the encoder is frozen: only the codebook learns
    z, valid = features(tones(16))
    quantizer({"audio": z}, {"audio": valid})
quantizer.eval()
sounds = tones(4)
z, valid = features(sounds)
tokens = quantizer({"audio": z}, {"audio": valid}).indices["audio"]  # -1 = padding

with tempfile.TemporaryDirectory() as folder:
    for name, part in {"quantizer": quantizer, "encoder": encoder, "extractor": extractor}.items():
        part.save_pretrained(Path(folder, name))  # or part.push_to_hub(f"you/{name}")
    encoder = hf.AutoModel.from_pretrained(Path(folder, "encoder"))  # or "you/encoder"
    extractor = hf.AutoFeatureExtractor.from_pretrained(Path(folder, "extractor"))
    loaded = mmvq.MultiModalEMAQuantizer.from_pretrained(Path(folder, "quantizer"))

z, valid = features(sounds)
again = loaded({"audio": z}, {"audio": valid}).indices["audio"]
used = int((~quantizer.usage().dead).sum())
print(f"{len(z)} sounds of {valid.sum(1).tolist()} tokens; {used} of 64 codes in use")
print(f"the same tokens after loading: {torch.equal(tokens, again)}")
