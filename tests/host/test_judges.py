"""Host laws of the judges of real pictures: models from files as a user gives them, scores worked out beside them, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import pytest
import torch
from evaluation.faces import Faces
from evaluation.judges import (
    AestheticHead,
    Clip,
    Dino,
    Request,
    load_head,
    load_text,
    load_vision,
)
from judged import LINES, PHOTOS, Embedder, Finder, cosine, nan_like, noise, randomized
from judged import clip as random_clip
from safetensors.torch import save_file
from studio import TOWER
from torch import Tensor

LAW = pytest.mark.parametrize
NAN = float("nan")
DEEP = TOWER | {
    "num_hidden_layers": 24,
    "model_type": "clip_vision_model",
    "projection_dim": 768,
}  # the host tells ViT-L by its depth
SMALL_DINO = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 24,
    "layer_norm_eps": 1e-6,
    "use_swiglu_ffn": False,
    "patch_size": 8,
    "image_size": 24,
    "model_type": "dinov2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random models in files, laid out as the host's own loaders read them."""
    made = tmp_path_factory.mktemp("models")
    for name, config in (
        ("vit-l", DEEP),
        ("vit-h", DEEP | {"projection_dim": 1024}),
        ("dino", SMALL_DINO),
    ):
        tower = comfy.clip_vision.ClipVisionModel(config)
        randomized(tower.model, 1)
        save_file(
            {k: v.contiguous() for k, v in tower.get_sd().items()}, made / f"{name}.safetensors"
        )
    text = random_clip(768).cond_stage_model.clip_l.transformer.state_dict()
    save_file({k: v.half() for k, v in text.items()}, made / "clip_l.safetensors")
    save_file({k: v for k, v in text.items() if "layers.0" in k}, made / "sd15.safetensors")
    head = AestheticHead()
    randomized(head, 3)
    torch.save(head.state_dict(), made / "head.pth")
    save_file(head.state_dict(), made / "head.safetensors")
    torch.save(AestheticHead(1024).state_dict(), made / "head-h.pth")
    torch.save({"weight": torch.ones(1, 768), "bias": torch.ones(1)}, made / "linear.pth")
    torch.save(head.state_dict() | {"layers.7.bias": torch.tensor([NAN])}, made / "nan.pth")
    torch.save({k: v for k, v in head.state_dict().items() if "6" not in k}, made / "short.pth")
    (made / "page.safetensors").write_text("<!DOCTYPE html>")
    (made / "page.pth").write_text("<!DOCTYPE html>")
    return made


