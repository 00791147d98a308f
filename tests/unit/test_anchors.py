"""Laws of recorded anchors: later pictures read them as they would have in the batch (ConsiStory 4.4, appendix E; I25)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kindred.models.network.call import Half, Halves
from kindred.models.reference.bank import ReferenceBank, ReferencePrompt
from kindred.models.reference.rows import split_row
from kindred.models.story.anchors import AnchorRecorder
from kindred.models.subject.correspondence import adain
from kindred.models.subject.maps import subject_masks
from small_unet import (
    COARSE,
    ENCODER,
    FINE,
    GRID,
    NOISE,
    SIGMAS,
    SITES,
    TEXTS,
    C,
    Studio,
    attn,
    close,
    differs,
    made,
    rand,
    spots,
    told,
)
from torch import Tensor


@dataclass
class Saved:
    """An AnchorSource over a bank, as models/story/readers.py has two."""

    bank: ReferenceBank
    aligned: bool = False

    def tokens(self, sigma: float, step: int, first: bool) -> dict:
        row = self.bank.step_of(sigma)
        return {
            half: self.bank.tokens(half, row, torch.device("cpu"), torch.float64, first=first)
            for half in self.bank.features
        }

    def loudness(self, block: tuple[str, int, int]) -> float:
        return 1.0

    def outputs(self, sigma: float) -> dict:
        a = self.bank.anchors
        return split_row(
            a.outputs[self.bank.step_of(sigma)],
            a.output_layers,
            dict.fromkeys((GRID, (2, 3)), len(a.subject)),
        )

    def features(self) -> tuple[Tensor, Tensor]:
        return self.bank.anchors.features, self.bank.anchors.subject


def anchors_of(rows: list[int], **changed) -> tuple[ReferenceBank, Tensor]:
    recorder = AnchorRecorder()
    masks = changed.pop("masks", None)
    out = made(rows, told(len(rows), recorder=recorder, masks=masks, **changed))
    prompts = {half: ReferencePrompt("", torch.zeros(1, 5, C)) for half in Half}
    return recorder.finish(out[: recorder.count], prompts, "key", "toy", {}), out


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"weight": 2.0, "official": True},
        {"halves": Halves.COND, "injection": 0.0},
        {"masks": spots(1), "anchors": 1, "blend": (0.0, 0.0)},
    ],
    ids=["as is", "official", "cond", "masks"],
)
def test_saved_anchors_are_as_good_as_anchors_of_the_batch(changed) -> None:
    """I25: the extras of a batch, made later; other pictures recorded beside the anchors change nothing."""
    together = made([0, 1, 2, 3], told(4, **{"masks": None, **changed}))
    bank, out = anchors_of([0, 1, 4], **changed)
    count = changed.get("anchors", 2)
    close(out[:count], together[:count])
    assert bank.pictures == count and bank.trajectory.sigmas.tolist() == pytest.approx(
        [0.0, *sorted(SIGMAS)]
    )
    alone = made([2, 3], told(2, Saved(bank), **{"masks": None, **changed}))
    close(alone, together[2:])
    assert differs(alone, made([2, 3], None))


def test_the_bank_holds_what_was_seen_and_where() -> None:
    """Rows ascend in sigma: tokens of the last stage, those of the first where it came again; outputs inside the window."""
    recorder = AnchorRecorder()
    story = told(3, recorder=recorder)
    studio = Studio(NOISE[:3], TEXTS[:3], story)
    out = studio.sample()
    prompts = {half: ReferencePrompt(f"a cat, {half.value}", torch.zeros(1, 5, C)) for half in Half}
    bank = recorder.finish(out[:2], prompts, "key", "toy", {"seed": 0})
    sigmas, a = sorted(SIGMAS), bank.anchors
    assert [layer.block for layer in bank.layers] == [COARSE, FINE] and [
        layer.grid for layer in bank.layers
    ] == [(2, 3), GRID]
    assert [layer.block for layer in a.output_layers] == [ENCODER, FINE] and list(
        bank.features
    ) == [Half.COND, Half.UNCOND]
    assert [len(row) > 0 for row in a.outputs] == [2.5 <= s <= 6.0 for s in sigmas]
    assert [len(a.first[Half.COND][i]) > 0 for i in range(7)] == [
        1.5 <= s <= 6.0 for s in sigmas
    ]  # 0.8 and 0.3 never came before
    for i, sigma in enumerate(sigmas):
        lengths = [len(a.kept[layer.grid][i]) for layer in bank.layers]
        assert all(len(bank.features[half][i]) == C * sum(lengths) for half in Half) and (
            sum(lengths) > 0
        ) == (sigma < 10.0)
        assert all(
            (a.kept[layer.grid][i] < 2 * layer.grid[0] * layer.grid[1]).all()
            for layer in bank.layers
        )  # anchors alone
    assert torch.equal(bank.trajectory.latents[0], out[:2].float()) and torch.equal(
        bank.trajectory.latents[-1], NOISE[:2].float()
    )
    assert torch.equal(
        bank.maps, torch.stack([story.words.maps.at(s)[:2].sum(1) for s in sigmas])
    ) and bank.maps.shape == (7, 2, 2, 3)
    last = story.words.maps.mean(-1.0)
    assert {g: m.tolist() for g, m in bank.masks.items()} == {
        g: subject_masks(last, g)[:2].tolist() for g in ((2, 3), GRID)
    }
    assert (
        a.features.dtype == torch.float32
        and a.features.shape == (2, 24, C)
        and bank.trajectory.prompt == "a cat, cond"
    )
    assert a.settings == {"seed": 0, "first_from": 6.0, "first_until": 1.5}


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_what_is_stored_is_a_copy_in_the_wanted_precision(precision) -> None:
    recorder, x = AnchorRecorder(precision, 2), rand(3, 24, C, seed=1)
    kept = torch.tensor([1, 5, 30])
    recorder.matched(x, kept)
    recorder.output(4.0, FINE, GRID, x)
    recorder.tokens(0, 4.0, FINE, GRID, Half.COND, x.flatten(0, 1)[kept], kept)
    recorder.latent(4.0, rand(3, 4, *GRID, seed=2))
    wanted = x.flatten(0, 1)[kept].flatten().to(precision or torch.float64)
    x.zero_()
    bank = recorder.finish(
        torch.zeros(2, 4, *GRID), {Half.COND: ReferencePrompt("", torch.zeros(1, 5, C))}, "", "", {}
    )
    for row in (bank.anchors.outputs[0], bank.features[Half.COND][0]):
        assert torch.equal(row, wanted) and row.dtype == (precision or torch.float64)


@pytest.mark.parametrize("align", [False, True])
def test_keys_of_photos_take_the_statistics_of_who_reads_them(align) -> None:
    """Appendix E: keys alone, each picture's own, in each half; anchors that were generated are as they are."""
    bank, _ = anchors_of([0, 1])
    q, k, v = (rand(6, 24, C, seed=i) for i in range(3))
    for aligned in (False, True):
        story = told(3, Saved(bank, aligned), masks=spots(3), align_keys=align)
        story.begin_step(1.5)
        (found,) = story.references(attn(), SITES[FINE], q, k, v)
        assert found.pictures is None and sorted(found.by_part) == [0, 1]
        for i, half in enumerate((Half.UNCOND, Half.COND)):
            tokens = story.step.tokens()[half][FINE][None]
            keys, module = SITES[FINE].module.attn1.to_k(tokens), SITES[FINE].module.attn1
            if aligned and align:
                keys = adain(keys, k.chunk(2)[i], where=spots(3).bool().flatten(1))
            assert torch.equal(found.by_part[i].k, keys) and torch.equal(
                found.by_part[i].v, module.to_v(tokens).expand(len(keys), -1, -1)
            )


