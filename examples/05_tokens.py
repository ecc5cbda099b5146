"""Write tokens for a sequence model to a parquet file, and read them back.

All modalities share one vocabulary: code 7 is token 7 in audio and in video, so that a sequence
model can carry over what it learns about a code. A marker token before each run names its modality.
(To keep the modalities apart, add an offset: `token + L * m` for modality m.) Padding is not
written. After reading, shorter clips are padded with the index -1, which decodes to zeros.
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
MARKER = {name: L + m for m, name in enumerate(NAMES)}  # <audio> and <video> follow the L codes
END = L + len(NAMES)  # <end>; the vocabulary has L + 3 tokens


def clips(B: int, T: int = 12) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and masks: in each modality of a clip, the first 4 to 12 segments are valid."""
    events = torch.randn(B, T, D)
    z = {name: events + 0.1 * torch.randn(B, T, D) for name in NAMES}
    masks = {name: torch.arange(T) < torch.randint(4, T + 1, (B, 1)) for name in NAMES}
    return z, masks


def sentence(clip: dict[str, list[int]]) -> list[int]:
    """The input of the sequence model, such as <audio> 3 8 8 <video> 3 3 8 8 <end>."""
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
padded = {
    name: pad_sequence(
        [torch.tensor(run) for run in corpus[name]], batch_first=True, padding_value=-1
    )
    for name in NAMES
}
codes = {name: quantizer.decode(padded[name]) for name in NAMES}  # [B, T, D]

count = sum(map(len, sentences))
same = all(torch.equal(padded[name], tokens[name]) for name in NAMES)
print(f"{len(sentences)} clips: {count} tokens, a vocabulary of {END + 1}, {size} bytes of parquet")
print(f"the first clip: {sentences[0]}")
print(f"the same indices after reading: {same}")
