"""Laws of the reference bank: which blocks, which tokens at which step, which latent at which sigma."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kindred.models.network.blocks import block_name, select_blocks
from kindred.models.network.call import Half, Halves
from kindred.models.network.sites import keys_values
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.noise.path import DIFFUSION, Flow, Noise
from kindred.models.reference.bank import BANK_VERSION, ReferenceBank, ReferencePrompt
from kindred.models.reference.builder import BankBuilder, Keeps
from kindred.models.reference.rows import Layer, gather, thinned
from small_banks import anchor_bank
from torch import Tensor

SD15 = tuple(
    [("input", i, 0) for i in (1, 2, 4, 5, 7, 8)]
    + [("middle", 0, 0)]
    + [("output", i, 0) for i in range(3, 12)]
)
SDXL = tuple(
    [("input", i, d) for i in (4, 5) for d in range(2)]
    + [("input", i, d) for i in (7, 8) for d in range(10)]
    + [("middle", 0, d) for d in range(10)]
    + [("output", i, d) for i in range(3) for d in range(10)]
    + [("output", i, d) for i in range(3, 6) for d in range(2)]
)
SIGMAS = torch.tensor([0.0, 0.5, 2.0, 9.0])
R, Y, X = 2, 4, 6
BLOCKS = {
    ("input", 1, 0): ((4, 6), 3),
    ("middle", 0, 0): ((2, 3), 5),
    ("middle", 0, 1): ((2, 3), 5),
}  # block -> grid, channels


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trajectory(
    noise_maps: Tensor | None = None, sigmas: Tensor = SIGMAS, noise: Noise = DIFFUSION
) -> InversionTrajectory:
    return InversionTrajectory(
        sigmas,
        rand(4, R, 4, Y, X, seed=1),
        "ddim",
        "a cat",
        "SD15 0",
        "normal, 3 steps",
        noise_maps,
        noise,
    )


def masks() -> dict[tuple[int, int], Tensor]:
    """Pictures with different numbers of kept tokens."""
    fine = torch.zeros(R, 4, 6, dtype=torch.bool)
    fine[0, 1, 2:5] = True
    fine[1, 3, 0] = True
    coarse = torch.zeros(R, 2, 3, dtype=torch.bool)
    coarse[0, 0, 1] = coarse[1, 1, 2] = coarse[1, 0, 0] = True
    return {(4, 6): fine, (2, 3): coarse}


def tokens(half: Half, step: int) -> dict:
    """[r n c] per block, as a Ref-UNet pass would leave them; every step and half different."""
    start = 100 * step + (10 if half is Half.UNCOND else 0)
    return {
        b: rand(R, y * x, c, seed=start + i) for i, (b, ((y, x), c)) in enumerate(BLOCKS.items())
    }


def bank(
    halves: tuple[Half, ...] = (Half.COND, Half.UNCOND),
    precision: torch.dtype | None = None,
    noise_maps: Tensor | None = None,
) -> ReferenceBank:
    builder = BankBuilder(precision)
    for step in (2, 0, 1):  # a pass may run either way
        for half in halves:
            builder.add(half, step, tokens(half, step))
    prompts = {half: ReferencePrompt("a cat", torch.zeros(1, 77, 8)) for half in halves}
    return builder.finish(
        {b: grid for b, (grid, _) in BLOCKS.items()},
        masks(),
        trajectory(noise_maps),
        prompts,
        "SD15 0",
        None,
    )


# which blocks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count"),
    [("all", 16), ("encoder", 6), ("middle", 1), ("decoder", 9), ("masactrl", 6)],
)
def test_presets_of_sd15(wanted, count) -> None:
    chosen = select_blocks(wanted, SD15, "Node")
    assert len(chosen) == count
    stages = {
        "all": {"input", "middle", "output"},
        "encoder": {"input"},
        "middle": {"middle"},
        "decoder": {"output"},
        "masactrl": {"output"},
    }
    assert {b[0] for b in chosen} == stages[wanted]


def test_masactrl_starts_at_the_tenth_layer() -> None:
    """arXiv 2304.08465 counts attention layers from 0 and begins at 10: output 6 of SD1.5."""
    assert select_blocks("masactrl", SD15, "Node") == SD15[10:] and SD15[10] == ("output", 6, 0)


def test_presets_of_sdxl() -> None:
    counts = {"all": 70, "encoder": 24, "middle": 10, "decoder": 36}
    assert {name: len(select_blocks(name, SDXL, "Node")) for name in counts} == counts


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ("input 4", [("input", 4, 0)]),
        (
            "output 3-5, middle 0",
            [("middle", 0, 0), ("output", 3, 0), ("output", 4, 0), ("output", 5, 0)],
        ),
        (
            "middle 0, output 3 - 5",
            [("middle", 0, 0), ("output", 3, 0), ("output", 4, 0), ("output", 5, 0)],
        ),
        (" OUTPUT 11 ,, Input1,", [("input", 1, 0), ("output", 11, 0)]),
        ("output 3-4, output 4", [("output", 3, 0), ("output", 4, 0)]),
        ("middle, input 8", [("input", 8, 0), ("middle", 0, 0)]),
        ("output 9-99", [("output", 9, 0), ("output", 10, 0), ("output", 11, 0)]),
    ],
)
def test_lists_come_in_the_order_of_the_unet(wanted, chosen) -> None:
    assert list(select_blocks(wanted, SD15, "Node")) == chosen


def test_depth_chooses_within_a_block() -> None:
    assert select_blocks("middle 0.9", SDXL, "Node") == (("middle", 0, 9),)
    assert select_blocks("output 3-4.1", SDXL, "Node") == (("output", 3, 1), ("output", 4, 1))
    assert len(select_blocks("middle 0", SDXL, "Node")) == 10


@pytest.mark.parametrize("block", SDXL[::7])
def test_a_block_is_found_by_its_name(block) -> None:
    """block_name leaves depth 0 unnamed, so the name chooses the block, and at depth 0 those below it too."""
    found = select_blocks(block_name(block), SDXL, "Node")
    assert block in found and {b[:2] for b in found} == {block[:2]}
    assert found == (block,) or block[2] == 0


@pytest.mark.parametrize("wanted", ["up 3", "input 3", "middle 0.1", "output", "input 4.5.6", "-1"])
def test_an_unknown_block_is_refused_with_what_exists(wanted) -> None:
    with pytest.raises(ValueError, match=r"Node: no attention block matches") as refused:
        select_blocks(f"decoder, {wanted}", SD15, "Node")
    said = str(refused.value)
    assert repr(wanted) in said and "input 1, input 2, input 4" in said and "masactrl" in said


@pytest.mark.parametrize("wanted", ["", " , "])
def test_no_block_at_all_is_refused(wanted) -> None:
    with pytest.raises(ValueError, match=r"Node: blocks is empty.*output 3-5, middle 0"):
        select_blocks(wanted, SD15, "Node")


# what the bank holds ------------------------------------------------------------------------------------------------------


def test_gather_takes_the_flat_positions() -> None:
    x = rand(2, 5, 3, seed=1)
    torch.testing.assert_close(
        gather(x, torch.tensor([4, 7])), torch.stack([x[0, 4], x[1, 2]]), rtol=0, atol=0
    )


@pytest.mark.parametrize("half", list(Half))
@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_went_in_under_the_mask_comes_out_at_its_step(half, step) -> None:
    b = bank()
    given, read = tokens(half, step), b.tokens(half, step, torch.device("cpu"), torch.float32)
    assert list(read) == list(BLOCKS) == list(b.blocks)
    for block, (grid, c) in BLOCKS.items():
        by_hand = torch.cat([given[block][r][masks()[grid][r].flatten()] for r in range(R)])
        assert read[block].shape == (int(masks()[grid].sum()), c)
        assert torch.equal(read[block], by_hand)
        assert torch.equal(read[block], b.keep(given)[block])


def test_tokens_are_views_of_one_row() -> None:
    """One copy to the device for a step, not one per layer."""
    read = bank().tokens(Half.COND, 1, torch.device("cpu"), torch.float32)
    assert len({t.untyped_storage().data_ptr() for t in read.values()}) == 1


def test_tokens_arrive_in_the_dtype_asked_for() -> None:
    b = bank(precision=torch.float16)
    assert b.features[Half.COND].dtype == torch.float16
    read = b.tokens(Half.COND, 0, torch.device("cpu"), torch.float32)
    exact = bank().tokens(Half.COND, 0, torch.device("cpu"), torch.float32)
    for block, t in read.items():
        assert t.dtype == torch.float32
        assert torch.equal(t, exact[block].half().float())


def test_the_builder_keeps_copies_and_lets_go_of_full_tokens() -> None:
    builder, given = BankBuilder(), tokens(Half.COND, 0)
    first = {b: t.clone() for b, t in given.items()}
    builder.add(Half.COND, 0, given)
    for t in given.values():
        t.zero_()  # the host reuses its buffers
    b = builder.finish(
        {k: grid for k, (grid, _) in BLOCKS.items()}, masks(), trajectory(), {}, "SD15 0", None
    )
    assert all(
        torch.equal(t, b.keep(first)[k])
        for k, t in b.tokens(Half.COND, 0, torch.device("cpu"), torch.float32).items()
    )
    assert not builder._steps


def test_bytes_are_steps_times_halves_times_kept_tokens() -> None:
    """Steps x halves x sum over layers of l * c * itemsize."""
    row = 4 * 3 + 3 * 5 + 3 * 5
    assert bank().bytes == 3 * 2 * row * 4
    assert bank((Half.COND,), torch.float16).bytes == 3 * 1 * row * 2


def test_an_empty_mask_leaves_no_tokens() -> None:
    builder = BankBuilder()
    builder.add(Half.COND, 0, tokens(Half.COND, 0))
    none = {grid: torch.zeros_like(m) for grid, m in masks().items()}
    b = builder.finish(
        {k: grid for k, (grid, _) in BLOCKS.items()}, none, trajectory(), {}, "SD15 0", None
    )
    read = b.tokens(Half.COND, 0, torch.device("cpu"), torch.float32)
    assert {k: tuple(t.shape) for k, t in read.items()} == {
        k: (0, c) for k, (_, c) in BLOCKS.items()
    } and b.bytes == 0


def test_a_bank_is_of_this_version_and_frozen() -> None:
    b = bank()
    assert b.version == BANK_VERSION and b.layers[1] == Layer(("middle", 0, 0), (2, 3), 5)
    with pytest.raises(AttributeError):
        b.version = 0


# which step, which latent -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "step"),
    [
        (0.5, 0),
        (2.0, 1),
        (9.0, 2),
        (2.0005, 1),
        (8.996, 2),
        (2.01, None),
        (1.99, None),
        (0.0, None),
        (20.0, None),
        (0.1, None),
    ],
)
def test_a_step_is_found_by_its_sigma(sigma, step) -> None:
    """Row i of the features belongs to sigmas[i + 1]; between the stored ones the answer is live."""
    assert bank().step_of(sigma) == step


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_stored_latent_is_returned_as_it_is(level) -> None:
    assert torch.equal(bank().latent_at(SIGMAS[level].item()), trajectory().latents[level])


def test_below_the_last_level_a_latent_is_the_photo() -> None:
    """An odd schedule may ask there, and no path leads on."""
    assert torch.equal(bank().latent_at(-0.5), trajectory().latents[0])


def test_the_most_that_a_step_holds_is_that_of_the_fullest() -> None:
    """Of anchors every step holds others: 5, 0 and 8 tokens; of photos all hold the same."""
    assert anchor_bank().most_kept == {(4, 6): 16, (2, 3): 8}
    assert bank().most_kept == {grid: int(mask.sum()) for grid, mask in masks().items()}


def test_between_two_levels_the_path_is_straight() -> None:
    latents = trajectory().latents
    torch.testing.assert_close(bank().latent_at(1.25), (latents[1] + latents[2]) / 2)
    torch.testing.assert_close(bank().latent_at(0.25), (latents[0] + latents[1]) / 2)


def test_beyond_the_end_the_last_noise_is_scaled() -> None:
    """x_0 + sigma eps with the last level's eps."""
    latents = trajectory().latents
    eps = (latents[3] - latents[0]) / 9.0
    torch.testing.assert_close(bank().latent_at(14.6), latents[0] + 14.6 * eps)


