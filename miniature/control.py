"""The miniature's ControlNet as a Control-LoRA: the host copies the UNet's encoder and adds what is learnt here.

The hint is the subject's silhouette, white on black: it fixes where the subject stands, its pose and its size, and says nothing of
its colours. The file follows what the host's ControlLora reads: `<module>.up` and `<module>.down` for the encoder's matrices, whole
tensors for everything else. The hint block is narrower than usual: at the usual width it alone would be twice as large as all of this;
the host takes its sizes from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .denoiser import add_host
from .layout import LAYOUT

WEIGHTS = (
    Path(__file__).parent / "weights" / "controlnet" / "kindred_miniature_silhouette.safetensors"
)
EXAMPLE = Path(__file__).parent / "silhouette.png"
RANK = 8
HINT_WIDTHS = (
    3,
    8,
    8,
    16,
    16,
    32,
    32,
    64,
    64,
)  # the usual ones: 3, 16, 16, 32, 32, 96, 96, 256 and the model's; layers 2, 4 and 6 halve
ENCODER = ("time_embed.", "input_blocks.", "middle_block.")  # what a ControlNet copies of a UNet


class LowRank(nn.Module):
    """Weights near given ones: matrices plus up @ down, vectors free, and whole tensors that nothing is given for.

    base: the frozen weights by name. whole: initial values of the tensors that only the new network has. An update of rank `rank` starts
    at zero: up is zero, down is random.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        whole: Mapping[str, Tensor],
        rank: int = RANK,
        seed: int = 0,
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.base = {
            name: value.detach() for name, value in base.items() if value.ndim > 1
        }  # not saved: the checkpoint has them
        free = {name: value for name, value in base.items() if value.ndim <= 1} | dict(whole)
        self.free = nn.ParameterDict(
            {_flat(name): value.detach().clone() for name, value in free.items()}
        )
        self.up, self.down = nn.ParameterDict(), nn.ParameterDict()
        for name, value in self.base.items():
            used = min(rank, len(value), value[0].numel())
            self.up[_flat(name)] = torch.zeros(len(value), used, *[1] * (value.ndim - 2))
            self.down[_flat(name)] = torch.randn(used, *value.shape[1:], generator=draw) / sqrt(
                value[0].numel()
            )

    def forward(self) -> dict[str, Tensor]:
        """All weights of the new network by name."""
        free = {_deep(name): value for name, value in self.free.items()}
        return {
            name: value + _update(self.up[_flat(name)], self.down[_flat(name)], value)
            for name, value in self.base.items()
        } | free


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LowRank's state -> what the host's ControlLora reads, in half precision."""
    weights = {"lora_controlnet": torch.zeros(0)}
    for name, value in state.items():
        kind, _, flat = name.partition(".")
        weights[
            _deep(flat) if kind == "free" else f"{_deep(flat).removesuffix('.weight')}.{kind}"
        ] = value
    return {name: value.detach().half().contiguous() for name, value in weights.items()}


def _update(up: Tensor, down: Tensor, like: Tensor) -> Tensor:
    """up [o r ...] and down [r i ...] -> their product in the shape of `like`, as the host computes it."""
    return (up.flatten(1) @ down.flatten(1)).view_as(like)


def _flat(name: str) -> str:
    return name.replace(".", "/")  # torch's own containers allow no dots


def _deep(name: str) -> str:
    return name.replace("/", ".")


def encoder_of(unet: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a UNet that its ControlNet begins with."""
    return {name: value for name, value in unet.items() if name.startswith(ENCODER)}


def whole_weights(seed: int) -> dict[str, Tensor]:
    """First values of the hint block, which speaks at once, and of the zero convolutions, which keep it from being heard."""
    draw, weights = torch.Generator().manual_seed(seed), {}
    for layer, (inside, out) in enumerate(zip(HINT_WIDTHS[:-1], HINT_WIDTHS[1:], strict=True)):
        name = f"input_hint_block.{2 * layer}"
        weights[f"{name}.weight"] = torch.randn(out, inside, 3, 3, generator=draw) * sqrt(
            2 / (9 * inside)
        )
        weights[f"{name}.bias"] = torch.zeros(out)
    channels = LAYOUT["model_channels"]
    zeros = (
        {"zero_convs.0": 1}
        | {f"zero_convs.{index}": width for index, width in ((1, 1), (2, 1), (3, 2))}
        | {"middle_block_out": 2}
    )
    for name, width in zeros.items():
        weights[f"{name}.0.weight"] = torch.zeros(channels * width, channels * width, 1, 1)
        weights[f"{name}.0.bias"] = torch.zeros(channels * width)
    return weights


def build_network(host: Path) -> nn.Module:
    """The host's own ControlNet in the miniature's layout, without weights: LowRank gives them with every call."""
    add_host(host)
    from comfy.cldm.cldm import ControlNet

    sizes = {name: value for name, value in LAYOUT.items() if name != "out_channels"}
    return ControlNet(**sizes, hint_channels=3, dtype=torch.float32).eval().requires_grad_(False)


def load_weights(base: Mapping[str, Tensor], path: Path = WEIGHTS) -> dict[str, Tensor]:
    """The network's weights from a packed file and the UNet's, as the host's ControlLora puts them together."""
    from safetensors.torch import load_file

    tensors = {name: value.float() for name, value in load_file(path).items()}
    weights = encoder_of(base) | {
        name: value for name, value in tensors.items() if name.endswith((".weight", ".bias"))
    }
    for name in tensors:
        if name.endswith(".up"):
            module = name.removesuffix(".up")
            weight = weights[f"{module}.weight"]
            weights[f"{module}.weight"] = weight + _update(
                tensors[name], tensors[f"{module}.down"], weight
            )
    return weights


def control(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    x: Tensor,
    hint: Tensor,
    t: Tensor,
    context: Tensor,
) -> dict[str, list]:
    """What the UNet adds to its features: x [b 8 y x], hint [b 3 8y 8x] in 0..1, t [b], context [b w 64] -> {"middle", "output"}."""
    return torch.func.functional_call(network, dict(weights), (x, hint, t, context))


def hint_of(masks: np.ndarray) -> Tensor:
    """Masks [b y x], True on the subject -> hints [b 3 y x], white on black."""
    return torch.from_numpy(np.ascontiguousarray(masks)).float().unsqueeze(1).expand(-1, 3, -1, -1)


def covered(masks: Tensor, grid: int) -> Tensor:
    """Masks [b y x] -> [b grid grid], whether more than half of a cell is subject."""
    return F.adaptive_avg_pool2d(masks.float().unsqueeze(1), grid)[:, 0] > 0.5
