"""A guider that draws the negative by a MODEL of its own, as Ideogram 4 is sampled: the prompt's half reads, or it is said why not."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DualModelGuider
from kindred.nodes.host import KEY
from studio import inject
from test_transformer_bad_input import of_both, staying_plain
from test_transformer_concepts import concept
from test_transformer_stories import SEVERAL
from test_transformers import FELT, apart, bank_of
from tiny_networks import READ, build, latent, prompt, tiny
from torch import Tensor, nn
from transformer_stories import HALF, SHARING, prompts_of, story

LAW = pytest.mark.parametrize
families = LAW("name", ["Ideogram4", "Flux"])
READS = {
    "reference": lambda m, name, halves: inject(m, of_both(name), halves=halves),
    "concept": lambda m, name, halves: concept(m, name, halves=halves),
    "story": lambda m, name, halves: story(name, m, halves=halves, masks=HALF, **SHARING),
}


def other(name: str) -> Any:
    """The MODEL of the negative: another checkpoint of the family."""
    model = build(READ[name])
    with torch.no_grad():
        for weights in model.model.diffusion_model.parameters():
            weights.mul_(1.05)
    return model


@torch.inference_mode()
def drawn(model: Any, negative_model: Any, name: str, cfg: float = 3.0, **more: Any) -> Tensor:
    """Two pictures by Dual Model CFG Guider; more: its negative, None for a text-free one."""
    negative = more.get("negative", prompt(name, seed=3))
    guider = DualModelGuider.execute(
        model, prompts_of(name, (0, 1)), cfg, negative_model, negative
    ).result[0]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 5)
    noise, euler = latent(name, pictures=2), comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=1)


@families
@LAW("kind", READS)
def test_the_prompts_half_reads_and_the_negative_stays_as_it_is(name: str, kind: str) -> None:
    """Without the node the pictures are back, bit for bit, whichever MODEL was asked last."""
    second = other(name)
    alone = drawn(tiny(name), second, name)
    read = drawn(READS[kind](tiny(name), name, "cond only"), second, name)
    assert read.isfinite().all() and apart(read, alone) > FELT
    assert torch.equal(drawn(tiny(name), second, name), alone)
    assert apart(alone, drawn(tiny(name), None, name)) > FELT


@families
def test_outside_of_its_steps_no_bit_changes(name: str) -> None:
    second, never = other(name), {"start_percent": 0.98, "end_percent": 0.99}
    model = inject(tiny(name), bank_of(name), **never)
    assert torch.equal(drawn(model, second, name), drawn(tiny(name), second, name))


@families
@LAW("kind", READS)
@LAW("halves", ["both", "shared"])
def test_a_half_that_another_model_draws_is_refused(name: str, kind: str, halves: str) -> None:
    """Before either network is asked; at guidance 1 there is no negative to read."""
    model, second = READS[kind](tiny(name), name, halves), other(name)
    asked: list[int] = []
    hook = second.model.diffusion_model.register_forward_pre_hook(lambda *args: asked.append(1))
    said = f"halves is '{halves}', but Dual Model CFG Guider.*Set halves to cond only, or leave"
    with staying_plain(name), pytest.raises(ValueError, match=said):
        drawn(model, second, name)
    hook.remove()
    assert not asked and drawn(model, second, name, cfg=1.0).isfinite().all()
    assert drawn(model, None, name).isfinite().all()


@families
def test_a_node_before_the_negatives_model_is_said(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone it changes nothing, beside another one it is refused; the same MODEL in both places is no fault."""
    second = other(name)
    ours, alone = inject(tiny(name), bank_of(name)), drawn(second, tiny(name), name)
    assert torch.equal(drawn(second, ours, name), alone)
    assert "wired before model_negative" in caplog.text and "Wire it before model" in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match="wired before model_negative.*Wire it before model"):
        drawn(inject(tiny(name), bank_of(name)), ours, name)
    both = drawn(ours, ours, name)
    assert apart(both, drawn(tiny(name), tiny(name), name)) > FELT
    assert "model_negative" not in caplog.text


@LAW("name", ["Ideogram4"])
def test_a_negative_of_no_text_at_all(name: str) -> None:
    """What the guider makes of an unwired negative: the picture alone, by either MODEL."""
    model = inject(tiny(name), bank_of(name))
    for second in (other(name), None):
        alone, read = (drawn(m, second, name, negative=None) for m in (tiny(name), model))
        assert read.isfinite().all() and apart(read, alone) > FELT


@families
def test_the_negatives_network_is_left_as_it_was(name: str) -> None:
    second = other(name)
    before = [p.clone() for p in second.model.diffusion_model.parameters()]
    drawn(inject(tiny(name), bank_of(name)), second, name)
    assert all(map(torch.equal, before, second.model.diffusion_model.parameters()))
    assert KEY not in second.model_options.get("transformer_options", {})
    layers: list[nn.Module] = list(second.model.diffusion_model.modules())
    assert not any("forward" in vars(layer) for layer in layers)


@families
def test_one_model_in_both_places_is_ordinary_guidance(name: str) -> None:
    """The host's own tooltip says so: a prompt's half that reads is then what CFG Guider draws."""
    model = inject(tiny(name), bank_of(name))
    assert apart(drawn(model, model, name), drawn(model, None, name)) < SEVERAL
