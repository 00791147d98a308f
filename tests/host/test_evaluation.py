"""Host laws of Consistency Score: what it says of pictures whose subjects are known, and what it refuses."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from judged import SCENES, clip, cosine, grid, noise, vision, world
from kindred.miniature.world import prompt
from kindred.nodes import drawing, evaluation
from kindred.nodes.evaluation import ComparisonGrid, ConsistencyScore, digits
from torch import Tensor

LAW = pytest.mark.parametrize
LINES = "\n".join(prompt("cat", scene) for scene in SCENES)
NAN = float("nan")


@torch.inference_mode()
def score(images: Tensor, **more) -> SimpleNamespace:
    out = ConsistencyScore.execute(images, **more)
    return SimpleNamespace(
        **dict(
            zip(("consistency", "identity", "text", "table", "picture"), out.result, strict=True)
        ),
        ui=out.ui,
    )


# the miniature's reader ----------------------------------------------------------------------------------------------------


def test_one_identity_scores_near_the_ceiling_and_different_ones_near_the_floor():
    same = [score(world(w, w, w, w)).consistency for w in (3, 8, 12)]
    other = [score(world(w, w + 1, w + 2, w + 3)).consistency for w in (3, 8, 12)]
    assert min(same) > 0.8 and max(other) < 0.4


def test_the_reference_decides_identity():
    reference = world(3, kind="cat", seed=60)
    own, other = (score(world(w, w), reference=reference).identity for w in (3, 9))
    assert own > 0.8 and other < 0.4


def test_one_stranger_in_a_batch_is_seen_in_the_table():
    others = [
        float(n) for n in re.findall(r"^\| \d \| ([\d.]+)", score(world(3, 3, 9, 3)).table, re.M)
    ]
    assert len(others) == 4 and others.index(min(others)) == 2


@LAW(
    "lines, share",
    [
        (LINES, 1.0),
        (LINES.replace("night", "the desert"), 0.75),
        (LINES.replace("cat", "dog"), 0.0),
        ("a (cat:1.2), oil on canvas", 1.0),
        ("Cats\n\nfish\ncats\nFISH", 0.5),
        ("nothing that it knows", 0.0),
        ("a cat\nsomebody\nsomebody\nsomebody", 1.0),
    ],
)
def test_text_is_the_share_of_pictures_with_the_class_and_scene_that_were_asked_for(lines, share):
    assert score(world(3, 3, 3, 3), prompts=lines).text == share


def test_a_line_that_names_nothing_of_the_world_is_not_judged_and_the_table_says_so():
    told = score(world(3, 3), prompts="a cat\nsomebody").table
    assert (
        "(1 of 2)" in told
        and "no prompt names a class" in score(world(3, 3), prompts="somebody").table
    )


def test_what_was_not_measured_is_zero_and_the_table_says_why():
    plain = score(world(3, 3))
    assert (
        (plain.identity, plain.text) == (0.0, 0.0)
        and "| identity | - | no reference |" in plain.table
        and "no prompts" in plain.table
    )
    single = score(world(3), reference=world(3, seed=60))
    assert single.consistency == 0.0 and single.identity > 0.8 and "one picture" in single.table


def test_the_order_of_the_batch_does_not_count():
    images = world(3, 9, 3, 4)
    here, there = score(images), score(images[[2, 0, 3, 1]])
    assert there.consistency == pytest.approx(here.consistency, abs=1e-6)


# CLIP ----------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_clip_gives_the_hosts_own_cosines():
    images, reference = noise(), noise(2, 30, 30, seed=5)
    found = score(
        images,
        reference=reference,
        prompts="a cat\na dog\na cat",
        clip_vision=vision(),
        clip=clip(),
    )
    seen, known = (
        [vision().encode_image(image[None])["image_embeds"] for image in batch]
        for batch in (images, reference)
    )
    pairs = [cosine(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found.consistency == pytest.approx(sum(pairs) / 3, abs=1e-5)
    assert found.identity == pytest.approx(
        sum(cosine(a, b) for a in seen for b in known) / 6, abs=1e-5
    )
    text = clip().cond_stage_model.clip_l
    told = []
    for line in ("a cat", "a dog", "a cat"):
        text.set_clip_options({"projected_pooled": True})
        told.append(text.encode_token_weights(clip().tokenize(line)["l"])[1])
    clip().cond_stage_model.reset_clip_options()
    assert found.text == pytest.approx(sum(map(cosine, seen, told)) / 3, abs=1e-5)
    assert "CLIP of width 32, 24 px" in found.table


def test_identical_pictures_are_one_under_clip():
    found = score(noise(1).expand(3, -1, -1, -1), reference=noise(1), clip_vision=vision())
    assert found.consistency == pytest.approx(1, abs=1e-6) and found.identity == pytest.approx(
        1, abs=1e-6
    )


@torch.inference_mode()
def test_of_sdxls_two_encoders_the_one_that_fits_reads_the_prompt():
    image, two = noise(1), clip(16, "xl")
    own = {
        24: two.encode_from_tokens(two.tokenize("a cat"), return_pooled=True)[1],
        16: two.cond_stage_model.clip_l.encode_token_weights(two.tokenize("a cat")["l"])[1],
    }
    for width, text in own.items():
        seen = vision(projection_dim=width).encode_image(image)["image_embeds"]
        found = score(
            image, prompts="a cat", clip_vision=vision(projection_dim=width), clip=two
        ).text
        assert found == pytest.approx(cosine(seen, text), abs=1e-5)


def test_encoding_for_the_score_leaves_the_clip_as_it_was():
    @torch.inference_mode()
    def conditioning():
        return clip().encode_from_tokens(clip().tokenize("a cat"), return_pooled=True)

    before = conditioning()
    score(noise(2), prompts="a dog", clip_vision=vision(), clip=clip())
    text = clip().cond_stage_model.clip_l
    assert (text.layer, text.layer_idx, text.return_projected_pooled) == text.options_default
    assert all(torch.equal(a, b) for a, b in zip(before, conditioning()))


def test_masks_take_the_surroundings_and_the_place_out_of_the_score():
    """One subject on three grounds, in three places: one once it is cut out."""
    images, masks = noise(3, 64, 64), torch.zeros(3, 64, 64)
    for i, (y, x) in enumerate(((4, 4), (30, 12), (38, 38))):
        images[i, y : y + 20, x : x + 16] = noise(1, 20, 16, seed=9)[0]
        masks[i, y : y + 20, x : x + 16] = 1
    plain = score(images, clip_vision=vision(), prompts="a cat", clip=clip())
    cut = score(
        images,
        clip_vision=vision(),
        prompts="a cat",
        clip=clip(),
        masks=masks,
        reference=images[:1],
        reference_masks=masks[:1],
    )
    assert (
        cut.consistency == pytest.approx(1, abs=1e-6)
        and cut.identity == pytest.approx(1, abs=1e-6)
        and plain.consistency < 0.999
    )
    assert cut.text == pytest.approx(plain.text, abs=1e-6) and "cut out" in cut.table


def test_the_judge_can_be_chosen_and_what_it_does_not_need_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        read = score(
            world(3, 3), judge="miniature reader", clip_vision=vision(), masks=torch.ones(1, 8, 8)
        )
    assert (
        read.consistency == score(world(3, 3)).consistency
        and "clip_vision and masks is not used" in caplog.text
    )
    assert "CLIP" in score(world(3, 3), judge="CLIP", clip_vision=vision()).table


@LAW(
    "more, warned",
    [
        ({}, 1),
        ({"judge": "auto", "reference": noise(2)}, 1),
        ({"judge": "miniature reader"}, 0),
        ({"clip": 1}, 0),
    ],
)
def test_a_judge_that_nobody_chose_warns_once_that_it_only_knows_the_miniatures_world(
    caplog, monkeypatch, more, warned
):
    """In the log; the table's first line and the head of the picture say it whoever chose it."""
    heads = []
    monkeypatch.setattr(
        evaluation, "score_card", lambda card: heads.append(card.judge) or drawing.score_card(card)
    )
    with caplog.at_level(logging.WARNING):
        told = score(
            noise(), **({"clip_vision": vision()} if "clip" in more else more)
        ).table.splitlines()[0]
    assert (
        sum("only knows the miniature's world" in record.getMessage() for record in caplog.records)
        == warned
    )
    for said in (told, *heads):
        assert ("only knows the miniature's world" in said) == ("clip" not in more)


