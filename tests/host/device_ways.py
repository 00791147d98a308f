"""Every way of the pack through a model, as a run on a pretended device: what it makes, and what the host waits for and copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import comfy.model_management as management
import studio
import tiny_networks
import torch
import transformer_stories
from comfy.model_patcher import ModelPatcher
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import ManagedEncoder
from kindred.nodes.probe import BlockProbe
from networks import build_model, random_model
from pretended_device import CPU, CUDA, Act, Pretended
from pretended_host import host_there
from studio import capture, concept, fresh_encoder, inject, invert, negative, pictures, story
from test_transformer_concepts import config_of
from torch import Tensor

STEPS = 4
HALF = torch.cat([torch.ones(1, 64, 32), torch.zeros(1, 64, 32)], 2)  # the left is the subject
SCHEDULE = {"steps": STEPS, "scheduler": "simple"}  # of transformers


@dataclass(frozen=True)
class Way:
    """run: what is counted, of a model and what was made before: on the CPU, as `given`, or of the model itself, as `before`."""

    run: Callable[[Any, Any], Any]
    given: Callable[[], Any] | None = None
    before: Callable[[Any], Any] = lambda model: None
    family: str = ""  # of a transformer; else the tiny UNet


@dataclass(frozen=True)
class Cost:
    """Of a usual step, none of a pass' first two and not its last: waits of the host for the device, blocking copies among them, and the
    pack's other copies. once: the pack's waits in all of the rest of the run."""

    waits: int
    down: int
    up: int
    once: int = 0

    def within(self, most: Cost) -> bool:
        return self.waits <= most.waits and self.down <= most.down and self.up <= most.up


def ours(act: Act) -> bool:
    return act.where.startswith(("models/", "nodes/"))


def cost_of(acts: list[Act]) -> Cost:
    steps = {a.step for a in acts if a.step is not None}
    inner = {step for step in steps if step[1] > 1 and (step[0], step[1] + 1) in steps}

    def most(counted: list[Act]) -> int:
        return max((sum(a.step == step for a in counted) for step in inner), default=0)

    waits = [a for a in acts if a.blocks and not a.where.startswith("k_diffusion/")]
    down, up = (
        [a for a in acts if a.kind == kind and ours(a) and not a.blocks] for kind in ("down", "up")
    )
    once = sum(ours(a) and a.step not in inner for a in waits)
    return Cost(most(waits), most(down), most(up), once)


# UNets ------------------------------------------------------------------------------------------------------------------------


def bank(model: Any, **how: Any) -> ReferenceBank:
    return capture(model, negative=negative(), steps=STEPS, **how)[0]


def sample(model: Any, **how: Any) -> Tensor:
    return studio.sample(model, **{"steps": STEPS} | how)


def encoder_of(encoder: ConceptEncoder) -> ManagedEncoder:
    """In the host's memory management; in float32, which the host would take half of on a device."""
    device, offload = management.get_torch_device(), management.unet_offload_device()
    patcher = ModelPatcher(encoder.eval().requires_grad_(False), device, offload)
    return ManagedEncoder(encoder, patcher, "test.safetensors")


def told(model: Any) -> ManagedEncoder:
    return encoder_of(fresh_encoder(model=model))


@cache
def held_bank(keeps: str = "automatic", steps: int = STEPS) -> ReferenceBank:
    more = {"negative": negative(), "steps": steps, "keeps": keeps}
    return capture(random_model("tiny"), **more)[0]


@cache
def path() -> InversionTrajectory:
    return invert(random_model("tiny"), steps=STEPS)[0]


@cache
def kept_anchors() -> ReferenceBank:
    return studio.anchors(story(random_model("tiny"), anchors=0))[1]


def photo_bank() -> ReferenceBank:
    return held_bank(steps=studio.MOMENTS)


def hidden_bank() -> ReferenceBank:
    return held_bank("hidden states")


def probed(model: Any, prompt: list, latent: Tensor) -> str:
    """What Block Probe reports."""
    return BlockProbe.execute(model, prompt, {"samples": latent}, 1).result[1]


