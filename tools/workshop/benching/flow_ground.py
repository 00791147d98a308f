"""What is timed on transformers: as benching.ground, with a FLUX.1 or SD3.5 of few blocks at its real width."""

from __future__ import annotations

from typing import Any

from benching.catalogue import ONE_ROW
from benching.ground import DTYPES, TOKENS, Ground

FLOW_CFG = 4.5  # SD3.5's own
HALVINGS = 40  # of the percents, until a noise level is known to float precision


class FlowGround(Ground):
    """A transformer and everything the cases need."""

    channels, cfg, scheduler = 16, FLOW_CFG, "simple"

    def _build(self) -> Any:
        from comfy.model_patcher import ModelPatcher
        from flow_networks import config_of
        from networks import fill

        if self.setting.family in ONE_ROW:
            self.cfg = 1.0
        model = config_of(self.setting.family).get_model({}, "", device=self.torch.device("meta"))
        fill(model.diffusion_model, 0, 0.8)
        model.device = cpu = self.torch.device("cpu")
        return ModelPatcher(model.eval(), cpu, cpu)

    def random_text(self, seed: int) -> list:
        from flow_networks import random_text

        return random_text(self.setting.family, seed)

    def _times(self, sampling: Any) -> list[float]:
        return [999 * (1 - percent_of(sampling, sigma)) for sigma in self.sigmas.tolist()]

    def _kept(self, what: str) -> Any:
        if what in self.kept:
            return self.kept[what]
        steps, both = self.setting.steps, what == "both"
        if what == "live":  # what a transformer's capture gives by itself
            self.kept[what] = self.capture(steps)
        elif what in ("bank", "both"):
            self.kept[what] = self.capture(steps, both=both, keeps="keys and values")
        return super()._kept(what)

    def concept(self, model: Any, halves: str) -> Any:
        """Random keys and values in the place of an encoder's: it runs once, before sampling."""
        from kindred.models.attention.parts import Merge
        from kindred.models.concept.config import ConceptConfig
        from kindred.models.network.call import Half, Halves
        from kindred.nodes import host

        chosen, drawn = Halves(halves), self.torch.Generator().manual_seed(4)
        family, layers, _ = host.concept_layers(self.model, "bench")
        keys_values = {
            half: {
                block: tuple(self.torch.randn(1, TOKENS, c, generator=drawn) for _ in "kv")
                for block, c in layers
            }
            for half in (Half.COND, *[Half.UNCOND] * (chosen is Halves.BOTH))
        }
        config = ConceptConfig(family, layers, 0, 0, merge=Merge.ADD)
        reading = host.DecoupledReading(1.0, 0.0, 1.0, chosen, host.place_of(config), None)
        blocks = tuple(block for block, _ in layers)
        return host.inject(model, host.DecoupledInjection(reading, config, blocks, keys_values, {}))

    def row_bytes(self) -> tuple[int, int]:
        from flow_networks import SIZES

        size = SIZES[self.setting.family]
        width = self.torch.finfo(getattr(self.torch, DTYPES[self.setting.dtype])).bits // 8
        channels = size.arguments.get("hidden_size", 64 * size.arguments["depth"])
        every = size.blocks * 2 * channels * width * (-(-self.setting.latent // 2)) ** 2
        return every, every // 2


def percent_of(sampling: Any, sigma: float) -> float:
    """Where in the schedule a noise level stands; the host gives the way back alone."""
    least, most = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        if float(sampling.percent_to_sigma(middle)) > sigma:
            least = middle
        else:
            most = middle
    return (least + most) / 2
