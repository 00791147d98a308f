"""Paper A's training-free half on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from studio import capture, inject, invert
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor

from kindred.models.inversion import InversionTrajectory
from kindred.models.reference import ReferenceBank
from kindred.nodes import host
from kindred.nodes.host.sites import require_backbone

FAMILIES = tuple(READ)
WHITE = torch.ones(1, 32, 32)
HALF = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], 2)
FELT = 1e-3  # of the greatest value: an effect that cannot be rounding
SAME = 1e-5  # of the greatest value: what rounding may do


def flat(samples: Tensor) -> Tensor:
    """[b c (1) y x] -> [b c y x]."""
    return samples.squeeze(2) if samples.ndim == 5 else samples


def apart(one: Tensor, other: Tensor) -> float:
    """Their greatest difference, in the greatest value of the second."""
    return float((one - other).abs().max() / other.abs().max())


@cache
def plain(name: str) -> Tensor:
    return sample(tiny(name), name)


@cache
def bank_of(name: str, masked: bool = True, **how: Any) -> ReferenceBank:
    """A photo of random cells, inverted and read."""
    photo = {"samples": latent(name, seed=21)}
    steps = {"steps": 3, "scheduler": "simple"}
    mask = HALF if masked else WHITE
    return capture(tiny(name), photo, prompt(name, seed=4), **steps, mask=mask, **how)[0]


@cache
def itself(name: str) -> ReferenceBank:
    """The plain picture's own way through the noise, read as if it were a photo's."""
    seen: dict[float, Tensor] = {}

    def noted(executor: Any, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        seen[float(timestep.flatten()[0])] = flat(x).float().clone()
        return executor(x, timestep, *args)

    model = tiny(name).clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "noted", noted)
    sample(model, name)
    sigmas = sorted(seen)
    way = torch.stack([torch.zeros_like(seen[sigmas[0]]), *(seen[s] for s in sigmas)])
    trajectory = InversionTrajectory(
        torch.tensor([0.0, *sigmas]),
        way,
        "fireflow",
        "",
        host.model_key(tiny(name)),
        "simple",
        noise=host.noise_of(tiny(name), "test"),
    )
    return capture(tiny(name), None, prompt(name), inversion=trajectory, mask=WHITE)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_is_felt_and_gone_with_its_node(name: str) -> None:
    model = inject(tiny(name), bank_of(name))
    assert apart(sample(model, name), plain(name)) > FELT
    assert torch.equal(sample(tiny(name), name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_that_reads_itself_stays_as_it_is(name: str) -> None:
    """At its own positions, with the text's share kept, at every weight."""
    for weight in (0.5, 3.0):
        assert apart(sample(inject(tiny(name), itself(name), weight), name), plain(name)) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_its_window_nothing_is_touched(name: str) -> None:
    model = inject(tiny(name), bank_of(name), start_percent=0.98, end_percent=0.99)
    assert torch.equal(sample(model, name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_held_or_read_anew_the_reference_is_the_same(name: str) -> None:
    live, held = bank_of(name), bank_of(name, keeps="keys and values")
    assert live.live and not live.bytes and not held.live and held.bytes
    pictures = [sample(inject(tiny(name), bank), name) for bank in (live, held)]
    assert apart(*pictures) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_an_inversion_and_its_latent_lead_to_the_same_reference(name: str) -> None:
    photo = {"samples": latent(name, seed=21)}
    path, noise, _ = invert(tiny(name), photo, prompt(name, seed=4), steps=3, scheduler="simple")
    bank = capture(tiny(name), None, prompt(name, seed=4), inversion=path, mask=HALF)[0]
    assert torch.equal(bank.trajectory.latents, bank_of(name).trajectory.latents)
    assert noise["samples"].shape == photo["samples"].shape and bank.trajectory.latents.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [
    {"cfg": 1.0}, {"pictures": 3}, {"sampler": "heun"}, {"sampler": "euler_ancestral"}, {"sampler": "dpmpp_2m_sde"}, {"steps": 5},
], ids=str)  # fmt: skip
def test_it_is_felt_however_one_samples(name: str, how: dict[str, Any]) -> None:
    with_it, without = (sample(m, name, **how) for m in (inject(tiny(name), bank_of(name)), tiny(name)))
    assert with_it.isfinite().all() and apart(with_it, without) > FELT


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_keeps_its_share_unless_told_otherwise(name: str) -> None:
    """Where text and picture are in one softmax, plain concatenation dims the text; where they are apart it changes nothing."""
    kept, dimmed = (
        sample(inject(tiny(name), itself(name), 3.0, text_share=share), name)
        for share in ("kept", "plain")
    )
    joint = require_backbone(tiny(name), "test").joint
    assert apart(kept, plain(name)) < SAME and (apart(dimmed, plain(name)) > FELT) is joint
