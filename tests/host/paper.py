"""Whole sampler runs at full size on paper: the sampler is real, the UNet computes on the meta device and answers zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import comfy.model_management
import pytest
import torch
from counting import Counting
from kindred.models.injection import grid_of
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.reference.bank import Half, Keeps, Layer, ReferenceBank
from kindred.models.subject.masks import resize_user_mask
from kindred.nodes import host
from kindred.nodes.host import identity
from kindred.nodes.host import model as host_model
from kindred.nodes.host.run import SamplerRun
from networks import build_model
from studio import coarse, negative, pictures, prompt
from torch import Tensor

META = torch.device("meta")
SIDE = {"sd15": 64, "sdxl": 128}  # latent cells: 512 and 1024 pixels
STEPS = 2


@contextmanager
def on_paper() -> Iterator[None]:
    """The host loads no model and has room for all rows at once; the pack takes the meta device for where the UNet computes."""

    def room(device: Any = None, torch_free_too: bool = False) -> Any:
        return (1 << 60, 1 << 60) if torch_free_too else 1 << 60

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: None)
        patch.setattr(comfy.model_management, "get_free_memory", room)
        for module in (host, identity):
            patch.setattr(module, "model_key", lambda model: "paper")
        patch.setattr(SamplerRun, "device_and_dtype", (META, torch.float32))
        yield


@cache
def paper_model(family: str) -> Any:
    """A MODEL of the family's own size that takes no memory."""
    model = build_model(family, weights=False)
    unet = model.model.diffusion_model
    forward = unet.forward

    def there(x: Any) -> Any:
        return x.to(META) if isinstance(x, Tensor) else x

    def written(*args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        kwargs = {name: there(x) for name, x in kwargs.items()}
        return torch.zeros(
            forward(*map(there, args), transformer_options=transformer_options, **kwargs).shape
        )

    unet.forward = written
    return model


def drawn(family: str) -> Tensor:
    """A MASK [1 y x]: a square on a quarter of the picture."""
    mask, side = torch.zeros(1, SIDE[family], SIDE[family]), SIDE[family] // 4
    mask[:, side : 3 * side, side : 3 * side] = 1
    return mask


AUTOMATIC = {"sd15": Keeps.KEYS_VALUES, "sdxl": Keeps.HIDDEN}  # what 50 steps of a quarter come to


@cache
def paper_bank(family: str, keeps: Keeps = Keeps.AUTO) -> ReferenceBank:
    """What a capture of STEPS steps would keep of such a picture, both halves, where the UNet computes; one row stands for all."""
    twice = 2 if (AUTOMATIC[family] if keeps is Keeps.AUTO else keeps) is Keeps.KEYS_VALUES else 1
    model, side = paper_model(family), SIDE[family]
    layers = tuple(
        Layer(
            block, grid_of((side, side), site.divisor), twice * site.module.attn1.to_k.in_features
        )
        for block, site in host.attention_sites(model.model.diffusion_model).items()
    )
    masks = {
        grid: resize_user_mask(drawn(family), grid) for grid in {layer.grid for layer in layers}
    }
    sigmas = host_model.schedule(model, "ddim_uniform", STEPS).flip(0)
    path = InversionTrajectory(
        sigmas, torch.zeros(len(sigmas), 1, 4, side, side), "paper", "", "paper", "paper"
    )
    row = torch.zeros(
        sum(int(masks[layer.grid].sum()) * layer.channels for layer in layers), device=META
    ).expand(STEPS, -1)
    prompts = {
        Half.COND: host.read_prompt(model, coarse(family), "positive", "paper", 1),
        Half.UNCOND: host.read_prompt(model, negative(family), "negative", "paper", 1),
    }
    bank = ReferenceBank(path, prompts, layers, masks, dict.fromkeys(Half, row), "paper")
    assert bank.kept
    return bank


def first_step(model: Any, family: str, batch: int = 1) -> Counting:
    """One step of the host's KSampler under CFG, counted from its start to its end."""
    with on_paper(), Counting(model.model.diffusion_model) as spent:
        pictures(
            model,
            range(batch),
            steps=STEPS,
            size=(SIDE[family],) * 2,
            family=family,
            start_step=0,
            last_step=1,
            positive=prompt(5, family) if batch == 1 else None,
        )
    return spent
