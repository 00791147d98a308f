"""Laws of the concept encoder: shapes (I41), pixels, the tower's penultimate layer, the family it fits."""

from __future__ import annotations

import pytest
import torch
from kindred.models.concept.encoder import (
    ConceptConfig,
    ConceptEncoder,
    Preprocessing,
    VisionTower,
    check_layers,
)
from PIL import Image
from small_concept import LAYERS, SD15, SDXL, SMALL, TOWER

VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}


@pytest.fixture
def encoder() -> ConceptEncoder:
    torch.manual_seed(1)
    return ConceptEncoder(SMALL)


# what it is made of (I41) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, width, count", [(SD15, 768, 16), (SDXL, 2048, 70)])
def test_real_sizes(layers, width, count) -> None:
    """I41 on the meta device: tokens of ViT-L, F [b 257 w], K_c and V_c [b 257 C_l] for every layer."""
    with torch.device("meta"):
        encoder = ConceptEncoder(ConceptConfig("SD15", layers, width, 1024, VIT_L))
        pixels = torch.empty(2, 3, 224, 224)
        tokens = encoder.tower(pixels)
        made = encoder(pixels)
    assert tokens.shape == (2, 257, 1024) and encoder.features(tokens).shape == (2, 257, width)
    assert len(made) == count and {
        b: (tuple(k.shape), tuple(v.shape)) for b, (k, v) in made.items()
    } == {b: ((2, 257, c), (2, 257, c)) for b, c in layers}


def test_parameters_of_sd15() -> None:
    """method.md 2.3: 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280) = 19.17 M in the keys and values, 1.84 M in the MLP of ViT-L."""
    with torch.device("meta"):
        encoder = ConceptEncoder(ConceptConfig("SD15", SD15, 768, 1024))
    projections = sum(p.numel() for m in (encoder.to_k, encoder.to_v) for p in m.parameters())
    assert projections == 2 * 768 * (5 * 320 + 5 * 640 + 6 * 1280) == 19_169_280
    assert round(sum(p.numel() for p in encoder.mlp.parameters()) / 1e6, 2) == 1.84


def test_the_tower_holds_nothing_behind_the_penultimate_layer() -> None:
    """So that nothing in it can be without a gradient: 23 of ViT-L's 24 layers, no last norm."""
    with torch.device("meta"):
        names = {n for n, _ in VisionTower(VIT_L).named_parameters()}
    assert {int(n.split("layers.")[1].split(".")[0]) for n in names if "layers." in n} == set(
        range(23)
    )
    assert not any("post_layernorm" in n for n in names)


def test_a_small_one_in_numbers(encoder) -> None:
    """Eq. (6) by hand: F = MLP(tokens), K = F W_k, V = F W_v."""
    pixels = torch.randn(2, 3, 16, 16)
    tokens = encoder.tower(pixels)
    mlp = encoder.mlp
    by_hand = mlp[3](mlp[2](torch.nn.functional.gelu(mlp[0](tokens))))
    for block, (k, v) in encoder(pixels).items():
        name = "_".join(map(str, block))
        torch.testing.assert_close(k, by_hand @ encoder.to_k[name].weight.T)
        torch.testing.assert_close(v, by_hand @ encoder.to_v[name].weight.T)


def test_starting_from_the_text(encoder) -> None:
    text = {block: (torch.randn(c, 12), torch.randn(c, 12)) for block, c in LAYERS}
    encoder.start_from_text(text)
    features = torch.randn(2, 5, 12)
    for block, (k, v) in encoder.keys_values(features).items():
        torch.testing.assert_close(k, features @ text[block][0].T)
        torch.testing.assert_close(v, features @ text[block][1].T)
    assert all(p.requires_grad for p in encoder.parameters())