def kept_of(*asked: tuple[float, Half]) -> AnchorRecorder:
    recorder = AnchorRecorder(count=1)
    for i, (sigma, half) in enumerate(asked):
        recorder.begin(0, sigma) if half is Half.UNCOND else None
        recorder.tokens(0, sigma, FINE, (1, 2), half, torch.full((2, C), float(i)), torch.arange(2))
        recorder.latent(sigma, torch.zeros(1, 4, 1, 2))
    return recorder


def finished(recorder: AnchorRecorder):
    return recorder.finish(
        torch.zeros(1, 4, 1, 2),
        {half: ReferencePrompt("", torch.zeros(1, 5, C)) for half in Half},
        "key",
        "toy",
        {},
    )


def test_the_first_answer_of_a_step_counts_until_it_is_asked_again() -> None:
    """Extra passes of other nodes (PAG, SAG) come after the sampler's own."""
    recorder = kept_of((1.0, Half.UNCOND), (1.0, Half.COND), (1.0, Half.COND))
    assert (finished(recorder).features[Half.COND][0] == 1).all()
    recorder = kept_of((1.0, Half.UNCOND), (1.0, Half.COND), (1.0, Half.UNCOND), (1.0, Half.COND))
    assert (finished(recorder).features[Half.COND][0] == 3).all()


def test_a_half_that_is_not_always_there_is_left_out() -> None:
    """CFG 1 for a part of the run has no uncond half there; without the cond half there are no anchors."""
    bank = finished(kept_of((2.0, Half.UNCOND), (2.0, Half.COND), (1.0, Half.COND)))
    assert list(bank.features) == list(bank.anchors.first) == [Half.COND]
    with pytest.raises(
        ValueError, match="noise level 1 the positive prompt was not sampled.*timestep range"
    ):
        finished(kept_of((2.0, Half.UNCOND), (2.0, Half.COND), (1.0, Half.UNCOND)))
