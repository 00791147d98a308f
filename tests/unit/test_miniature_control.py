"""The miniature's Control-LoRA without a host: what it starts as, how it learns, what its file holds, and the previews' numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kindred.miniature.control import (
    EXAMPLE,
    WEIGHTS,
    LowRank,
    covered,
    encoder_of,
    hint_of,
    load_weights,
    packed,
    whole_weights,
)
from kindred.miniature.layout import LATENT_CHANNELS, PREVIEW, PREVIEW_BIAS
from kindred.miniature.pack import CHECKPOINT
from kindred.miniature.preview import fit_colours
from kindred.miniature.silhouette import example
from kindred.miniature.train_control import fit
from PIL import Image
from safetensors.torch import load_file, save_file

NAMES = {
    "input_blocks.0.weight": (6, 4),
    "middle_block.0.weight": (6, 5, 3, 3),
    "time_embed.0.bias": (6,),
}


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny() -> LowRank:
    base = {name: rand(*shape, seed=seed) for seed, (name, shape) in enumerate(NAMES.items())}
    return LowRank(base, {"zero_convs.0.0.weight": torch.zeros(3, 3, 1, 1)}, rank=2, seed=1)


def goal() -> dict[str, torch.Tensor]:
    """Weights that a rank of 2 reaches exactly."""
    there = {name: value.clone() for name, value in tiny()().items()}
    for seed, (name, value) in enumerate(there.items()):
        lowered = value.flatten(1) if value.ndim > 1 else value[:, None]
        there[name] = (
            value
            + (
                rand(len(value), 1, seed=10 + seed) @ rand(1, lowered.shape[1], seed=20 + seed)
            ).view_as(value)
            / 2
        )
    return {name: value.detach() for name, value in there.items()}


def away(weights: dict[str, torch.Tensor], step: int) -> torch.Tensor:
    """A loss whose every step looks at other entries."""
    looks = {
        name: (rand(*value.shape, seed=100 + step) > 0).float() for name, value in weights.items()
    }
    return sum(
        ((weights[name] - value) * looks[name]).square().mean() for name, value in goal().items()
    )


def test_it_begins_as_the_network_it_copies():
    low = tiny()
    base = {name: rand(*shape, seed=seed) for seed, (name, shape) in enumerate(NAMES.items())}
    assert all(torch.equal(low()[name], value) for name, value in base.items())
    assert (
        encoder_of(
            base | {"output_blocks.0.weight": torch.zeros(1), "out.2.weight": torch.zeros(1)}
        ).keys()
        == base.keys()
    )
    assert not any(name.startswith(("up", "down")) and "bias" in name for name in low.state_dict())
    zero = [name for name, value in whole_weights(1).items() if not value.any()]
    assert {
        name for name in whole_weights(1) if name.startswith(("zero_convs", "middle_block_out"))
    } <= set(zero)
    assert "input_hint_block.14.weight" not in zero  # or nothing would ever learn


def test_it_learns(tmp_path):
    before = float(away(tiny()(), 0).detach())
    learnt = fit(tmp_path / "control.pt", tiny(), away, 150, 0.05)
    assert float(away(learnt(), 0)) < 0.02 * before


def test_a_killed_training_goes_on_exactly(tmp_path):
    whole = fit(tmp_path / "whole.pt", tiny(), away, 20, 0.01, saved=5)

    def killed(weights: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return away(weights, step)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut.pt", tiny(), killed, 20, 0.01, saved=5)
    seen = []
    again = fit(
        tmp_path / "cut.pt",
        tiny(),
        lambda weights, step: seen.append(step) or away(weights, step),
        20,
        0.01,
        saved=5,
    )
    assert seen == list(range(10, 20))
    one, other = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "cut")
    )
    for kind in ("raw", "model"):
        assert all(torch.equal(one[kind][name], value) for name, value in other[kind].items())
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()
    )


def test_a_file_gives_the_weights_back(tmp_path):
    low = fit(tmp_path / "control.pt", tiny(), away, 10, 0.1)
    save_file(packed(low.state_dict()), tmp_path / "control.safetensors")
    base = {name: rand(*shape, seed=seed) for seed, (name, shape) in enumerate(NAMES.items())}
    read = load_weights(base, tmp_path / "control.safetensors")
    assert read.keys() == low().keys()
    for name, value in low().items():
        assert torch.allclose(read[name], value, atol=5e-3), name


def test_hints_and_their_cells():
    mask = np.zeros((1, 16, 16), bool)
    mask[:, :8, :6] = True
    hint = hint_of(mask)
    assert (
        hint.shape == (1, 3, 16, 16)
        and set(hint.unique().tolist()) == {0.0, 1.0}
        and torch.equal(hint[:, 0], hint[:, 2])
    )
    cells = covered(torch.from_numpy(mask), 4)[
        0
    ]  # the second column is covered by half, which is not more than half
    assert cells.tolist() == [[True, False, False, False]] * 2 + [[False] * 4] * 2


def test_the_example_is_the_renderers_silhouette():
    picture = np.asarray(Image.open(EXAMPLE))
    assert (
        picture.shape == (128, 128, 3)
        and np.array_equal(picture, example())
        and set(np.unique(picture)) == {0, 255}
    )
    assert 0.08 < (picture > 0).mean() < 0.4


def test_colours_of_a_linear_world_are_found():
    factors, bias = rand(3, 3, seed=1).double(), rand(3, seed=2).double()
    latents = rand(4, 3, 5, 6, seed=3).double()
    pixels = torch.einsum("bcyx,ck->bkyx", latents, factors) + bias[:, None, None]
    images = ((pixels + 1) / 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    found = fit_colours(latents, images)
    assert torch.allclose(found[0], factors, atol=1e-6) and torch.allclose(
        found[1], bias, atol=1e-6
    )
    assert torch.tensor(PREVIEW).shape == (LATENT_CHANNELS, 3) and len(PREVIEW_BIAS) == 3


@pytest.mark.skipif(
    not WEIGHTS.exists(), reason="no weights: python -m miniature.train control writes them"
)
def test_the_shipped_file_fits_the_shipped_checkpoint():
    told = load_file(WEIGHTS)
    prefix = "model.diffusion_model."
    unet = {
        name.removeprefix(prefix): value
        for name, value in load_file(CHECKPOINT).items()
        if name.startswith(prefix)
    }
    weights = load_weights(encoder_of(unet))
    assert WEIGHTS.stat().st_size < 0.65 * 2**20 and "lora_controlnet" in told
    assert encoder_of(unet).keys() | whole_weights(0).keys() == weights.keys()
    assert all(bool(value.isfinite().all()) for value in weights.values())
    assert (
        float(weights["zero_convs.0.0.weight"].abs().max()) > 0
        and float(weights["middle_block_out.0.weight"].abs().max()) > 0
    )
