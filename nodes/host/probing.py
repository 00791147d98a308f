"""The passes of a block probe inside the host's sampling."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...models.probe.measurement import Measurement
from ...models.probe.prober import NODE, Figures, Plan, Prober, movable_blocks, probing
from ...models.reference.bank import ReferencePrompt
from .identity import model_key
from .measured import today
from .model import noise_of, self_attentions
from .ref_unet import reference_pass
from .sites import require_backbone, sites_of


def plan_of(model: ModelPatcher, levels: int) -> Plan:
    """What there is to measure of this MODEL at so many noise levels, evenly spread over the
    schedule; ValueError in words for a network that cannot be read.
    """
    backbone = require_backbone(model, NODE)
    blocks = self_attentions(sites_of(model, backbone))
    sampling = model.get_model_object("model_sampling")
    shares = [(level + 0.5) / levels for level in range(levels)]
    sigmas = tuple(float(sampling.percent_to_sigma(share)) for share in shares)
    return Plan(blocks, movable_blocks(backbone, blocks), sigmas)


def probe(
    model: ModelPatcher, plan: Plan, x0: Tensor, prompt: ReferencePrompt, seed: int
) -> Measurement:
    """Measure pictures x0 [r c y x] in model scale; two at least, since each is lent the next."""
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(x0.shape, generator=generator)
    prober = Prober(require_backbone(model, NODE))
    loop = probing(prober, plan, x0, eps, noise_of(model, NODE))
    down = torch.tensor([*plan.sigmas, 0.0])
    figures: Figures = reference_pass(
        model, x0.shape, down, prompt, None, loop, total=plan.calls, prober=prober
    )
    return Measurement(
        model_key(model), plan.blocks, figures, plan.sigmas, tuple(x0.shape[-2:]), today()
    )