@pytest.mark.parametrize(("sigma", "level"), [(0.7, 1), (1.5, 2), (3.0, 2), (5.0, 3), (12.0, 3)])
def test_edit_friendly_levels_have_noise_of_their_own(sigma, level) -> None:
    """A mean of two independent noises has too little of it: the nearest level's noise at the sigma asked for."""
    latents = trajectory().latents
    eps = (latents[level] - latents[0]) / SIGMAS[level]
    torch.testing.assert_close(
        bank(noise_maps=rand(3, R, 4, Y, X, seed=5)).latent_at(sigma), latents[0] + sigma * eps
    )


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_flows_latent_beyond_the_end_keeps_its_noise(scale) -> None:
    """(1 - sigma) x_0 + sigma eps with the last level's eps, up to sigma 1."""
    noise = Flow(scale)
    path = trajectory(sigmas=torch.tensor([0.0, 0.2, 0.5, 0.9]), noise=noise)
    x0, last = path.latents[0], path.latents[3]
    held = replace(bank(), trajectory=path)
    for sigma in (0.95, 1.0):
        wanted = noise.mix(x0, noise.noise_of(last, x0, 0.9), sigma)
        torch.testing.assert_close(held.latent_at(sigma), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(held.latent_at(0.35), (path.latents[1] + path.latents[2]) / 2)


@pytest.mark.parametrize(("sigma", "level"), [(0.3, 1), (0.35, 2), (0.6, 2), (0.8, 3), (1.0, 3)])
def test_edit_friendly_levels_of_a_flow_have_noise_of_their_own(sigma, level) -> None:
    noise = Flow(8.0)
    path = trajectory(rand(3, R, 4, Y, X, seed=5), torch.tensor([0.0, 0.2, 0.5, 0.9]), noise)
    x0, latent = path.latents[0], path.latents[level]
    wanted = noise.mix(x0, noise.noise_of(latent, x0, path.sigmas[level].item()), sigma)
    torch.testing.assert_close(
        replace(bank(), trajectory=path).latent_at(sigma), wanted, rtol=0, atol=1e-5
    )


def test_which_half_reads_which() -> None:
    read = {h: tuple(h.source(half) for half in (Half.COND, Half.UNCOND)) for h in Halves}
    assert read == {
        Halves.COND: (Half.COND, None),
        Halves.BOTH: (Half.COND, Half.UNCOND),
        Halves.SHARED: (Half.COND, Half.COND),
    }


# what is held of a token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 100, 1024])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.8])
def test_thinned_positions_are_spread_evenly(count, share) -> None:
    """Any stretch of them keeps its share to within three; stripes of a subject are not told apart from one another."""
    positions = torch.arange(count) * 3 + 1
    left = thinned(positions, share)
    assert (
        len(left) == max(round(count * share), 1)
        and set(left.tolist()) <= set(positions.tolist())
        and (left.diff() > 0).all()
    )
    hit = torch.isin(positions, left).float()
    for length in (8, 32, 128):
        if length <= count:
            assert (hit.unfold(0, length, 1).sum(1) - share * length).abs().max() <= 3
    if count == 1024:
        for period in (2, 3, 4, 8):
            assert all(abs(hit[i::period].mean() - share) < 0.05 for i in range(period))


def test_all_positions_are_all_of_them() -> None:
    positions = torch.tensor([3, 5, 8])
    assert thinned(positions, 1.0) is positions and len(thinned(positions[:0], 0.5)) == 0


def built(
    known: bool = False, share: float = 1.0, keeps: Keeps = Keeps.HIDDEN, project=None
) -> ReferenceBank:
    builder = BankBuilder(None, masks() if known else None, share, keeps, project)
    grids = {b: grid for b, (grid, _) in BLOCKS.items()}
    for step in range(3):
        builder.add(Half.COND, step, tokens(Half.COND, step), 3, grids)
    return builder.finish(
        grids,
        masks(),
        trajectory(None),
        {Half.COND: ReferencePrompt("a cat", torch.zeros(1, 77, 8))},
        "SD15 0",
        None,
    )


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_masks_that_are_known_before_give_the_bank_of_those_found_after(share) -> None:
    before, after = built(True, share), built(False, share)
    assert before.layers == after.layers and torch.equal(
        before.features[Half.COND], after.features[Half.COND]
    )
    if share < 1:
        assert before.bytes < built().bytes and all(
            loud > 1 for grid, loud in before.loudness.items() if masks()[grid].sum() > 1
        )


def test_keys_and_values_lie_side_by_side() -> None:
    """Held or made anew, they are to_k and to_v of the same tokens."""
    attn = {b: torch.nn.Module() for b in BLOCKS}
    for i, (b, (_, c)) in enumerate(BLOCKS.items()):
        torch.manual_seed(i)
        attn[b].to_k, attn[b].to_v = (
            torch.nn.Linear(c, c + 1, bias=False),
            torch.nn.Linear(c, c + 1, bias=False),
        )

    def project(block, kept):
        return torch.cat(keys_values(attn[block], kept.float()), -1).detach()

    hidden, held = built(), built(keeps=Keeps.KEYS_VALUES, project=project)
    for step in range(3):
        of = [b.tokens(Half.COND, step, torch.device("cpu"), torch.float32) for b in (hidden, held)]
        for block, attention in attn.items():
            for made, kept in zip(
                keys_values(attention, of[0][block][None]),
                keys_values(attention, of[1][block][None]),
            ):
                assert torch.allclose(made[0], kept[0], atol=1e-5) and made.shape == kept.shape
    assert built(keeps=Keeps.AUTO, project=project).bytes == held.bytes
    before = built(True, keeps=Keeps.KEYS_VALUES, project=project)
    assert before.layers == held.layers
    assert torch.allclose(before.features[Half.COND], held.features[Half.COND])
