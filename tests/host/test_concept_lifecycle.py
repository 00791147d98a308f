"""The life of a concept: made once per node, brought to the device once per run, gone with it; its neighbours and its price."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from kindred.models.attention.parts import Merge
from kindred.models.attention.weights import WeightMode
from kindred.models.concept.inject import ActiveConcept
from kindred.models.network.call import Half, Halves, Part, Role
from kindred.models.run import Run
from kindred.nodes.concept import ConceptInjection
from kindred.nodes.host import KEY, attention_sites, install
from networks import build_model, random_model
from studio import (
    SIZE,
    STEPS,
    bank_of,
    capture,
    concept,
    differs,
    encoder_of,
    inject,
    negative,
    photo,
    plain,
    prompt,
    sample,
    subject,
)
from torch.utils.flop_counter import FlopCounterMode

TIGHT, FELT = 1e-4, 1e-2
MODEL = random_model("tiny")
BLOCKS = tuple(attention_sites(MODEL.model.diffusion_model))
LAW = pytest.mark.parametrize


@pytest.fixture
def kept(monkeypatch):
    """Weak references to what every run of a concept brings to the device."""
    seen: list[weakref.ref] = []
    start = ConceptInjection.start_run

    def start_run(self, run):
        active = start(self, run)
        seen.extend(
            weakref.ref(t)
            for tokens in active.tokens.values()
            for t in (tokens, tokens.k, tokens.v)
        )
        seen.append(weakref.ref(active))
        return active

    monkeypatch.setattr(ConceptInjection, "start_run", start_run)
    return seen


def alive(seen) -> int:
    gc.collect()
    return sum(r() is not None for r in seen)


def low():
    """The model in bfloat16: what a run brings to the device is then a copy of its own."""
    m = MODEL.clone()
    m.set_model_compute_dtype(torch.bfloat16)
    return m


class Stop(Exception):
    """Another node's failure in the middle of a run."""


def failing(model, action, at: int = 2):
    calls, m = [], model.clone()

    def patch(n, context, value, options):
        if options["block"] == ("middle", 0):
            calls.append(1)
            if len(calls) == at:
                action()
        return n, context, value

    m.set_model_attn2_patch(patch)
    return m


def stop() -> None:
    raise Stop


# nothing is left -----------------------------------------------------------------------------------------------------------


def test_what_a_run_brought_to_the_device_goes_with_it(kept):
    masked = concept(
        concept(low(), 2.0, halves="both", target_mask=torch.ones(1, 64, 64)), merge="add"
    )
    sample(masked)
    assert len(kept) == 3 * len(BLOCKS) * 3 + 2 and alive(kept) == 0
    sample(masked)
    assert alive(kept) == 0


def test_also_after_an_error(kept):
    with pytest.raises(Stop):
        sample(failing(concept(low()), stop))
    assert kept and alive(kept) == 0
    assert torch.equal(sample(MODEL), plain())


def test_also_after_an_interrupt(kept):
    def hook(*args, **kwargs):
        comfy.model_management.throw_exception_if_processing_interrupted()

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(
                failing(concept(low()), comfy.model_management.interrupt_current_processing, at=1)
            )
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
        comfy.model_management.interrupt_current_processing(False)
    assert kept and alive(kept) == 0
    assert torch.equal(sample(MODEL), plain())


def test_whoever_keeps_the_options_keeps_no_tokens(kept):
    options_kept, model = [], concept(low())

    def patch(n, context, value, options):
        options_kept.append(options)
        return n, context, value

    model.set_model_attn1_patch(patch)
    sample(model)
    assert (
        options_kept
        and alive(kept) == 0
        and not any(o[KEY].active or o[KEY].turn for o in options_kept)
    )


def test_an_encoder_that_nobody_wires_any_more_is_let_go(host):
    from kindred.nodes.host import ManagedEncoder
    from studio import fresh_encoder

    managed = ManagedEncoder.of(fresh_encoder(), "gone")
    gone = weakref.ref(managed.encoder)
    model = concept(MODEL, encoder=managed)
    del managed
    comfy.model_management.unload_all_models()
    gc.collect()
    assert gone() is None  # the injection holds its keys and values alone
    assert torch.equal(sample(model), sample(concept(MODEL)))


