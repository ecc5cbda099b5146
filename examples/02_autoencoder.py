"""Add a quantizer to an existing autoencoder.

It takes three lines: build the quantizer, call it between encoder and decoder, and add its loss.
A feature map `[B, D, H, W]` becomes a sequence `[B, H W, D]`, and a single modality is a dict with
one entry. Each picture is then four integers, from which the decoder reconstructs it.
"""

import torch
from einops import rearrange
from sklearn.datasets import load_digits  # pip install 'mmvq[samples]'
from torch import Tensor, nn

import mmvq

torch.manual_seed(0)


class Autoencoder(nn.Module):
    """The existing model: pictures of 8 x 8 pixels to feature maps of 2 x 2, and back."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 2, stride=2), nn.GELU(), nn.Conv2d(32, width, 2, stride=2)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(width, 32, 2, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(32, 1, 2, stride=2),
        )


class QuantizedAutoencoder(Autoencoder):
    """The same model with a codebook of 64 codes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.quantizer = mmvq.MultiModalEMAQuantizer(width, 64, ("picture",))  # 1.

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures `[B, 1, 8, 8]` -> reconstructions, tokens `[B, 4]`, loss."""
        z = rearrange(self.encoder(x), "b d h w -> b (h w) d")
        quantized, indices, commitment = self.quantizer({"picture": z})  # 2.
        reconstruction = self.decode(quantized["picture"])
        loss = nn.functional.mse_loss(reconstruction, x) + commitment  # 3.
        return reconstruction, indices["picture"], loss

    def decode(self, codes: Tensor) -> Tensor:
        """Codes `[B, 4, D]` -> pictures `[B, 1, 8, 8]`."""
        return self.decoder(rearrange(codes, "b (h w) d -> b d h w", h=2))


pictures = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
train, test = pictures[:1500], pictures[1500:]
model = QuantizedAutoencoder()
optimizer = torch.optim.Adam(model.parameters(), 3e-3)
losses = []
for _ in range(200):
    loss = model(train[torch.randint(len(train), (128,))])[2]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

with torch.no_grad():
    reconstruction, tokens, _ = model.eval()(test)
    from_tokens = model.decode(model.quantizer.decode(tokens))  # from the integers alone
error = (reconstruction - test).square().mean().item()
baseline = (train.mean(0) - test).square().mean().item()
print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f"test error of 4 codes of 6 bits {error:.3f}, of the mean picture {baseline:.3f}")