@pytest.fixture(autouse=True)
def small_models(monkeypatch) -> None:
    """The host's loaders with the sizes of these files where they would take those of the published ones."""
    whole = comfy.clip_vision.ClipVisionModel

    def tower(config: str) -> comfy.clip_vision.ClipVisionModel:
        return whole(
            SMALL_DINO if "dino" in str(config) else DEEP | {"projection_dim": tower.width}
        )

    tower.width = 768
    monkeypatch.setattr(comfy.clip_vision, "ClipVisionModel", tower)
    told = {
        "hidden_size": 768,
        "intermediate_size": 1536,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    monkeypatch.setattr(
        comfy.sd, "load_clip", partial(comfy.sd.load_clip, model_options={"model_config": told})
    )


@pytest.fixture
def vit_h(folder, monkeypatch):
    """A tower of another width."""
    comfy.clip_vision.ClipVisionModel.width = 1024
    return load_vision(folder / "vit-h.safetensors")


@pytest.fixture
def counted(monkeypatch) -> Callable[[object], list[int]]:
    """counted(vision) -> a list that grows by one for every picture its tower sees."""

    def watch(vision) -> list[int]:
        seen, encode = [], vision.encode_image
        monkeypatch.setattr(
            vision,
            "encode_image",
            lambda images, **more: seen.append(len(images)) or encode(images, **more),
        )
        return seen

    return watch


# CLIP ----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_clip_from_files_gives_the_hosts_own_cosines(folder):
    vision, text, head = (
        load_vision(folder / "vit-l.safetensors"),
        load_text(folder / "clip_l.safetensors"),
        load_head(folder / "head.pth"),
    )
    judge, images = Clip(vision, text, head), noise()
    found = judge(images, Request(LINES, PHOTOS))
    assert (
        list(found)
        == [column.name for column in judge.columns]
        == ["text", "image", "consistency", "aesthetic"]
    )
    seen, known = (
        [vision.encode_image(image[None])["image_embeds"] for image in batch]
        for batch in (images, PHOTOS)
    )
    assert found["image"] == pytest.approx(
        [sum(cosine(a, b) for b in known) / 2 for a in seen], abs=1e-6
    )
    pair = {(i, j): cosine(seen[i], seen[j]) for i in range(3) for j in range(3)}
    assert found["consistency"] == pytest.approx(
        [
            (pair[0, 1] + pair[0, 2]) / 2,
            (pair[1, 0] + pair[1, 2]) / 2,
            (pair[2, 0] + pair[2, 1]) / 2,
        ],
        abs=1e-6,
    )
    encoder, told = text.cond_stage_model.clip_l, []
    for line in LINES:
        encoder.set_clip_options({"projected_pooled": True})
        told.append(encoder.encode_token_weights(text.tokenize(line)["l"])[1])
    text.cond_stage_model.reset_clip_options()
    assert found["text"] == pytest.approx([cosine(a, b) for a, b in zip(seen, told)], abs=1e-6)
    assert found["aesthetic"] == pytest.approx(
        [by_hand(folder, row) for row in seen], rel=1e-4, abs=1e-5
    )


def by_hand(folder: Path, row: Tensor) -> float:
    """The aesthetic score as its authors write it: five linear layers over the embedding at unit length."""
    weights = torch.load(folder / "head.pth", weights_only=True)
    x = (row / row.norm()).double().flatten()
    for layer in (0, 2, 4, 6, 7):
        x = (
            weights[f"layers.{layer}.weight"].double() @ x
            + weights[f"layers.{layer}.bias"].double()
        )
    return x.item()


def test_every_picture_photo_and_prompt_is_embedded_once(folder, counted, monkeypatch):
    vision, text = (
        load_vision(folder / "vit-l.safetensors"),
        load_text(folder / "clip_l.safetensors"),
    )
    judge, seen, read = (
        Clip(vision, text, load_head(folder / "head.safetensors")),
        counted(vision),
        [],
    )
    tokenize = text.tokenize
    monkeypatch.setattr(
        text, "tokenize", lambda line, **more: read.append(line) or tokenize(line, **more)
    )
    first = judge(noise(), Request(LINES, PHOTOS))
    assert len(seen) == 3 + 2 and read == ["a cat", "a dog"]
    again = judge(noise(), Request(LINES, (PHOTOS[1].clone(), PHOTOS[0].clone())))
    assert len(seen) == 5 + 3 and len(read) == 2 and again["text"] == first["text"]
    assert again["image"] == pytest.approx(first["image"], abs=1e-12)
    judge(noise(), Request(LINES, (PHOTOS[0], 1 - PHOTOS[0])))
    assert len(seen) == 8 + 3 + 1  # only the photo that it had never seen


def test_a_score_below_nothing_stays_below_nothing(folder):
    judge = Clip(
        load_vision(folder / "vit-l.safetensors"), load_text(folder / "clip_l.safetensors")
    )
    judge.texts = lambda prompts: list(-judge.embed(noise()))
    assert judge(noise(), Request(LINES))["text"] == pytest.approx([-1, -1, -1], abs=1e-12)


def test_what_cannot_be_measured_is_no_number(folder):
    judge = Clip(load_vision(folder / "vit-l.safetensors"))
    assert [column.name for column in judge.columns] == ["image", "consistency"]
    story, single = judge(noise(), Request(LINES)), judge(noise(1), Request(("a cat",), PHOTOS))
    assert (
        nan_like(story["image"])
        and len(story["image"]) == 3
        and not any(map(math.isnan, story["consistency"]))
    )
    assert nan_like(single["consistency"]) and -1 <= single["image"][0] <= 1


def test_the_columns_say_what_they_are_by_which_model(folder):
    judge = Clip(
        load_vision(folder / "vit-l.safetensors"),
        load_text(folder / "clip_l.safetensors"),
        load_head(folder / "head.pth"),
    )
    columns = (
        *judge.columns,
        *Dino(load_vision(folder / "dino.safetensors")).columns,
        *Faces(Finder(), Embedder()).columns,
    )
    assert (
        len({column.name for column in columns})
        == len({column.title for column in columns})
        == len(columns)
        == 10
    )
    assert all(column.meaning for column in columns)
    assert all("CLIP of width 32, 24 px" in column.meaning for column in judge.columns)


def test_judging_changes_nothing_and_a_second_look_is_the_same(folder):
    judge = Clip(
        load_vision(folder / "vit-l.safetensors"),
        load_text(folder / "clip_l.safetensors"),
        load_head(folder / "head.pth"),
    )
    images, state = noise(), torch.get_rng_state()
    assert judge(images, Request(LINES, PHOTOS)) == judge(images, Request(LINES, PHOTOS))
    load_head(folder / "head.pth")
    assert torch.equal(images, noise()) and torch.equal(state, torch.get_rng_state())


def test_the_head_is_the_same_from_both_kinds_of_file(folder):
    rows = torch.randn(3, 768)
    one, other = (load_head(folder / f"head.{kind}")(rows) for kind in ("pth", "safetensors"))
    assert torch.equal(one, other) and torch.allclose(
        one, load_head(folder / "head.pth")(9 * rows), atol=1e-6
    )  # of any length


# DINO ----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_dino_comes_through_the_hosts_clip_vision(folder, counted):
    vision, images = load_vision(folder / "dino.safetensors"), noise()
    seen, known = (
        [vision.encode_image(image[None])["image_embeds"] for image in batch]
        for batch in (images, PHOTOS)
    )
    judge, looks = Dino(vision), counted(vision)
    found = judge(images, Request(LINES, PHOTOS))
    assert (
        list(found) == [column.name for column in judge.columns] == ["dino", "dino_consistency"]
        and len(looks) == 5
    )
    assert found["dino"] == pytest.approx(
        [sum(cosine(a, b) for b in known) / 2 for a in seen], abs=1e-6
    )
    assert found["dino_consistency"][0] == pytest.approx(
        (cosine(seen[0], seen[1]) + cosine(seen[0], seen[2])) / 2, abs=1e-6
    )
    assert nan_like(judge(images, Request(LINES))["dino"])


# what is refused -----------------------------------------------------------------------------------------------------------


@LAW(
    "load, file, words",
    [
        (
            load_vision,
            "nowhere.safetensors",
            "there is no file .*nowhere.safetensors.*Load CLIP Vision",
        ),
        (
            load_vision,
            "page.safetensors",
            "page.safetensors is no file of weights.*Load CLIP Vision",
        ),
        (load_vision, "head.pth", "head.pth holds no picture tower.*Load CLIP Vision"),
        (load_vision, "clip_l.safetensors", "clip_l.safetensors holds no picture tower"),
        (load_text, "nowhere.safetensors", "there is no file .*clip_l.safetensors"),
        (load_text, "page.pth", "page.pth is no file of weights"),
        (
            load_text,
            "vit-l.safetensors",
            "vit-l.safetensors holds no text encoder of CLIP.*clip_l.safetensors",
        ),
        (
            load_text,
            "sd15.safetensors",
            "sd15.safetensors holds no text projection.*clip_l.safetensors",
        ),
        (load_head, "nowhere.pth", "there is no file .*linearMSE.pth"),
        (load_head, "page.pth", "page.pth is no file of weights.*linearMSE"),
        (load_head, "vit-l.safetensors", "vit-l.safetensors is no aesthetic head.*layers.0.weight"),
        (load_head, "linear.pth", "linear.pth is no aesthetic head.*ViT-L/14"),
        (
            load_head,
            "head-h.pth",
            r"head in .*head-h.pth reads 1024 numbers \(ViT-H\), not 768 numbers \(ViT-L\).*ViT-L/14",
        ),
        (
            load_head,
            "short.pth",
            r"short.pth are not those of AestheticHead \(.*layers.6.*linearMSE",
        ),
        (load_head, "nan.pth", "nan.pth holds NaN or infinite weights.*broken"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(folder, load, file, words):
    with pytest.raises(ValueError, match="^evaluate: .*" + words):
        load(folder / file)


def test_a_tower_that_lacks_weights_is_refused(folder, tmp_path):
    """The host would warn, and judge by whatever the memory held."""
    weights = comfy.utils.load_torch_file(str(folder / "vit-l.safetensors"))
    save_file(
        {k: v for k, v in weights.items() if k != "visual_projection.weight"},
        tmp_path / "half.safetensors",
    )
    with pytest.raises(
        ValueError,
        match="half.safetensors lacks 1 weights of its picture tower, such as visual_projection.weight",
    ):
        load_vision(tmp_path / "half.safetensors")


def test_halves_of_different_clips_are_refused_by_their_names(folder, vit_h):
    with pytest.raises(
        ValueError,
        match=r"gives pictures as 1024 numbers \(ViT-H\).*texts as 768 numbers \(ViT-L\).*halves of one CLIP",
    ):
        Clip(vit_h, load_text(folder / "clip_l.safetensors"))
    with pytest.raises(
        ValueError,
        match=r"head reads 768 numbers \(ViT-L\), but CLIP .* gives 1024 numbers \(ViT-H\).*of ViT-L/14",
    ):
        Clip(vit_h, head=load_head(folder / "head.pth"))


def test_clip_and_dino_are_not_taken_for_one_another(folder):
    with pytest.raises(ValueError, match="dinov2, 24 px is no CLIP.*DINO has its own judge"):
        Clip(load_vision(folder / "dino.safetensors"))
    with pytest.raises(ValueError, match="CLIP of width 32, 24 px is no DINO.*DINOv2"):
        Dino(load_vision(folder / "vit-l.safetensors"))


@LAW(
    "images, asked, words",
    [
        (noise(2) * NAN, Request(LINES[:2]), "values of the pictures are NaN"),
        (noise(2), Request(LINES[:2], (PHOTOS[0] * NAN,)), "values of photo 1 are NaN"),
        (noise(2), Request(LINES), "2 pictures come with 3 prompts"),
        (noise(2)[0], Request(LINES), r"the pictures is \[40, 56, 3\]"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_every_judge(folder, images, asked, words):
    for judge in (
        Clip(load_vision(folder / "vit-l.safetensors")),
        Dino(load_vision(folder / "dino.safetensors")),
        Faces(Finder(), Embedder()),
    ):
        with pytest.raises(ValueError, match="evaluate: .*" + words):
            judge(images, asked)