def test_a_strip_does_not_fill_the_memory():
    assert score(torch.cat([noise(2, 1, 9000)]), clip_vision=vision()).consistency <= 1


# pictures of every kind ----------------------------------------------------------------------------------------------------


@LAW("more", [{}, {"clip": True}])
@LAW("channels", [1, 3, 4])
@LAW("pictures, reference", [(2, None), (2, 3), (1, 1), (13, 2)])
def test_any_size_and_channels_give_numbers_and_a_picture(more, channels, pictures, reference):
    more = {"clip_vision": vision(), "clip": clip(), "prompts": "a cat"} if more else {}
    known = None if reference is None else noise(reference, 100, 20, 4)
    found = score(noise(pictures, 33, 57, channels), reference=known, **more)
    assert all(-1 <= n <= 1 for n in (found.consistency, found.identity, found.text))
    assert found.picture.ndim == 4 and found.picture.shape[0] == 1 and found.picture.shape[-1] == 3
    assert 0 <= found.picture.min() and found.picture.max() <= 1 and found.picture.std() > 0


def test_a_large_batch_makes_no_larger_picture():
    many = score(noise(4).repeat(40, 1, 1, 1), clip_vision=vision())
    assert many.consistency <= 1 and max(many.picture.shape) < 3000 and "| 160 |" in many.table