def test_the_global_random_state_is_untouched():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    concept(MODEL, 2.0, subject(2), halves="both")
    assert torch.equal(torch.get_rng_state(), before)
    how = {"sampler": "euler_ancestral"}
    sample(MODEL, **how)
    after = torch.get_rng_state()
    sample(concept(MODEL, 2.0), **how)  # the sampler's own draws and no others
    assert torch.equal(torch.get_rng_state(), after)


def test_a_model_in_bfloat16():
    none, out = sample(low()), sample(concept(low(), 2.0))
    assert torch.equal(sample(concept(low(), 0.0)), none) and differs(out, none) > FELT
    assert differs(out, sample(concept(MODEL, 2.0))) < 0.2


# made once -----------------------------------------------------------------------------------------------------------------


@contextmanager
def calls_of(module):
    """How often each submodule is run inside."""
    ran: dict[str, int] = {}

    def count(name):
        return lambda *_: ran.update({name: ran.get(name, 0) + 1})

    hooks = [m.register_forward_hook(count(name)) for name, m in module.named_modules()]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


@LAW(
    ("pictures", "halves", "runs"),
    [(1, "cond only", 1), (3, "cond only", 3), (1, "shared", 1), (2, "both", 3)],
)
def test_the_encoder_runs_once_per_picture_when_the_node_does_and_never_again(
    pictures, halves, runs
):
    with calls_of(encoder_of().encoder) as ran:
        model = concept(MODEL, image=subject(pictures), halves=halves)
    assert ran["tower"] == ran["mlp"] == ran["to_k.middle_0_0"] == ran["to_v.output_0_0"] == runs
    with calls_of(encoder_of().encoder) as ran:
        sample(model, batch=2)
        sample(model, sampler="heun")
    assert not ran


def test_nothing_is_encoded_where_nothing_will_be_read():
    with calls_of(encoder_of().encoder) as ran:
        concept(MODEL, 0.0)
        concept(MODEL, start_percent=1.0)
        concept(MODEL, target_mask=torch.zeros(1, 8, 8))
    assert not ran


def test_tokens_come_to_the_device_once_per_run(monkeypatch):
    """Every call of every step reads the very tensors of the run's beginning."""
    read: dict[tuple, set[int]] = {}
    held = []
    ask = ActiveConcept.references

    def references(self, call, site, q, k, v):
        found = ask(self, call, site, q, k, v)
        for role, tokens in found[0].by_role.items() if found else ():
            held.append(tokens)
            read.setdefault((role, call.block), set()).add(tokens.k.data_ptr())
        return found

    monkeypatch.setattr(ActiveConcept, "references", references)
    sample(concept(low(), halves="both"), sampler="heun")
    assert len(read) == 2 * len(BLOCKS) and all(len(places) == 1 for places in read.values())
    assert len(held) > 2 * len(BLOCKS) * STEPS


# neighbours that replace cross-attention -------------------------------------------------------------------------------------


def attention(q, k, v, options, hands_on):
    """As packs call the host's attention in a replacement: with its options, or without."""
    more = (
        {"attn_precision": options["attn_precision"], "transformer_options": options}
        if hands_on
        else {}
    )
    return optimized_attention(q, k, v, options["n_heads"], **more)


def same(hands_on):
    """A replacement that is the plain attention."""
    return lambda q, k, v, options: attention(q, k, v, options, hands_on)


def ip_adapter(hands_on):
    """A replacement in the manner of decoupled cross-attention: the text's, and 0.7 times its own picture's."""

    def f(q, k, v, options):
        own = (
            torch.randn(1, 4, q.shape[-1], generator=torch.Generator().manual_seed(n))
            .expand(len(q), -1, -1)
            .to(q)
            for n in (1, 2)
        )
        return attention(q, k, v, options, hands_on) + 0.7 * attention(q, *own, options, hands_on)

    return f


def replaced(model, f, depth=True):
    m = model.clone()
    for block in BLOCKS:
        m.set_model_attn2_replace(f, *block[: 3 if depth else 2])
    return m


@LAW("hands_on", [False, True])
@LAW("depth", [False, True])
@LAW("merge", ["concat", "add"])
def test_beside_a_replacement_that_is_plain_ours_is_ours(hands_on, depth, merge):
    ours = sample(concept(MODEL, 2.0, merge=merge, halves="both"))
    for model in (
        concept(replaced(MODEL, same(hands_on), depth), 2.0, merge=merge, halves="both"),
        replaced(concept(MODEL, 2.0, merge=merge, halves="both"), same(hands_on), depth),
    ):
        assert differs(sample(model), ours) < 1e-5


