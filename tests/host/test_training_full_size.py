"""The training loop through the host's UNets: checkpointing changes no gradient, and SD1.5's real size steps and resumes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from kindred.models.concept.training import Examples, Trainer, TrainSettings, draw
from kindred.models.injection import Merge
from kindred.nodes.host import FrozenUNet, attention_sites
from networks import ODD, build_model, random_prompt
from studio import TOWER, fresh_encoder

SETTINGS = TrainSettings(
    steps=2, batch=2, rate=1e-3, average=0.9, drop_text=0.0, drop_image=0.0, drop_both=0.0
)


def examples(size: int) -> Examples:
    generator = torch.Generator().manual_seed(0)
    side = TOWER["image_size"]
    return Examples(
        torch.randn(2, 4, size, size, generator=generator),
        torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8),
        ["a cat", "a cat"],
        [0, 1],
    )


def trainer_of(family: str, size: int, checkpointing: bool = False, model=None) -> Trainer:
    """A small random tower before a UNet with random weights; keys and values start as the text's."""
    model = model or build_model(family)
    texts = {
        "": random_prompt(family, 0),
        "a cat": random_prompt(family, 1, tokens=154),
    }  # unequal: repeated to a common length
    encoder = fresh_encoder(family, model=model)
    encoder.start_from_text(
        {
            b: (s.module.attn2.to_k.weight, s.module.attn2.to_v.weight)
            for b, s in attention_sites(model.model.diffusion_model).items()
        }
    )
    return Trainer(
        encoder, FrozenUNet(model, Merge.CONCAT, texts, checkpointing), examples(size), SETTINGS
    )


def gradient(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the first step's loss, for everything that learns; the frozen UNet has none."""
    trainer.optimizer.zero_grad(set_to_none=True)
    loss = trainer.loss(draw(SETTINGS, trainer.examples, len(trainer.denoise.sigmas), 0))
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is None for p in trainer.denoise.model.parameters())
    return {name: p.grad.clone() for name, p in trainer.trained.items()}


def same_gradient(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, grad in first.items():
        assert grad.any(), f"no gradient reaches {name}"
        assert (second[name] - grad).abs().max() <= 1e-6 * grad.abs().max(), name


@pytest.mark.parametrize("family", ["tiny", "tiny_v", "tiny_xl", *ODD])
def test_checkpointing_changes_no_gradient(family):
    plain, again = trainer_of(family, 8), trainer_of(family, 8, checkpointing=True)
    assert plain.denoise.velocity == (family in ("tiny_v", "tiny_unclip"))
    same_gradient(gradient(plain), gradient(again))


@pytest.mark.slow
def test_sd15_steps_resumes_and_recomputes():
    """860 million frozen weights, 16 layers of 320 to 1280 channels: two steps, and one with another from its state."""
    model = build_model("sd15")
    try:
        whole = trainer_of("sd15", 8, model=model)
        assert (
            sorted(c for _, c in whole.encoder.config.layers) == [320] * 5 + [640] * 5 + [1280] * 6
        )
        first = gradient(whole)
        whole.step()
        state = copy.deepcopy(whole.state())
        losses = [whole.losses[0], whole.step()]
        resumed = trainer_of("sd15", 8, model=model)
        resumed.resume(state)
        resumed.step()
        assert resumed.losses == pytest.approx(losses, rel=1e-6)
        for name, value in whole.averaged().items():
            assert torch.allclose(resumed.averaged()[name], value, rtol=1e-6, atol=1e-7), name
        same_gradient(first, gradient(trainer_of("sd15", 8, checkpointing=True, model=model)))
    finally:
        import comfy.model_management

        comfy.model_management.unload_all_models()
        del model
        gc.collect()