def test_no_number_is_less_than_nothing():
    assert digits(-0.0004) == "0.000" and digits(-0.0006) == "-0.001" and digits(None) == "-"


def test_alpha_is_laid_over_white():
    clear = torch.cat([noise(3), torch.zeros(3, 40, 56, 1)], 3)
    assert score(clear, clip_vision=vision()).consistency == pytest.approx(1, abs=1e-6)
    assert torch.equal(grid(clear), grid(torch.ones(3, 40, 56, 3)))


def test_nothing_that_is_wired_changes_and_a_second_look_is_the_same():
    images, masks = world(3, 9).clone(), torch.ones(2, 128, 128)
    states = torch.get_rng_state(), random.getstate()
    for more in ({}, {"clip_vision": vision(), "masks": masks}):
        first, second = (
            score(images, reference=images, prompts="a cat | b", **more) for _ in range(2)
        )
        assert first.table == second.table and torch.equal(first.picture, second.picture)
    assert torch.equal(images, world(3, 9)) and torch.equal(masks, torch.ones(2, 128, 128))
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()


def test_the_table_survives_any_prompt():
    told = score(world(3, 3), prompts="a cat | \\ \u732b\na `dog`").table.splitlines()[-2:]
    assert (
        told[0].endswith("| a cat \\| \\\\ \u732b |")
        and len({len(re.findall(r"(?<!\\)\|", line)) for line in told}) == 1
    )


# what is refused -----------------------------------------------------------------------------------------------------------


