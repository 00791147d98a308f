"""The miniature's autoencoder: TAESD's layout (Ollin Boer Bohan, 2023), with the key names of the host's comfy/taesd/taesd.py.

Written again in plain torch so that training and measuring need no host; the host's own class is what runs in the end,
and tests/host/test_miniature.py holds the two together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layout import LATENT_CHANNELS


def _conv(n_in: int, n_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, stride=stride, bias=bias)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Encoder(nn.Sequential):
    """Pictures [b 3 8y 8x] in 0..1 -> latents [b c y x]."""

    def __init__(self, channels: int = LATENT_CHANNELS, width: int = 64) -> None:
        layers: list[nn.Module] = [_conv(3, width), _Block(width)]
        for _ in range(3):
            layers += [
                _conv(width, width, stride=2, bias=False),
                _Block(width),
                _Block(width),
                _Block(width),
            ]
        super().__init__(*layers, _conv(width, channels))


class Decoder(nn.Sequential):
    """Latents [b c y x] -> pictures [b 3 8y 8x] in about 0..1."""

    def __init__(self, channels: int = LATENT_CHANNELS, width: int = 64) -> None:
        layers: list[nn.Module] = [_Clamp(), _conv(channels, width), nn.ReLU()]
        for _ in range(3):
            layers += [
                _Block(width),
                _Block(width),
                _Block(width),
                nn.Upsample(scale_factor=2),
                _conv(width, width, bias=False),
            ]
        super().__init__(*layers, _Block(width), _conv(width, 3))


class Autoencoder(nn.Module):
    """Both halves under the names the host's loader looks for; channels: of its latents, at most 16."""

    def __init__(self, channels: int = LATENT_CHANNELS) -> None:
        super().__init__()
        self.channels = channels
        self.taesd_encoder = Encoder(channels)
        self.taesd_decoder = Decoder(channels)

        for module in self.modules():
            if isinstance(
                module, _Block
            ):  # every residual branch starts silent: without norms it hardly learns otherwise
                nn.init.zeros_(module.conv[4].weight)
                nn.init.zeros_(module.conv[4].bias)
        for index, layer in enumerate(self.taesd_decoder):
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(
                    layer.weight,
                    nonlinearity="relu" if index < len(self.taesd_decoder) - 1 else "linear",
                )
        nn.init.normal_(self.taesd_decoder[-1].weight, std=0.01)
        nn.init.constant_(self.taesd_decoder[-1].bias, 0.5)

    @torch.no_grad()
    def start_from_principal_components(self, pictures: Tensor) -> None:
        """Sets the encoder to the main components of 8 x 8 blocks of `pictures` [b 3 y x], one per channel; the decoder learns at once.

        Pixels are never negative, so they pass ReLUs unchanged: two strided layers lay 4 x 4 pixels out as 48 channels, the
        third computes components as pairs of opposite sign, the last subtracts the pairs. Other channels stay random.
        """
        first, *strided, last = (
            layer for layer in self.taesd_encoder if isinstance(layer, nn.Conv2d)
        )
        first.weight[:3].zero_()
        first.bias[:3].zero_()
        for channel in range(3):
            first.weight[channel, channel, 1, 1] = 1
        width = 3
        for layer in strided[:2]:
            layer.weight[: 4 * width].zero_()
            for y in range(2):
                for x in range(2):
                    for channel in range(width):
                        layer.weight[(2 * y + x) * width + channel, channel, 1 + y, 1 + x] = 1
            width *= 4
        laid_out = strided[1](strided[0](first(pictures)))[:, :width]  # [b 48 y/4 x/4]
        blocks = (
            nn.functional.unfold(laid_out, 2, stride=2).transpose(1, 2).flatten(0, 1)
        )  # [n 192]: channel, then y, x
        mean = blocks.mean(0)
        spread, axes = torch.linalg.eigh(torch.cov((blocks - mean).T))
        axes = (
            (axes / spread.clamp(min=1e-6).sqrt()).flip(1)[:, :16].T
        )  # [16 192], most spread first, unit variance
        third = strided[2].weight
        third[:32].zero_()
        third[:16, :width, 1:, 1:] = axes.view(16, width, 2, 2)
        third[16:32] = -third[:16]
        last.weight.zero_()
        for channel in range(self.channels):
            last.weight[channel, channel, 1, 1], last.weight[channel, 16 + channel, 1, 1] = 1, -1
        last.bias.copy_(-(axes @ mean)[: self.channels])

    def encode(self, pictures: Tensor) -> Tensor:
        """[b 3 8y 8x] in 0..1 -> [b c y x], about unit spread."""
        return self.taesd_encoder(pictures)

    def coarse(self, pictures: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Latents and rebuilt pictures without the two full-size blocks, while those are still the identity: nearly twice as fast."""
        encoder, decoder = list(self.taesd_encoder), list(self.taesd_decoder)
        latents = nn.Sequential(encoder[0], nn.ReLU(), *encoder[2:])(pictures).float()
        return latents, nn.Sequential(*decoder[:-2], nn.ReLU(), decoder[-1])(
            latents + spread
        ).float()

    def decode(self, latents: Tensor) -> Tensor:
        """[b c y x] -> [b 3 8y 8x], clamped to 0..1."""
        return self.taesd_decoder(latents).clamp(0, 1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture of [b c y x] in 0..1 -> [b]."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))
