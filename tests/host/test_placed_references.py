"""Where a reference stands, on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from kindred.models.network.rope import Positions
from kindred.nodes.host.sites import require_backbone
from networks import random_model
from studio import capture, inject
from test_transformers import FAMILIES, FELT, HALF, SAME, WHITE, apart, bank_of, itself, plain
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor

# positions are in the hidden states, or in a code that no turn undoes
UNPLACED = ("SD3", "SD3.5", "AuraFlow", "PixArtSigma", "HunyuanDiT", "ErnieImage")
ROTARY = tuple(name for name in FAMILIES if name not in UNPLACED)
ELSEWHERE = [p.value for p in Positions if p is not Positions.OWN]
families = pytest.mark.parametrize("name", ROTARY)
elsewhere = pytest.mark.parametrize("positions", ELSEWHERE)


@cache
def owned(name: str) -> Tensor:
    return sample(inject(tiny(name), bank_of(name)), name, cfg=1.0)


@cache
def placed(name: str, positions: str) -> Tensor:
    return sample(inject(tiny(name), bank_of(name), positions=positions), name, cfg=1.0)


@families
def test_each_place_is_felt_and_a_middle_of_one_size_is_its_own(name: str) -> None:
    """aside is apart where there is no time axis; centred is own beside a picture of the photo's size."""
    timed = require_backbone(tiny(name), "test").turn.timed
    assert torch.equal(placed(name, "own"), owned(name))
    assert apart(placed(name, "centred"), owned(name)) < SAME
    pictures = [placed(name, where) for where in ("own", "aside", "apart", "none")]
    distinct = {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), *([(1, 2)] if timed else [])}
    for one, other in distinct:
        assert apart(pictures[one], pictures[other]) > FELT
    assert timed or torch.equal(pictures[1], pictures[2])
    assert all(picture.isfinite().all() for picture in pictures)


@families
@pytest.mark.parametrize("positions", ["none"])
def test_silent_or_outside_of_its_window_it_changes_no_bit(name: str, positions: str) -> None:
    bank = bank_of(name)
    window = inject(tiny(name), bank, positions=positions, start_percent=0.98, end_percent=0.99)
    silent = inject(tiny(name), bank, positions=positions, strength=0.0)
    nobody = inject(tiny(name), bank, positions=positions, target_mask=torch.zeros(1, 8, 8))
    assert all(torch.equal(sample(m, name), plain(name)) for m in (window, silent, nobody))


@families
@pytest.mark.parametrize("positions", ["apart", "none"])
def test_held_or_read_anew_it_stands_where_it_stands(name: str, positions: str) -> None:
    held = inject(tiny(name), bank_of(name, keeps="keys and values"), positions=positions)
    assert apart(sample(held, name, cfg=1.0), placed(name, positions)) < SAME


@families
@pytest.mark.parametrize("positions", ["aside", "none"])
def test_a_photo_of_another_size_beside_another_text(name: str, positions: str) -> None:
    """Two texts, three pictures, both halves of guidance."""
    family = READ[name]
    size = family.grid[0] * family.patch, (family.grid[1] + 2) * family.patch
    photo, positive = {"samples": latent(name, seed=21, size=size)}, prompt(name, seed=4)
    bank = capture(
        tiny(name), photo, positive, steps=3, scheduler="simple", mask=HALF, negative=prompt(name, seed=3)
    )[0]  # fmt: skip
    model = inject(tiny(name), bank, positions=positions, halves="both")
    how = {
        "positive": prompt(name, words=family.words + max(family.step, 3)),
        "pictures": 3,
    }
    pictures = [sample(m, name, **how) for m in (model, tiny(name))]
    assert pictures[0].isfinite().all() and apart(*pictures) > FELT


@pytest.mark.parametrize("name", ["LongCatImage", "Lumina2", "ZImage", "Omnigen2", "Boogu"])
@elsewhere
def test_the_length_of_the_photos_text_is_of_no_matter(name: str, positions: str) -> None:
    """Where it moves the picture: keys read beside a long text and beside a short one come to stand at one place."""
    from kindred.models.reference.placing import Place, Placing
    from listening import even_picture, first_site, keys_of, listen

    family, found, noisy = READ[name], require_backbone(tiny(name), "test"), even_picture(name)
    grid, site = found.grid(tuple(noisy.shape[-2:])), first_site(found)
    kept, stood = torch.arange(grid[0] * grid[1]), []
    for more in (0, family.step):
        words = family.words + more
        keys = keys_of(found, listen(name, noisy, prompt(name, words=words))[0][site], grid)
        texts = found.text_tokens(words), found.text_tokens(family.words)
        place = Place.of(found.turn, grid, grid, texts)
        stood.append((keys, Placing(Positions(positions), 1).keys(keys, found.turn, place, kept)))
    (short, of_short), (long, of_long) = stood
    assert apart(of_long, of_short) < SAME and apart(long, short) > FELT


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "ZImage", "Anima", "PixelDiT"])
def test_chained_references_at_different_places_have_no_order(name: str) -> None:
    places = ("own", "aside", "none", "none")
    forth, back = tiny(name), tiny(name)
    for where in places:
        forth = inject(forth, bank_of(name), 0.5, positions=where)
    for where in reversed(places):
        back = inject(back, bank_of(name), 0.5, positions=where)
    assert apart(sample(forth, name, cfg=1.0), sample(back, name, cfg=1.0)) < SAME


