"""Tokens for a sequence model: a corpus of clips to a parquet file, and back.

One vocabulary serves all modalities: code 7 is token 7 wherever it comes from, so that what a model
learns of it in sound holds in pictures too. A marker before each run says which modality speaks.
(Give each modality an offset, `token + L * m`, only if its codes are not to be shared.) Padding at
the end of a clip has no token: left out on the way in, it comes back as -1, which decodes to zeros.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset  # pip install 'mmvq[samples]'
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import mmvq

torch.manual_seed(0)
NAMES, D, L = ("audio", "video"), 16, 64
MARKER = {name: L + m for m, name in enumerate(NAMES)}  # <audio> and <video> come after the codes
END = L + len(NAMES)  # and <end>: a vocabulary of L + 3


def clips(B: int, T: int = 12) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features, and masks: 4 to 12 segments are valid; sound may end before the picture."""
    shown = torch.randn(B, T, D)
    z = {name: shown + 0.1 * torch.randn(B, T, D) for name in NAMES}
    masks = {name: torch.arange(T) < torch.randint(4, T + 1, (B, 1)) for name in NAMES}
    return z, masks


def sentence(clip: dict[str, list[int]]) -> list[int]:
    """What the sequence model reads: <audio> 3 8 8 <video> 3 3 8 8 <end>."""
    return [token for name in NAMES for token in (MARKER[name], *clip[name])] + [END]


quantizer = mmvq.MultiModalEMAQuantizer(D, L, NAMES)
for _ in range(50):
    quantizer(*clips(32))
quantizer.eval()

z, masks = clips(500)
tokens = quantizer(z, masks).indices  # int64 [B, T], -1 where masked
rows = {name: [clip[clip >= 0].tolist() for clip in tokens[name]] for name in NAMES}
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "tokens.parquet")
    Dataset.from_dict(rows).to_parquet(path)
    size = path.stat().st_size
    corpus = Dataset.from_parquet(str(path), cache_dir=folder, keep_in_memory=True)

sentences = [sentence(clip) for clip in corpus]
back = {
    name: pad_sequence(
        [torch.tensor(run) for run in corpus[name]], batch_first=True, padding_value=-1
    )
    for name in NAMES
}
codes = {name: quantizer.decode(back[name]) for name in NAMES}  # [B, T, D]

count = sum(map(len, sentences))
same = all(torch.equal(back[name], tokens[name]) for name in NAMES)
print(f"{len(sentences)} clips are {count} tokens of {END + 1}, {size} bytes of parquet")
print(f"the first: {sentences[0]}")
print(f"the same indices after the round trip: {same}")