UNET: dict[str, Way] = {
    "DDIM Invert": Way(lambda m, _: invert(m, steps=STEPS)[0]),
    "capture, the mask by its words": Way(lambda m, _: bank(m)),
    "capture, hidden states": Way(lambda m, _: bank(m, keeps="hidden states")),
    "capture, the mask wired": Way(lambda m, _: bank(m, mask=HALF)),
    "capture, float16": Way(lambda m, _: bank(m, mask=HALF, precision="float16")),
    "capture of an inversion": Way(lambda m, path: bank(m, inversion=path), path),
    "injection, cached": Way(lambda m, b: sample(inject(m, b)), held_bank),
    "injection, hidden states": Way(lambda m, b: sample(inject(m, b)), hidden_bank),
    "injection, both halves, a strength and a target": Way(
        lambda m, b: sample(inject(m, b, 2.0, halves="both", target_mask=HALF)), held_bank
    ),
    "injection, read live": Way(lambda m, b: sample(inject(m, b), steps=STEPS + 2), held_bank),
    "concept": Way(lambda m, e: sample(concept(m, encoder=e)), before=told),
    "concept and injection": Way(
        lambda m, e: sample(inject(concept(m, encoder=e), held_bank())), held_bank, told
    ),
    "story": Way(lambda m, _: pictures(story(m))),
    "story, masks wired": Way(lambda m, _: pictures(story(m, masks=HALF))),
    "story, one stage": Way(lambda m, _: pictures(story(m, feature_injection=0.0))),
    "story, heun": Way(lambda m, _: pictures(story(m), sampler="heun")),
    "anchors": Way(lambda m, _: studio.anchors(story(m, anchors=0))),
    "story beside anchors": Way(
        lambda m, b: pictures(story(m, anchors=0, reference=b), (3,)), kept_anchors
    ),
    "story beside photos": Way(lambda m, b: pictures(story(m, reference=b), (3, 4)), photo_bank),
    "block probe": Way(lambda m, _: probed(m, studio.coarse(), studio.photo()["samples"])),
}

# transformers -----------------------------------------------------------------------------------------------------------------


def photo_of(model: Any, name: str, **how: Any) -> ReferenceBank:
    """A photo of random cells, inverted and read."""
    latent, prompt = tiny_networks.latent(name, seed=21), tiny_networks.prompt(name, seed=4)
    return capture(model, {"samples": latent}, prompt, **SCHEDULE, mask=HALF, **how)[0]


@cache
def held_photo(name: str, **how: Any) -> ReferenceBank:
    return photo_of(tiny_networks.tiny(name), name, **how)


def told_of(name: str) -> ManagedEncoder:
    """A concept encoder for a transformer."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = ConceptEncoder(config_of(name))
        for weights in encoder.parameters():
            weights.data += 0.3 * torch.randn(weights.shape)
    return encoder_of(encoder)


def on_transformer(name: str) -> dict[str, Way]:
    keeps = {"keeps": "keys and values"}
    cached, live = partial(held_photo, name, **keeps), partial(held_photo, name)

    def drawn(**how: Any) -> Callable[[Any, Any], Tensor]:
        return lambda m, b: tiny_networks.sample(inject(m, b, **how), name, steps=STEPS)

    def told_story(m: Any, _: Any) -> Tensor:
        return transformer_stories.pictures(transformer_stories.story(name, m), name)

    def with_concept(m: Any, e: ManagedEncoder) -> Tensor:
        return tiny_networks.sample(concept(m, encoder=e), name, steps=STEPS)

    ways = {
        "capture, read live": Way(lambda m, _: photo_of(m, name), family=name),
        "capture": Way(lambda m, _: photo_of(m, name, **keeps), family=name),
        "injection, cached": Way(drawn(), cached, family=name),
        "injection, read live": Way(drawn(), live, family=name),
        "story": Way(told_story, family=name),
        "concept": Way(with_concept, before=lambda m: told_of(name), family=name),
    }
    if name == "Flux":  # its keys are turned to other places
        ways["injection, aside"] = Way(drawn(positions="aside"), cached, family=name)
    return {f"{name}: {way}": how for way, how in ways.items()}


WAYS: dict[str, Way] = {
    **UNET,
    **on_transformer("Flux"),
    **on_transformer("SD3.5"),
    **on_transformer("PixArtSigma"),
}

# running ----------------------------------------------------------------------------------------------------------------------


def built(way: Way) -> ModelPatcher:
    """A fresh model on the CPU, the same every time."""
    if way.family:
        return tiny_networks.build(tiny_networks.FAMILIES[way.family])
    return build_model("tiny")


def ran(way: Way, model: Any, device: Pretended | None = None) -> Any:
    """What a way makes of a model; `device` tells of its run alone."""
    with torch.inference_mode():
        before = way.before(model)
        held = way.given() if way.given and before is None else before
        if device:
            device.clear()
        return way.run(model, held)


@contextmanager
def there(way: Way, model: ModelPatcher | None = None) -> Iterator[tuple[Pretended, ModelPatcher]]:
    """A pretended device, and the way's model on it; what it is given is made before, on the CPU."""
    with torch.inference_mode():
        way.given and way.given()
        config_of(way.family) if way.family else None
    with host_there() as device:
        network = (model or built(way)).model
        yield device, ModelPatcher(network, CUDA, CPU)


@cache
def on_the_cpu(name: str) -> Any:
    return ran(WAYS[name], built(WAYS[name]))


@cache
def on_the_device(name: str) -> tuple[Any, tuple[Act, ...]]:
    """What a way makes there, and what it did."""
    with there(WAYS[name]) as (device, model):
        made = ran(WAYS[name], model, device)
        return made, tuple(device.acts)