@LAW(
    "images, more, words",
    [
        (noise(1), {}, "takes 2 at least, but images has 1.*reference"),
        (torch.full((2, 8, 8, 3), NAN), {}, "384 values of images are NaN.*--fp32-vae"),
        (noise(2), {"reference": torch.full((1, 8, 8, 3), NAN)}, "192 values of reference are NaN"),
        (noise(2)[..., :2], {}, r"images is \[2, 40, 56, 2\]"),
        (noise(0), {}, r"images is \[0, 40, 56, 3\]"),
        (noise(2)[0], {}, r"images is \[40, 56, 3\].*Wire an IMAGE"),
        (None, {}, "images is NoneType"),
        (noise(3), {"prompts": "a\nb"}, "prompts has 2 lines for 3 pictures.*one for all"),
        (noise(2), {"judge": "CLIP"}, "judge is CLIP, but no clip_vision.*choose auto"),
        (
            noise(2),
            {"reference_masks": torch.ones(1, 8, 8)},
            "reference_masks is wired, but reference is not",
        ),
        (
            noise(3),
            {"clip_vision": 1, "masks": torch.ones(2, 8, 8)},
            "masks has 2 masks for 3 pictures",
        ),
        (
            noise(2),
            {"clip_vision": 1, "masks": torch.zeros(1, 8, 8)},
            "mask 1 of masks is empty.*Preview Mask",
        ),
        (
            noise(2),
            {"clip_vision": 1, "clip": 24, "prompts": "a cat"},
            "pictures as 16 numbers, but the CLIP.* texts as 24.*Load CLIP",
        ),
        (
            noise(2),
            {"clip_vision": 1, "clip": 0, "prompts": "a cat"},
            "no text projection.*SD1.5.*clip_l.safetensors",
        ),
    ],
)
def test_what_cannot_be_judged_names_both_values_and_the_remedy(images, more, words):
    if "clip_vision" in more:
        more = more | {"clip_vision": vision()}
    if "clip" in more:
        text = clip(more["clip"] or 32)
        if not more["clip"]:
            text.cond_stage_model.clip_l.transformer.text_projection.weight.data.zero_()
        more = more | {
            "clip": text,
            "clip_vision": vision() if more["clip"] else vision(projection_dim=32),
        }
    with pytest.raises(ValueError, match="Consistency Score: .*" + words):
        score(images, **more)


def test_a_tower_that_is_no_judge_is_named():
    broken = SimpleNamespace(
        config={"hidden_size": 1152},
        model_type="siglip_vision_model",
        image_size=384,
        image_mean=[0.5] * 3,
    )
    broken.encode_image = lambda image: {"image_embeds": torch.ones(1, 729, 1152)}
    with pytest.raises(ValueError, match=r"siglip_vision_model, 384 px gives \[729, 1152\].*ViT-L"):
        score(noise(2), clip_vision=broken)
    broken.encode_image = lambda image: {"image_embeds": torch.full((1, 8), NAN)}
    with pytest.raises(
        ValueError, match="NaN or infinite values for picture 1 of 2.*--fp32-text-enc"
    ):
        score(noise(2), clip_vision=broken)


# the nodes on the canvas ---------------------------------------------------------------------------------------------------


@LAW("name", ["KindredConsistencyScore", "KindredComparisonGrid"])
def test_the_nodes_explain_themselves(node, root, name):
    schema = node(name).GET_SCHEMA()
    assert (
        schema.category == "Kindred"
        and schema.is_output_node
        and schema.description
        and len(schema.search_aliases) > 3
    )
    assert all(told.tooltip for told in (*schema.inputs, *schema.outputs))
    page = (root / "web" / "docs" / f"{name}.md").read_text("utf-8")
    assert all(f"**{told.id}**" in page for told in schema.inputs) and all(
        f"**{told.display_name}**" in page for told in schema.outputs
    )


def test_the_canvas_gets_a_picture_and_a_table():
    found = score(world(3, 9))
    assert found.ui["text"] == (found.table,)
    with torch.inference_mode():
        sheet = ComparisonGrid.execute({"image0": world(3, 9)}).ui.as_dict()["images"]
    for shown in (*found.ui["images"], *sheet):
        assert (
            shown["type"] == "temp"
            and (
                Path(folder_paths.get_temp_directory()) / shown["subfolder"] / shown["filename"]
            ).is_file()
        )