@LAW("hands_on", [False, True])
def test_beside_another_image_prompt_both_are_heard_once(hands_on):
    """Whether it hands its options on or not, and in either order: its part and ours, each once."""

    def both(q, k, v, options):  # written by hand: ours for text and concept, theirs beside it
        k_c, v_c = (
            t.expand(len(q) // 2, -1, -1)
            for t in keys_values[(*options["block"], options["block_index"])]
        )
        i, out = (
            options["cond_or_uncond"].index(0),
            list(ip_adapter(False)(q, k, v, options).chunk(2)),
        )
        q, k, v = (t.chunk(2)[i] for t in (q, k, v))
        bias = torch.cat((torch.zeros(k.shape[1]), torch.full((k_c.shape[1],), 2.0).log()))[None]
        joint = optimized_attention(
            q,
            torch.cat((k, k_c), 1),
            torch.cat((v, v_c), 1),
            options["n_heads"],
            mask=bias.expand(q.shape[1], -1),
        )
        out[i] = out[i] + joint - optimized_attention(q, k, v, options["n_heads"])
        return torch.cat(out)

    with torch.inference_mode():
        keys_values = encoder_of().encode(subject())
    meant = sample(replaced(MODEL, both))
    theirs = replaced(MODEL, ip_adapter(hands_on))
    outs = [
        sample(m)
        for m in (concept(theirs, 2.0), replaced(concept(MODEL, 2.0), ip_adapter(hands_on)))
    ]
    assert torch.equal(*outs) and differs(outs[0], meant) < 1e-5
    assert min(differs(outs[0], sample(m)) for m in (theirs, concept(MODEL, 2.0), MODEL)) > 1e-3


@LAW("hands_on", [False, True])
def test_a_replacement_beside_which_nothing_is_read_is_its_own_bit_for_bit(hands_on):
    theirs = replaced(MODEL, ip_adapter(hands_on))
    none = sample(theirs)
    for silent in ({"weight": 0.0}, {"start_percent": 0.4, "end_percent": 0.6}):
        assert torch.equal(sample(concept(theirs, **silent)), none)
    assert torch.equal(sample(inject(theirs, bank_with(theirs), 0.0)), none)


def bank_with(model):
    return capture(model, photo(), negative=negative())[0]


def test_self_injection_and_both_beside_a_replacement():
    theirs = replaced(MODEL, same(False))
    bank = bank_of()
    assert differs(sample(inject(theirs, bank, 2.0)), sample(inject(MODEL, bank, 2.0))) < 1e-5
    full = sample(concept(inject(MODEL, bank, 2.0), 2.0))
    assert differs(sample(concept(inject(theirs, bank, 2.0), 2.0)), full) < 1e-5
    live = {"scheduler": "karras"}  # the Ref-UNet's own calls run through the replacement too
    assert (
        differs(
            sample(concept(inject(theirs, bank, 2.0), 2.0), **live),
            sample(concept(inject(MODEL, bank, 2.0), 2.0), **live),
        )
        < TIGHT
    )


def test_a_capture_finds_the_subject_beside_a_replacement():
    """A replacement that calls the kernel without the host's options hides its keys from the override, not from us."""
    for hands_on in (False, True):
        bank, mask = capture(replaced(MODEL, same(hands_on)), negative=negative())
        assert torch.equal(bank.maps, bank_of().maps) and torch.equal(
            mask, capture(MODEL, negative=negative())[1]
        )
        assert all(differs(bank.features[h], bank_of().features[h]) < 1e-5 for h in Half)


def test_a_second_install_wraps_nothing_twice():
    """Live reference passes install their own run over the sampler's options, which stay as they are."""
    f = same(True)
    given = {"transformer_options": {"patches_replace": {"attn2": {("middle", 0): f}}}}
    once = install(given, Run())
    wrapped = once["transformer_options"]["patches_replace"]["attn2"]["middle", 0]
    assert (
        wrapped.f is f
        and given["transformer_options"]["patches_replace"]["attn2"]["middle", 0] is f
    )
    assert (
        install(once, Run())["transformer_options"]["patches_replace"]["attn2"]["middle", 0]
        is wrapped
    )


def test_hypertile_beside_a_target_mask():
    """HyperTile cuts self-attention's queries alone: cross-attention sees whole pictures, so a target mask is fine."""
    from comfy_extras.nodes_hypertile import HyperTile

    tiled = HyperTile.execute(MODEL, 32, 1, 0, False)[0]
    how = {"size": (16, 16)}
    ones = sample(concept(tiled, 2.0, target_mask=torch.ones(1, 64, 64)), **how)
    assert (
        torch.equal(ones, sample(concept(tiled, 2.0), **how))
        and differs(ones, sample(tiled, **how)) > FELT
    )


# the price -----------------------------------------------------------------------------------------------------------------


def flops(
    model, family: str, latent: int, tokens: int, halves: Halves = Halves.COND
) -> tuple[int, int, int]:
    """FLOPs of one cond row, plain and with so many concept tokens, and how many products made keys or values in the second."""
    unet = model.model.diffusion_model.to("meta")
    sites = attention_sites(unet)
    keys_values = {
        b: (torch.empty(1, tokens, s.module.attn2.to_k.out_features, device="meta"),) * 2
        for b, s in sites.items()
    }
    config = ConceptInjection(
        {Half.COND: keys_values}, 1, 1.0, WeightMode.LOGIT_BIAS, Merge.CONCAT, 0.0, 1.0, halves
    )

    class Meta(Run):
        device_and_dtype = torch.device("meta"), torch.float32

        def at(self, *percents: float) -> tuple[float, ...]:
            return tuple(2 * (1 - p) for p in percents)

    x, width = (
        torch.empty(1, 4, latent, latent, device="meta"),
        sites["middle", 0, 0].module.attn2.to_k.in_features,
    )
    given = {"context": torch.empty(1, 77, width, device="meta")}
    if family == "sdxl":
        given["y"] = torch.empty(1, 2816, device="meta")
    found, projected = [], []
    hooks = [
        getattr(s.module.attn2, name).register_forward_hook(
            lambda module, args, out: projected.append(args[0].shape[1])
        )
        for s in sites.values()
        for name in ("to_k", "to_v")
    ]
    for injections in ((), (config,)):
        run = Meta(sites=sites, latent=(latent, latent))
        run.active = [i.start_run(run) for i in injections]
        for active in run.active:
            active.begin_step(1.0)
        run.parts["a part"] = Part(Role.COND, None, 77)
        options = install({}, run)["transformer_options"] | {
            "uuids": ["a part"],
            "cond_or_uncond": [0],
        }
        projected.clear()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            unet(x, torch.empty(1, device="meta"), transformer_options=options, **given)
        found.append(counter.get_total_flops())
    for hook in hooks:
        hook.remove()
    assert set(projected) == {77}  # the text alone is projected in a step
    return *found, len(projected)


@LAW(("family", "latent", "layers", "bound"), [("sd15", 64, 16, 1.02), ("sdxl", 128, 70, 1.02)])
def test_257_concept_tokens_cost_a_fiftieth_at_most(family, latent, layers, bound):
    none, more, projections = flops(build_model(family), family, latent, 257)
    assert projections == 2 * layers and 1.001 < more / none <= bound, (
        f"{none / 1e9:.1f} G, {more / none:.5f}"
    )


@pytest.mark.slow
@LAW("merge", ["concat", "add"])
def test_at_the_real_size_of_sd15(merge):
    """Random weights and a small tower: two steps, plain where it should be, different where not."""
    from kindred.nodes.host import ManagedEncoder
    from studio import fresh_encoder

    model = build_model("sd15")
    managed = ManagedEncoder.of(fresh_encoder("sd15", merge=merge, model=model), "sd15")
    how = {
        "size": (16, 24),
        "steps": 2,
        "positive": prompt(5, "sd15"),
        "uncond": negative("sd15"),
        "start_step": 0,
        "last_step": 1,
    }
    none = sample(model, **how)
    assert torch.equal(sample(concept(model, 0.0, encoder=managed), **how), none)
    out = sample(concept(model, 2.0, encoder=managed), **how)
    assert differs(out, none) > 1e-3
    assert torch.equal(
        sample(concept(model, 2.0, encoder=managed, target_mask=torch.ones(1, *SIZE)), **how), out
    )
    comfy.model_management.unload_all_models()