@pytest.mark.parametrize("name", ROTARY)
def test_the_texts_share_is_kept_wherever_it_stands(name: str) -> None:
    """A picture reads itself from elsewhere: no longer plain, and with the text dimmed another one where text and picture are joint."""
    joint = require_backbone(tiny(name), "test").joint
    kept, dimmed = (
        sample(
            inject(tiny(name), itself(name), 3.0, positions="none", text_share=share), name, cfg=1.0
        )
        for share in ("kept", "plain")
    )
    assert (apart(kept, dimmed) > FELT) is joint
    assert apart(kept, sample(tiny(name), name, cfg=1.0)) > FELT


@pytest.mark.parametrize("name", UNPLACED)
@elsewhere
def test_keys_without_positions_are_refused(name: str, positions: str) -> None:
    with pytest.raises(
        ValueError, match=f"positions is {positions}, but this model is .*Choose own"
    ):
        inject(tiny(name), bank_of(name), positions=positions)
    with pytest.raises(ValueError, match="SD1.5, SD2.x, SDXL.*Choose own"):
        inject(random_model("tiny"), unet_bank(), positions=positions)


@cache
def unet_bank() -> Any:
    photo = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))}
    text = [[torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(4)), {}]]
    return capture(random_model("tiny"), photo, text, steps=2, mask=WHITE)[0]


def test_stretched_positions_are_refused() -> None:
    """The host's ScaleROPE node changes what positions mean; own needs nothing of them."""
    from comfy_extras.nodes_rope import ScaleROPE

    for positions in ("aside", "own"):
        model = inject(tiny("Flux"), bank_of("Flux"), positions=positions)
        model = ScaleROPE.execute(model, 2.0, 0.0, 1.0, 0.0, 1.0, 0.0).result[0]
        if positions == "own":
            assert sample(model, "Flux", cfg=1.0).isfinite().all()
            continue
        with pytest.raises(
            ValueError, match="positions is aside, but another node.*Remove ScaleROPE"
        ):
            sample(model, "Flux", cfg=1.0)


def test_a_hook_before_the_code_is_an_override_behind_it() -> None:
    """FLUX lends it before rotation, with a longer code: the picture is the one of keys that were turned."""
    name, grid = "Flux", READ["Flux"].grid
    found, network = require_backbone(tiny(name), "test"), tiny(name).model.diffusion_model
    bank = capture(
        tiny(name), {"samples": latent(name, seed=21)}, prompt(name, seed=4), steps=3, scheduler="simple",
        mask=WHITE, keeps="keys and values",
    )[0]  # fmt: skip
    count, text = grid[0] * grid[1], READ[name].words
    stands = found.turn.placed(Positions.ASIDE, grid, grid, text)
    code, held = network.pe_embedder(stands[None]), {}

    def lend(
        q: Tensor, k: Tensor, v: Tensor, pe: Tensor, attn_mask: Any, extra_options: dict
    ) -> dict:
        block = extra_options["block_type"], extra_options["block_index"], 0
        sigma = float(extra_options["sigmas"][0])
        if sigma not in held:
            device, step = torch.device("cpu"), bank.step_of(sigma)
            held[sigma] = bank.tokens(next(iter(bank.features)), step, device, torch.float32)
        keys, values = held[sigma][block][None].chunk(2, -1)
        back = found.turn.between(found.turn.places(grid, text), None, keys.device)
        from kindred.models.network.rope import rotated

        bare = rotated(keys, back).unflatten(-1, (2, -1)).transpose(1, 2)
        values = values.unflatten(-1, (2, -1)).transpose(1, 2)
        mask = q.new_zeros(q.shape[2], q.shape[2] + count)
        mask[:text, q.shape[2] :] = -torch.inf  # the text does not read it
        pe = torch.cat((pe, code.expand(len(pe), *code.shape[1:])), 2)
        return {
            "q": q,
            "k": torch.cat((k, bare), 2),
            "v": torch.cat((v, values), 2),
            "pe": pe,
            "attn_mask": mask,
        }

    hooked = tiny(name).clone()
    hooked.set_model_patch(lend, "attn1_patch")
    ours = inject(tiny(name), bank, positions="aside", text_share="plain")
    one, other = (sample(m, name, cfg=1.0) for m in (hooked, ours))
    assert apart(one, other) < SAME and apart(one, owned(name)) > FELT