def test_without_a_tower_it_reads_tokens_only() -> None:
    encoder = ConceptEncoder(ConceptConfig("SD15", LAYERS, 12, 16))
    assert encoder.keys_values(encoder.features(torch.randn(1, 7, 16)))["input", 1, 0][0].shape == (
        1,
        7,
        8,
    )
    with pytest.raises(ValueError, match="connect CLIP Vision"):
        encoder(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_penultimate_tokens_are_transformers_hidden_states(prefix) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    full = CLIPVisionModel(CLIPVisionConfig(**TOWER)).eval()
    for p in full.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and norms too
    pixels, tower = torch.randn(2, 3, 16, 16), VisionTower(TOWER).eval()
    plain = {name.removeprefix("vision_model."): value for name, value in full.state_dict().items()}
    tower.load_clip(
        {prefix + name: value for name, value in plain.items()}
        | {"visual_projection.weight": torch.zeros(3)}
    )
    with torch.no_grad():
        states = full(pixel_values=pixels, output_hidden_states=True).hidden_states
        torch.testing.assert_close(tower(pixels), states[-2], rtol=0, atol=1e-6)
        assert (tower(pixels) - states[-1]).abs().max() > 0.1
    del plain["pre_layrnorm.weight"]
    with pytest.raises(RuntimeError, match="pre_layrnorm"):
        tower.load_clip(plain)


def test_a_tower_asked_for_by_hand_is_checked_alike() -> None:
    """The program's --new-tower."""
    for wrong, word in (
        ({"hidden_size": 8}, "num_hidden_layers is None"),
        (TOWER | {"patch_size": 99}, "no patches of 99"),
        (TOWER | {"num_attention_heads": 3}, "do not divide into 3 heads"),
    ):
        with pytest.raises(ValueError, match=word):
            VisionTower(wrong)


# pixels ----------------------------------------------------------------------------------------------------------------------


def picture(y: int, x: int, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Eight bits, smooth enough to be scaled: [1 y x c]."""
    coarse = torch.rand(1, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (y, x), mode="bilinear").movedim(1, -1)
    return (smooth * 255).round() / 255


def levels(pixels: torch.Tensor, how: Preprocessing) -> torch.Tensor:
    """Back to 0..255."""
    return (
        pixels * torch.tensor(how.std)[:, None, None] + torch.tensor(how.mean)[:, None, None]
    ) * 255


@pytest.mark.parametrize(
    "y, x", [(224, 224), (300, 200), (200, 300), (225, 224), (7, 5), (1, 1), (900, 640), (64, 513)]
)
def test_pixels_as_the_host_describes_them(y, x) -> None:
    """Short side to 224 (bicubic, antialiased), centre cut, eight bits, CLIP's mean and deviation."""
    how, image = Preprocessing(), picture(y, x)
    out = how(image)
    assert out.shape == (1, 3, 224, 224) and out.dtype == torch.float32
    scale = 224 / min(y, x)
    tall, wide = round(scale * y), round(scale * x)
    scaled = torch.nn.functional.interpolate(
        image.permute(0, 3, 1, 2), size=(tall, wide), mode="bicubic", antialias=True
    )
    cut = scaled[:, :, (tall - 224) // 2 :, (wide - 224) // 2 :][:, :, :224, :224]
    expected = (
        (cut * 255).clip(0, 255).round() / 255 - torch.tensor(how.mean).view(3, 1, 1)
    ) / torch.tensor(how.std).view(3, 1, 1)
    assert ((out - expected).abs() > 1e-6).float().mean() < 1e-4  # a tie may round either way
    eight = levels(out, how)
    assert (eight - eight.round()).abs().max() < 1e-3 and eight.min() > -0.1 and eight.max() < 255.1


@pytest.mark.parametrize("y, x", [(300, 200), (640, 900), (50, 60)])
def test_pixels_as_pillow_scales_them(y, x) -> None:
    """Another implementation of the same: within two of 255 levels."""
    how, image = Preprocessing(), picture(y, x)
    scale = 224 / min(y, x)
    tall, wide = round(scale * y), round(scale * x)
    pil = Image.fromarray((image[0] * 255).byte().numpy()).resize(
        (wide, tall), Image.Resampling.BICUBIC
    )
    top, left = (tall - 224) // 2, (wide - 224) // 2
    import numpy as np

    cut = torch.from_numpy(np.array(pil.crop((left, top, left + 224, top + 224)))).movedim(-1, 0)
    assert (levels(how(image)[0], how) - cut).abs().max() <= 2


def test_alpha_lies_over_white_and_grey_is_three_channels() -> None:
    how, image = Preprocessing(16), picture(20, 30, 4)
    alpha = image[..., 3:]
    torch.testing.assert_close(how(image), how(image[..., :3] * alpha + 1 - alpha))
    assert torch.equal(how(torch.zeros(1, 20, 20, 4)), how(torch.ones(1, 20, 20, 3)))
    grey = picture(20, 30, 1)
    assert torch.equal(how(grey), how(grey.repeat(1, 1, 1, 3)))


def test_pictures_of_a_batch_do_not_touch() -> None:
    how, both = Preprocessing(16), torch.cat((picture(20, 30), picture(20, 30, seed=1)))
    assert torch.equal(how(both), torch.cat([how(one[None]) for one in both])) and not torch.equal(
        *how(both)
    )
    assert how(both.half()).dtype == torch.float32


# against a model -------------------------------------------------------------------------------------------------------------


def test_an_encoder_fits_its_family_only() -> None:
    sd15, sdxl = ConceptConfig("SD15", SD15, 768, 1024), ConceptConfig("SDXL", SDXL, 2048, 1280)
    check_layers(sd15, "SD15", SD15, 768, "Node")
    check_layers(sd15, "SD15", SD15[::-1], 768, "Node")
    for config, family, layers, width in (
        (sd15, "SDXL", SDXL, 2048),
        (sdxl, "SD15", SD15, 768),
        (sd15, "SD20", SD15, 1024),
    ):
        with pytest.raises(ValueError) as caught:
            check_layers(config, family, layers, width, "Cross-Attn Detail Inject")
        for word in (
            "Cross-Attn Detail Inject",
            config.family,
            family,
            str(config.width),
            str(width),
            str(len(layers)),
            "Use an encoder",
        ):
            assert word in str(caught.value)
    with pytest.raises(ValueError, match="1280 channels there and 640 here"):
        check_layers(
            sd15,
            "SSD",
            tuple((b, 640 if b == ("middle", 0, 0) else c) for b, c in SD15),
            768,
            "Node",
        )
