"""Drop a quantizer into an autoencoder that exists already.

Three lines do it: build the quantizer, put it between encoder and decoder, add its loss. A grid of
features is a sequence of its cells, and a single modality is a dict of one. Then a picture is a few
integers, and the decoder draws it from them.
"""

import torch
from einops import rearrange
from sklearn.datasets import load_digits  # pip install 'mmvq[samples]'
from torch import Tensor, nn

import mmvq

torch.manual_seed(0)


class Autoencoder(nn.Module):
    """What exists already: pictures of 8 x 8 to 2 x 2 cells of 16 numbers, and back."""

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
    """The same, through 64 codes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.quantizer = mmvq.MultiModalEMAQuantizer(width, 64, ("picture",))  # 1.

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures `[B, 1, 8, 8]` -> the same drawn again, tokens `[B, 4]`, the loss."""
        z = rearrange(self.encoder(x), "b d h w -> b (h w) d")
        quantized, indices, commitment = self.quantizer({"picture": z})  # 2.
        drawn = self.draw(quantized["picture"])
        loss = nn.functional.mse_loss(drawn, x) + commitment  # 3.
        return drawn, indices["picture"], loss

    def draw(self, codes: Tensor) -> Tensor:
        """Codes `[B, 4, D]` -> pictures."""
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
    drawn, tokens, _ = model.eval()(test)
    again = model.draw(model.quantizer.decode(tokens))  # from the integers alone
error, spread = (drawn - test).square().mean().item(), (train.mean(0) - test).square().mean().item()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
print(f"test pictures from 4 codes of 6 bits: squared error {error:.3f}, the mean's {spread:.3f}")
