"""What a reference leaves as it is, on every transformer of the host: plain pictures, the photo's pass, the prompt's share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP
from kindred.models.network.backbone import CROSS
from kindred.models.subject.words import SubjectTokens
from kindred.nodes.host import KEY, joint
from kindred.nodes.host.sites import require_backbone
from studio import capture, inject
from test_transformers import FAMILIES, FELT, HALF, SAME, apart, bank_of, plain, way_of
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor, nn

LAW = pytest.mark.parametrize
every_family = LAW("name", FAMILIES)
SILENT = {
    "strength 0": {"strength": 0.0},
    "weight 0": {"weight": 0.0},
    "a black mask": {"target_mask": torch.zeros(1, 8, 8)},
    "outside of its steps": {"start_percent": 0.98, "end_percent": 0.99},
}
WAYS = {
    "cfg 1": {"cfg": 1.0},
    "three pictures": {"pictures": 3},
    "heun": {"sampler": "heun"},
    "euler ancestral": {"sampler": "euler_ancestral"},
    "SDE": {"sampler": "dpmpp_2m_sde"},
    "odd size, longer prompt": {},
}
# what stands in the options of a pass that is watched
OURS = ("optimized_attention_override", "patches", "patches_replace", "wrappers", KEY)


def way_of_sampling(name: str, how: str) -> dict[str, Any]:
    """What `sample` is given for it; sizes are odd where the host cuts them again."""
    if how != "odd size, longer prompt":
        return dict(WAYS[how])
    family = READ[name]
    less = int(family.odd and family.patch > 1)
    y, x = (side * family.patch - less for side in family.grid)
    positive = prompt(name, words=family.words + max(family.step, 3))
    return {"positive": positive, "start": torch.zeros_like(latent(name, size=(y, x)))}


@every_family
@LAW("silent", SILENT)
def test_where_nothing_is_read_no_bit_changes(name: str, silent: str) -> None:
    model = inject(tiny(name), bank_of(name), **SILENT[silent])
    assert torch.equal(sample(model, name), plain(name))


@every_family
@LAW("how", WAYS)
def test_outside_of_its_steps_no_bit_changes_however_one_samples(name: str, how: str) -> None:
    """I1, where all of it is installed: strength 0 and a black mask install nothing."""
    model = inject(tiny(name), bank_of(name), **SILENT["outside of its steps"])
    given = way_of_sampling(name, how)
    assert torch.equal(sample(model, name, **given), sample(tiny(name), name, **given))


@every_family
@LAW("how", ["euler ancestral", "SDE", "odd size, longer prompt"])
def test_a_picture_that_reads_itself_stays_however_one_samples(name: str, how: str) -> None:
    """I48 along its own way; samplers that ask twice at one level have no such way."""
    given = way_of_sampling(name, how) | {"cfg": 1.0}
    alone, path = way_of(name, **given)
    positive = given.get("positive") or prompt(name)
    bank = capture(tiny(name), None, positive, inversion=path, mask=torch.ones(1, 32, 32))[0]
    assert apart(sample(inject(tiny(name), bank, 3.0), name, **given), alone) < SAME


def shifted(name: str, shift: float) -> Any:
    """The host's own node for it."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3

    if name == "Flux":
        return ModelSamplingFlux().patch(tiny(name), shift, shift, 1024, 1024)[0]
    return ModelSamplingSD3().patch(tiny(name), shift)[0]


