"""FLUX.1 at its own size on paper: 19 double and 38 single blocks of width 3072, 1024 pixels, 256 words.

As tests/host/paper.py does for UNets: the sampler is real, the network computes on the meta device
and answers zeros, so nothing takes its 48 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from counting import Counting
from flow_networks import FLUX, config_of, random_text
from kindred.models.attention.parts import Merge
from kindred.models.concept.config import ConceptConfig
from kindred.models.network.call import Half, Halves
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.rows import Layer
from kindred.models.subject.masks import resize_user_mask
from kindred.models.subject.words import SubjectTokens
from kindred.nodes import host
from kindred.nodes.host import model as host_model
from paper import META, STEPS, on_paper
from studio import inject, story
from torch import Tensor

import nodes

SIDE, CELLS, CHANNELS = 128, 64, 16  # latent cells and tokens of a side at 1024 pixels
WHOLE = FLUX | {"depth": 19, "depth_single_blocks": 38}
WIDTH, SCHEDULE = FLUX["hidden_size"], "simple"
TOKENS = 16  # of a concept: an IP-Adapter's usual ones


@cache
def paper_flux() -> Any:
    """A MODEL of FLUX.1's own size that takes no memory."""
    from comfy.model_patcher import ModelPatcher

    model = config_of("flux", WHOLE).get_model({}, "", device=META)
    model.device = torch.device("cpu")
    forward = model.diffusion_model.forward

    def there(x: Any) -> Any:
        return x.to(META) if isinstance(x, Tensor) else x

    def written(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {name: there(x) for name, x in kwargs.items()}
        return torch.zeros(forward(*map(there, args), **kwargs).shape)

    model.diffusion_model.forward = written
    return ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


def quarter() -> Tensor:
    """A MASK [1 y x]: a square on a quarter of the picture."""
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, SIDE // 4 : 3 * SIDE // 4, SIDE // 4 : 3 * SIDE // 4] = 1
    return mask


def prompts(count: int) -> list:
    """Subject Prompts' CONDITIONING of so many pictures."""
    rows = [random_text("flux", 50 + i)[0] for i in range(count)]
    subject = SubjectTokens(("cat",), ((5,),) * count, (((5,),) * count,))
    pooled = torch.cat([extras["pooled_output"] for _, extras in rows])
    extras = rows[0][1] | {"pooled_output": pooled, "kindred_subject": subject}
    return [[torch.cat([text for text, _ in rows]), extras]]


@cache
def paper_bank(blocks: str) -> ReferenceBank:
    """What a capture of STEPS steps would keep of the blocks, where the network computes."""
    model, grid = paper_flux(), (CELLS, CELLS)
    sites = host.require_sites(model, "paper")
    layers = tuple(
        Layer(block, grid, 2 * WIDTH) for block in sites if blocks == "all" or block[0] == blocks
    )
    mask = {grid: resize_user_mask(quarter(), grid)}
    sigmas = host_model.schedule(model, SCHEDULE, STEPS).flip(0)
    path = InversionTrajectory(
        sigmas, torch.zeros(len(sigmas), 1, CHANNELS, SIDE, SIDE), "paper", "", "paper", "paper"
    )
    kept = int(mask[grid].sum())
    row = torch.zeros(kept * 2 * WIDTH * len(layers), device=META).expand(STEPS, -1)
    read = {Half.COND: host.read_prompt(model, prompts(1), "positive", "paper", 1)}
    return ReferenceBank(path, read, layers, mask, {Half.COND: row}, "paper")


def with_concept() -> Any:
    """The MODEL behind Cross-Attn Detail Inject: as FLUX.1's IP-Adapters, a sum in every block."""
    family, layers, _ = host.concept_layers(paper_flux(), "paper")
    pairs = {block: (torch.empty(1, TOKENS, c, device=META),) * 2 for block, c in layers}
    config = ConceptConfig(family, layers, 0, 0, merge=Merge.ADD)
    reading = host.DecoupledReading(1.0, 0.0, 1.0, Halves.COND, host.place_of(config), None)
    blocks = tuple(block for block, _ in layers)
    made: Mapping[Half, Any] = {Half.COND: pairs}
    return host.inject(paper_flux(), host.DecoupledInjection(reading, config, blocks, made, {}))


def with_reference(blocks: str, **how: Any) -> Any:
    with on_paper():
        return inject(paper_flux(), paper_bank(blocks), blocks=blocks, **how)


def sharing(**how: Any) -> Any:
    """Four pictures, a quarter of each subject and nothing dropped: sharing alone."""
    alone = {"masks": quarter(), "dropout": 0.0, "query_blend": 0.0, "feature_injection": 0.0}
    with on_paper():
        return story(paper_flux(), **alone | how)


@torch.inference_mode()
def first_step(model: Any, batch: int = 1) -> Counting:
    """One step of the host's KSampler at CFG 1, as FLUX.1 is drawn, counted from its start to its end."""
    latent = {"samples": torch.zeros(batch, CHANNELS, SIDE, SIDE)}
    sampled = (model, 1, STEPS, 1.0, "euler", SCHEDULE, prompts(batch), random_text("flux", 2))
    with on_paper(), Counting(model.model.diffusion_model) as spent:
        nodes.common_ksampler(*sampled, latent, start_step=0, last_step=1)
    return spent
