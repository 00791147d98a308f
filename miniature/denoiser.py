"""The miniature's UNet and text encoder for training: the host's own UNet class, transformers' CLIP text model.

The host's text model adds in place and cannot be back-propagated; transformers' has the same key names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .layout import LAYOUT, TEXT, WORDS

ATTENTION = (
    ("input", 1),
    ("input", 3),
    ("middle", 0),
    ("output", 0),
    ("output", 1),
    ("output", 2),
    ("output", 3),
)
MASK_LAYERS = (
    ("input", 3),
    ("middle", 0),
    ("output", 0),
    ("output", 1),
)  # the layers on the 8 x 8 grid


def add_host(host: Path) -> None:
    """Makes the host importable, on the CPU where there is no accelerator."""
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    import comfy.options  # the host reads sys.argv otherwise

    comfy.options.args_parsing = False
    import comfy.cli_args

    if not torch.cuda.is_available():
        comfy.cli_args.args.cpu = True


def build_unet(host: Path) -> nn.Module:
    """The host's UNetModel in the miniature's layout, freshly initialised (the host's own layers come without values)."""
    add_host(host)
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    unet = UNetModel(**LAYOUT, dtype=torch.float32)
    for module in unet.modules():
        for kind in (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm):
            if isinstance(module, kind):
                kind.reset_parameters(module)
    for (
        name,
        parameter,
    ) in unet.named_parameters():  # as in the original code: every residual branch starts silent
        if name.rpartition(".")[0].endswith(("out_layers.3", "proj_out")) or name.startswith(
            "out.2."
        ):
            nn.init.zeros_(parameter)
    return unet


def build_text(words: int) -> nn.Module:
    """transformers' CLIP text model, two layers of width 64, over `words` token rows: only those that occur are trained."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            **TEXT | {"eos_token_id": 1}, vocab_size=words, bos_token_id=0, pad_token_id=1
        )
    )


def load_tokenizer(host: Path) -> Callable[[list[str]], Tensor]:
    """The host's own vocabulary -> a function from captions to token numbers [b 77], padded with the end token as SD 1.5 is."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(host / "comfy" / "sd1_tokenizer"))

    def tokens(captions: list[str]) -> Tensor:
        rows = [
            [49406, *tokenizer(text, add_special_tokens=False)["input_ids"], 49407]
            for text in captions
        ]
        return torch.tensor([row + [49407] * (WORDS - len(row)) for row in rows])

    return tokens


class Attention:
    """Plain matrix-product attention for every layer, which keeps the word maps of the mask layers of the last call.

    Goes into transformer_options["patches_replace"]; on a CPU it is faster in the backward pass than the fused kernels
    at these sizes.
    """

    def __init__(self) -> None:
        self.maps: dict[tuple[str, int], Tensor] = {}  # probabilities, mean over heads [b n w]

    def options(self) -> dict:
        """The host's transformer_options that route all attention through here."""

        def own(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
            return self._attend(q, k, v, extra["n_heads"], None)

        def cross(block: tuple[str, int]) -> Callable:
            return lambda q, k, v, extra: self._attend(
                q, k, v, extra["n_heads"], block if block in MASK_LAYERS else None
            )

        return {
            "patches_replace": {
                "attn1": dict.fromkeys(ATTENTION, own),
                "attn2": {block: cross(block) for block in ATTENTION},
            }
        }

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, block: tuple[str, int] | None
    ) -> Tensor:
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (q, k, v)
        )  # [b h n d]
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1)
        if block is not None:
            self.maps[block] = weights.float().mean(1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def schedule() -> Tensor:
    """Cumulative alphas [1000] of Stable Diffusion's scaled-linear betas, as the host's ModelSamplingDiscrete makes them."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