@LAW("name", ["Flux", "SD3.5", "ZImage", "Anima"])
@LAW("shift", [None, 0.5, 6.0])
def test_a_window_is_noise_levels_whatever_the_steps(
    name: str, shift: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I61: at every level between those of its percents it is read, at no other; by any number of steps, schedule and shift."""
    read: dict[float, bool] = {}
    references = joint._BlockCall.references

    def noted(call: Any) -> list:
        out = references(call)
        if call.run.ways is not None:  # no pass of the reference's own
            sigma = float(call.options["sigmas"][0])
            read[sigma] = read.get(sigma, False) or bool(out)
        return out

    monkeypatch.setattr(joint._BlockCall, "references", noted)
    own = tiny(name) if shift is None else shifted(name, shift)
    model = inject(own, bank_of(name), start_percent=0.25, end_percent=0.7)
    sampling = model.get_model_object("model_sampling")
    first, last = (float(sampling.percent_to_sigma(p)) for p in (0.25, 0.7))
    for steps, scheduler in ((3, "simple"), (7, "normal"), (8, "beta"), (12, "sgm_uniform")):
        read.clear()
        sample(model, name, steps=steps, scheduler=scheduler, cfg=1.0)
        assert len(read) >= steps
        assert all(got is (last <= sigma <= first) for sigma, got in read.items())


@contextmanager
def outputs_of(network: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """What its linear layers answer, in the order in which they are asked; HiDream-O1 begins without a text that it kept."""
    answers: list[tuple[nn.Module, Tensor]] = []
    getattr(network, "clear_kv_cache", int)()

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        answers.append((module, out.clone()))

    hooks = [m.register_forward_hook(note) for m in network.modules() if isinstance(m, nn.Linear)]
    try:
        yield answers
    finally:
        for hook in hooks:
            hook.remove()


def copied(value: Any) -> Any:
    """An argument as it is now, whatever a network does to it."""
    return value.clone() if isinstance(value, Tensor) else value


@every_family
def test_a_pass_that_is_watched_is_the_plain_one(name: str) -> None:
    """I56: keys, values and words are taken of it; it may end early, and every layer up to there answers the same bits."""
    network, passes = tiny(name).model.diffusion_model, []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        own = {key: copied(value) for key, value in kwargs.items()}
        options = own["transformer_options"].items()
        own["transformer_options"] = {key: value for key, value in options if key not in OURS}
        passes.append((tuple(map(copied, args)), own, len(answers)))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    photo = {"samples": latent(name, seed=21)}
    words = prompt(name, seed=4, kindred_subject=SubjectTokens(("cat",), ((3,),)))
    how = {"steps": 3, "scheduler": "simple", "keeps": "keys and values"}
    try:
        with outputs_of(network) as answers:
            assert capture(tiny(name), photo, words, **how)[0].bytes
    finally:
        hook.remove()
    ends = [start for *_, start in passes[1:]] + [len(answers)]
    with torch.inference_mode(), outputs_of(network) as own:
        for (args, kwargs, start), end in zip(passes, ends):
            own.clear()
            network(*args, **kwargs)
            assert len(own) // 2 < end - start
            for layer, out in answers[start:end]:
                assert any(layer is other and torch.equal(out, again) for other, again in own)
    assert len(passes) >= 3


@every_family
def test_every_rows_text_keeps_its_share(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I47: values of 1 at the text and of 0 elsewhere: each row's answer is the text's share, whatever is read beside it."""
    bare = joint._BlockCall

    def planted(*parts: Any) -> Any:
        call = bare(*parts)
        if call.block[0] == CROSS:
            return call
        shares = torch.ones_like(call.v)
        shares[:, call.picture(call.k)] = 0.0
        return replace(call, v=shares)

    backbone = require_backbone(tiny(name), "test")
    monkeypatch.setattr(joint, "_BlockCall", planted)
    other = {"samples": latent(name, seed=33)}
    how = {"steps": 3, "scheduler": "simple", "mask": HALF}
    bank = capture(tiny(name), other, prompt(name, seed=7), **how)[0]
    unread = sample(inject(tiny(name), bank_of(name), 1e-9), name, cfg=1.0)
    for reads in ({}, {"positions": "none"}) if backbone.turn else ({},):
        for one, weight in ((bank_of(name), 3.0), (bank, 0.5)):
            kept = inject(tiny(name), one, weight, **reads)
            assert apart(sample(kept, name, cfg=1.0), unread) < SAME
    dimmed = inject(tiny(name), bank, 3.0, text_share="plain")
    assert (apart(sample(dimmed, name, cfg=1.0), unread) > FELT) is backbone.joint


@every_family
@LAW("halves", ["both", "cond only"])
def test_halves_in_two_calls_are_halves_in_one(
    name: str, halves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nearly as the plain network is itself in two calls: guidance multiplies the rounding of both."""
    bank = capture(
        tiny(name), {"samples": latent(name, seed=21)}, prompt(name, seed=4), steps=3, scheduler="simple",
        mask=HALF, negative=prompt(name, seed=3),
    )[0]  # fmt: skip
    model = inject(tiny(name), bank, halves=halves)
    together, alone = sample(model, name), plain(name)
    monkeypatch.setattr(tiny(name).model, "memory_required", lambda *args, **kwargs: 1e30)
    split = sample(model, name)
    assert apart(split, together) < max(SAME, 2 * apart(sample(tiny(name), name), alone))
    assert apart(together, alone) > FELT


@torch.inference_mode()
def drawn(model: Any, name: str, who: Sequence[int]) -> Tensor:
    """The pictures of an endless batch with these numbers, without guidance."""
    import nodes

    start = {"samples": torch.zeros_like(latent(name, pictures=len(who))), "batch_index": list(who)}
    how = 1, 3, 1.0, "euler", "simple", prompt(name), prompt(name, seed=3)
    return nodes.common_ksampler(model, *how, start)[0]["samples"]


@every_family
def test_each_picture_of_a_batch_is_the_one_drawn_alone(name: str) -> None:
    """I57."""
    model = inject(tiny(name), bank_of(name))
    batch = drawn(model, name, (0, 1, 2))
    alone = torch.cat([drawn(model, name, (i,)) for i in range(3)])
    assert apart(batch, alone) < SAME and apart(batch[1:], alone[:2]) > FELT


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The second of every row of blocks: one in the middle of a pass is among them."""
    return [m for n, m in network.named_modules() if re.search(r"(blocks|layers)\.1$", n)]


@every_family
@LAW("fails", ["between calls", "inside", "interrupt"])
def test_a_run_that_fails_or_is_interrupted_leaves_nothing(name: str, fails: str) -> None:
    model, count = inject(tiny(name), bank_of(name)), iter(range(1, 100))
    network = tiny(name).model.diffusion_model
    error = InterruptProcessingException() if fails == "interrupt" else RuntimeError("no memory")

    def fail(*args: Any, **kwargs: Any) -> None:
        if next(count) == 3:  # a live reference's pass is one of them
            raise error

    def between(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        fail()
        return executor(*args, **kwargs)

    failing, hooks = model.clone(), []
    if fails == "inside":
        hooks = [block.register_forward_pre_hook(fail) for block in blocks_of(network)]
    else:
        failing.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "fails", between)
    try:
        with pytest.raises(type(error)):
            sample(failing, name)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(sample(tiny(name), name), plain(name))
    fresh = sample(inject(tiny(name), bank_of(name)), name)
    assert torch.equal(sample(model, name), fresh) and apart(fresh, plain(name)) > FELT


@every_family
def test_a_capture_that_fails_leaves_nothing(name: str) -> None:
    """Inside of the network, in the pass that keeps; the next capture and the next pictures are as ever."""
    count, network = iter(range(1, 1000)), tiny(name).model.diffusion_model
    how = {"steps": 3, "scheduler": "simple", "mask": HALF, "keeps": "keys and values"}
    photo, positive = {"samples": latent(name, seed=21)}, prompt(name, seed=4)

    def fail(*args: Any, **kwargs: Any) -> None:
        if next(count) == 7:
            raise RuntimeError("no memory")

    hooks = [block.register_forward_pre_hook(fail) for block in blocks_of(network)]
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            capture(tiny(name), photo, positive, **how)
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(sample(tiny(name), name), plain(name))
    again = capture(tiny(name), photo, positive, **how)[0]
    kept = bank_of(name, keeps="keys and values")
    for half, rows in kept.features.items():
        assert all(map(torch.equal, again.features[half], rows))
