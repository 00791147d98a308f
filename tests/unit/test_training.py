"""Laws of the training loop (method.md 2.2 eq. 10, I41): its loss, who learns, what more processes or bad numbers change."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from kindred.models.concept.training import Examples, OneProcess, Trainer, TrainSettings, draw
from small_training import (
    CONFIG,
    LAYERS,
    SETTINGS,
    Denoise,
    examples,
    fresh,
    gradients,
    join,
    same,
    through_a_file,
    trainer,
)
from torch import Tensor

# the loss (10) ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "velocity, weighting",
    [(False, "plain"), (True, "plain"), (False, "velocity"), (True, "velocity")],
)
@pytest.mark.parametrize("min_snr", [None, 5.0, 0.3])
def test_the_loss_by_hand(velocity, weighting, min_snr) -> None:
    """Eq. (10): || eps - eps_theta ||^2, or the same of v = (eps - sigma x0) / sqrt(1 + sigma^2); min-SNR of arXiv 2303.09556."""
    no_drops = {"drop_text": 0.0, "drop_image": 0.0, "drop_both": 0.0}
    one = trainer(
        replace(SETTINGS, batch=4, min_snr=min_snr, weighting=weighting, **no_drops), velocity
    )
    velocity = velocity or weighting == "velocity"
    d = draw(one.settings, one.examples, 12, 0)
    pixels = one.examples.pixels[d.partner].permute(0, 3, 1, 2) / 255
    how = CONFIG.preprocessing
    pixels = (pixels - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)
    sigma, clean = (
        one.denoise.sigmas[d.level].view(-1, 1, 1, 1),
        one.examples.latents[d.index].float(),
    )
    x = clean + sigma * d.noise
    denoised = one.denoise(
        x, sigma.flatten(), [one.examples.prompts[i] for i in d.index], one.encoder(pixels), 0.4
    )
    eps = (x - denoised) / sigma
    error = d.noise - eps
    if velocity:
        error = ((d.noise - sigma * clean) - (eps - sigma * denoised)) / (1 + sigma**2).sqrt()
    per_picture, snr = error.square().flatten(1).mean(1), 1 / sigma.flatten() ** 2
    share = (
        1.0
        if min_snr is None
        else torch.minimum(snr, torch.tensor(min_snr)) / (snr + 1 if velocity else snr)
    )
    torch.testing.assert_close(one.loss(d, 0.4), (per_picture * share).mean(), rtol=1e-5, atol=0)
    assert abs(one.loss(d, 0.0) - one.loss(d, 0.4)) > 1e-5


def test_what_is_dropped_is_not_told() -> None:
    """Dropped text is the empty prompt, a dropped picture the tower's zero; the rest is as it was drawn."""
    one, seen = (
        trainer(replace(SETTINGS, batch=64, drop_text=0.2, drop_image=0.2, drop_both=0.2)),
        [],
    )
    forward = one.forward
    one.forward = lambda pixels: seen.append(pixels) or forward(pixels)
    d = draw(one.settings, one.examples, 12, 0)
    one.loss(d)
    assert one.denoise.prompts[-1] == [
        "" if none else one.examples.prompts[i] for i, none in zip(d.index, d.no_text)
    ]
    assert (
        [not row.any() for row in seen[0]] == d.no_image.tolist()
        and 0 < d.no_image.sum() < 64
        and 0 < sum(d.no_text) < 64
    )


# who learns (I41) ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower_rate", [None, 1e-4, 0.0])
def test_the_gradient_reaches_what_learns_and_nothing_else(tower_rate) -> None:
    one = trainer(
        replace(SETTINGS, tower_rate=tower_rate, drop_text=0.0, drop_image=0.0, drop_both=0.0)
    )
    before = {name: p.detach().clone() for name, p in one.encoder.named_parameters()}
    one.step()
    for name, p in one.encoder.named_parameters():
        if tower_rate == 0 and name.startswith("tower."):
            assert p.grad is None and torch.equal(p, before[name]) and name not in one.trained
        elif name.endswith("k_proj.bias"):  # a softmax does not see what all its logits share
            assert p.grad is not None and p.grad.abs().max() < 1e-6
        else:
            assert p.grad.abs().max() > 1e-8 and not torch.equal(p, before[name]), name
    assert one.denoise.own.grad is None and float(one.denoise.own) == pytest.approx(0.7)
    assert not one.examples.latents.requires_grad
    rates = {float(g["lr"]): len(g["params"]) for g in one.optimizer.param_groups}
    assert (
        set(rates) == {1e-3} | ({1e-4} if tower_rate else set())
        and sum(rates.values()) == len(one.trained)
        or tower_rate is None
    )


def test_the_norm_of_a_step_is_clipped() -> None:
    one = trainer(replace(SETTINGS, clip=1e-3))
    one.step()
    norm = torch.stack([p.grad.norm() for p in one.trained.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_it_learns() -> None:
    """Fifty steps over one picture lower the loss of draws it has not seen."""
    one = trainer(replace(SETTINGS, rate=1e-2, batch=8, steps=60), pictures=examples((0,)))
    unseen = [draw(one.settings, one.examples, 12, 10_000 + i) for i in range(8)]
    before = sum(one.loss(d).item() for d in unseen)
    for _ in range(50):
        one.step()
    assert sum(one.loss(d).item() for d in unseen) < 0.98 * before


# the average -----------------------------------------------------------------------------------------------------------------


def test_the_average_by_hand() -> None:
    one = trainer()
    name = "mlp.0.weight"
    average = one.trained[name].detach().clone()
    for step in range(1, 4):
        one.step()
        decay = min(0.9, step / (9 + step))
        average = decay * average + (1 - decay) * one.trained[name].detach()
        torch.testing.assert_close(one.averaged()[name], average)
    assert one.averaged().keys() == one.encoder.state_dict().keys() and not torch.equal(
        average, one.trained[name]
    )
    plain = trainer(replace(SETTINGS, average=0.0))
    plain.step()
    assert plain.average is None
    same(plain.averaged(), plain.encoder.state_dict())


def test_what_is_kept_is_the_average_by_itself() -> None:
    one = trainer()
    one.step()
    kept = one.kept(pictures=7)
    same(dict(kept.state_dict()), one.averaged())
    assert (
        kept.config.training == {"steps": 1, "pictures": 7} and kept.config.layers == CONFIG.layers
    )
    one.step()
    assert not torch.equal(
        kept.state_dict()["mlp.0.weight"], one.averaged()["mlp.0.weight"]
    )  # it does not go on learning
    pixels = torch.randn(1, 3, 8, 8)
    assert kept(pixels).keys() == dict(LAYERS).keys()


# processes and micro-steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes, batch", [(2, 3), (3, 2), (6, 1)])
def test_processes_share_the_draw_and_the_gradient_of_one(processes, batch) -> None:
    """p processes with batch b are one with p * b: their draws side by side are its draw, the mean of their gradients its gradient."""
    drops = {"drop_text": 0.2, "drop_image": 0.2, "drop_both": 0.2}
    joined, parted = (replace(SETTINGS, batch=b, **drops) for b in (processes * batch, batch))
    for step in (0, 1, 77):
        one = draw(joined, examples(), 12, step)
        many = [draw(parted, examples(), 12, step, rank, processes) for rank in range(processes)]
        side = join(many)
        assert (side.index, side.partner, side.no_text) == (one.index, one.partner, one.no_text)
        assert all(
            torch.equal(getattr(side, name), getattr(one, name))
            for name in ("level", "noise", "no_image")
        )
        assert len({tuple(d.noise.flatten().tolist()) for d in many}) == processes
    whole = gradients(trainer(joined), one)
    shares = [
        gradients(trainer(parted, engine=OneProcess(rank=rank, processes=processes)), d)
        for rank, d in enumerate(many)
    ]
    same({name: torch.stack([s[name] for s in shares]).mean(0) for name in whole}, whole, 1e-6)
    assert any((s[name] - whole[name]).abs().max() > 1e-4 for s in shares for name in whole)


class Ranks(OneProcess):
    """A process of several, whose losses have the mean 3."""

    def mean(self, value: Tensor) -> Tensor:
        return value * 0 + 3.0


def test_the_loss_told_is_the_mean_over_processes() -> None:
    assert trainer(engine=Ranks()).step() == 3.0


def test_each_rank_steps_on_its_own_share() -> None:
    losses = []
    for rank in range(2):
        one = trainer(engine=OneProcess(rank=rank, processes=2))
        losses.append(one.loss(draw(SETTINGS, one.examples, 12, 0, rank, 2)).item())
        assert one.step() == pytest.approx(losses[-1], abs=1e-6)
    assert losses[0] != losses[1]


def test_accumulated_micro_steps_are_a_larger_batch() -> None:
    one = trainer(replace(SETTINGS, accumulate=3, batch=2, clip=1e9))
    for step in range(2):
        twin = trainer(replace(SETTINGS, batch=6))
        twin.encoder.load_state_dict(one.encoder.state_dict())
        micro = join([draw(one.settings, one.examples, 12, 3 * step + i) for i in range(3)])
        expected, loss = gradients(twin, micro), twin.loss(micro).item()
        assert one.step() == pytest.approx(loss, abs=1e-6)
        same({name: p.grad for name, p in one.trained.items()}, expected, 1e-6)


# what is drawn ---------------------------------------------------------------------------------------------------------------


def test_dropouts_are_as_often_as_set() -> None:
    settings, pictures = (
        replace(SETTINGS, batch=500, drop_text=0.05, drop_image=0.15, drop_both=0.3),
        examples(),
    )
    draws = [draw(settings, pictures, 12, step) for step in range(16)]
    text = torch.tensor([x for d in draws for x in d.no_text])
    image = torch.cat([d.no_image for d in draws])
    for got, wanted in (
        (text & ~image, 0.05),
        (image & ~text, 0.15),
        (text & image, 0.3),
        (~text & ~image, 0.5),
    ):
        assert abs(float(got.float().mean()) - wanted) < 4 * math.sqrt(
            wanted * (1 - wanted) / len(got)
        )
    none = draw(replace(settings, drop_text=0.0, drop_image=0.0, drop_both=0.0), examples(), 12, 0)
    assert not any(none.no_text) and not none.no_image.any()


def test_levels_are_spread_and_uniform() -> None:
    """One of b equal strata each, all levels equally often."""
    settings = replace(SETTINGS, batch=6)
    pictures = examples()
    levels = torch.stack([draw(settings, pictures, 12, step).level for step in range(600)])
    assert all(sorted(row.tolist()) == list(range(6)) for row in levels // 2)
    counts = levels.flatten().bincount(minlength=12).float()
    assert len(counts) == 12 and (counts - 300).abs().max() < 5 * math.sqrt(300)
    assert (
        levels.float().mean(0) - 5.5
    ).abs().max() < 0.7  # no row of the batch has levels of its own


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6])
def test_noise_levels_are_drawn_from_their_share_up_and_all_alike(share) -> None:
    """One of b equal strata each: with a picture per level, every level of the share comes once."""
    first = round(share * 100)
    settings = replace(SETTINGS, batch=100 - first, noise_from=share)
    found = [sorted(draw(settings, examples(), 100, step).level.tolist()) for step in range(3)]
    for levels in found:
        assert min(levels) >= first and max(levels) <= 99
        assert all(abs(level - (first + i)) <= 1 for i, level in enumerate(levels))


def test_every_picture_is_drawn_alike() -> None:
    counts, pictures = torch.zeros(7), examples()
    for step in range(500):
        for i in draw(SETTINGS, pictures, 12, step).index:
            counts[i] += 1
    assert (counts - 1500 / 7).abs().max() < 5 * math.sqrt(1500 / 7)


def test_the_tower_sees_another_picture_of_the_subject() -> None:
    pictures, seen = examples(), set()
    for step in range(200):
        d = draw(SETTINGS, pictures, 12, step)
        seen |= set(zip(d.index, d.partner))
    assert seen == {
        (i, j) for group in pictures.groups.values() for i in group for j in group if i != j
    } | {(5, 5), (6, 6)}
    assert all(pictures.partner(i, 1 - 2**-24) in range(7) for i in range(7))


def test_steps_and_seeds_draw_anew_and_again() -> None:
    def noise(seed: int, step: int) -> tuple:
        return tuple(
            draw(replace(SETTINGS, seed=seed), examples(), 12, step).noise.flatten().tolist()
        )

    assert len({noise(seed, step) for seed in (0, 1, -1, 2**31) for step in range(5)}) == 20
    assert noise(3, 4) == noise(3, 4)


def test_the_global_random_state_is_left_alone() -> None:
    encoder = fresh()
    state = torch.get_rng_state()
    one = Trainer(encoder, Denoise(), examples(), SETTINGS)
    one.step()
    one.kept()
    resumed = Trainer(deepcopy(encoder), Denoise(), examples(), SETTINGS)
    resumed.resume(through_a_file(one.state()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    torch.rand(7)
    assert resumed.step() == one.step()


# what goes wrong -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_bad_numbers_stop_the_run_and_change_nothing(where) -> None:
    one, twin = trainer(), trainer()
    for each in (one, twin):
        each.step()
    before = deepcopy(through_a_file(one.state()))
    if where == "loss":
        one.denoise.broken = True
    else:
        hook = one.trained["mlp.0.weight"].register_hook(lambda g: g * math.inf)
    with pytest.raises(
        FloatingPointError, match=r"loss of step 2 is .*Lower the learning rate \(now 0.001\)"
    ):
        one.step()
    after = through_a_file(one.state())
    assert (after["step"], after["losses"]) == (before["step"], before["losses"])
    same(after["encoder"], before["encoder"])
    same(after["average"], before["average"])
    for i, values in after["optimizer"]["state"].items():
        same(values, before["optimizer"]["state"][i])
    one.denoise.broken = False
    if where == "gradient":
        hook.remove()
    assert one.step() == twin.step()
    same(one.encoder.state_dict(), twin.encoder.state_dict())


@pytest.mark.parametrize(
    "name, values",
    [
        ("steps", (0, -1)),
        ("batch", (0, -2)),
        ("accumulate", (0,)),
        ("rate", (0.0, -1e-5, 1.0, math.nan, math.inf)),
        ("tower_rate", (-1e-5, 1.0, math.nan)),
        ("schedule", ("linear", "")),
        ("average", (-0.1, 1.0, math.nan)),
        ("weighting", ("v", "")),
        ("warm_up", (-1,)),
        ("weight_warm_up", (-1,)),
        ("weight_decay", (-0.1, math.nan)),
        ("drop_text", (-0.1, 0.9, 1.5, math.nan)),
        ("clip", (0.0, -1.0, math.nan)),
        ("min_snr", (0.0, -5.0, math.nan)),
    ],
)
def test_settings_that_cannot_be(name, values) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"training: {name} is {value}; it must be "):
            TrainSettings(**{name: value})


@pytest.mark.parametrize("name", ["drop_image", "drop_both"])
def test_the_other_dropouts_are_checked_too(name) -> None:
    for value in (-0.1, 0.95, math.nan):
        with pytest.raises(ValueError, match="drop_text"):
            TrainSettings(**{name: value})


def test_the_papers_run_is_the_default() -> None:
    s = TrainSettings()
    assert (s.steps, s.batch, s.rate, s.tower_rate, s.min_snr) == (100_000, 2, 1e-5, None, None)


def test_rates_and_weights_over_the_steps() -> None:
    s = TrainSettings(steps=110, schedule="cosine", warm_up=10, weight_warm_up=100)
    assert [s.rate_at(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert (
        s.rate_at(10) == 1.0
        and s.rate_at(60) == pytest.approx(0.51)
        and s.rate_at(110) == pytest.approx(0.02)
    )
    assert s.rate_at(10**6) == pytest.approx(0.02) and TrainSettings(steps=5).rate_at(10**6) == 1.0
    assert [s.weight_at(i) for i in (0, 50, 100, 101)] == pytest.approx(
        [0.01, 0.1, 1.0, 1.0]
    ) and TrainSettings().weight_at(0) == 1.0
    rates = [s.rate_at(i) for i in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_without_pictures_there_is_nothing_to_train() -> None:
    none = Examples(torch.zeros(0, 4, 3, 3), torch.zeros(0, 8, 8, 3, dtype=torch.uint8), [], [])
    with pytest.raises(ValueError, match="there are no pictures"):
        Trainer(fresh(), Denoise(), none, SETTINGS)
