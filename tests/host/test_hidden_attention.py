"""Networks that hand the host's options on to no attention: they are heard while a run lasts, and beside other packs' patches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any

import comfy.ldm.modules.attention
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from kindred.nodes.host import KEY, hearing
from kindred.nodes.host.networks import recognise
from studio import capture, inject
from test_transformers import FELT, SAME, WHITE, apart, bank_of, plain, way_of
from tiny_networks import prompt, sample, tiny
from torch import Tensor

HIDDEN = ("PixArtSigma", "HunyuanDiT", "ErnieImage")
SELF = {  # where a block's attention over the picture is
    "PixArtSigma": "blocks.1.attn",
    "HunyuanDiT": "blocks.1.attn1",
    "ErnieImage": "layers.1.self_attention",
}
VALUES = {  # the weights that make values
    "PixArtSigma": "qkv.weight",
    "HunyuanDiT": "Wqkv.weight",
    "ErnieImage": "to_v.weight",
}
FIRST = {"PixArtSigma": "self 0", "HunyuanDiT": "self 0", "ErnieImage": "single 0"}


def network(name: str) -> Any:
    return tiny(name).model.diffusion_model


def forward_of(name: str) -> str:
    """The name of a patch on the forward of the second block's attention."""
    return f"diffusion_model.{SELF[name]}.forward"


def attention_of(name: str) -> Any:
    return network(name).get_submodule(SELF[name])


def own_forward(name: str) -> Any:
    """The host's forward of that attention, whatever a MODEL left there."""
    attention = attention_of(name)
    return MethodType(type(attention).forward, attention)


def patched(name: str) -> list[str]:
    """The modules whose forward is not their class's."""
    return [
        where
        for where, module in network(name).named_modules()
        if getattr(module.forward, "__func__", None) is not type(module).forward
    ]


def own_attention(attention: Any, factor: float) -> Any:
    """Another pack's forward of PixArt's self-attention, which calls the host's attention by its name."""

    def forward(
        x: Tensor, mask: Any = None, HW: Any = None, block_id: Any = None, *, share: float = factor
    ) -> Tensor:
        q, k, v = attention.qkv(x).chunk(3, -1)
        return share * attention.proj(optimized_attention(q, k, v, attention.num_heads))

    return forward


def around(forward: Any) -> Any:
    """Another pack's forward around the one that was there."""

    def twice(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return twice


def importing(forward: Any) -> Any:
    """Another pack's forward that imports the host's attention where it calls it."""

    def own(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        from comfy.ldm.modules.attention import optimized_attention

        return optimized_attention(x, x, x, 2)

    return own


def by_module(forward: Any) -> Any:
    """Another pack's forward that calls the host's attention as its module's."""

    def own(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return comfy.ldm.modules.attention.optimized_attention(x, x, x, 2)

    return own


class Called:
    """Another pack's forward that is no function."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


@cache
def beside(name: str, factor: float) -> Any:
    """A MODEL with another pack's own attention in its second block."""
    model = tiny(name).clone()
    model.add_object_patch(forward_of(name), own_attention(attention_of(name), factor))
    return model


@pytest.mark.parametrize("name", HIDDEN)
def test_a_run_leaves_nothing_on_the_network(name: str) -> None:
    model, asked = inject(tiny(name), bank_of(name)), []

    def look(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(patched(name))
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "look", look)
    sample(model, name)
    assert asked and all(set(recognise(tiny(name)).hidden) <= set(seen) for seen in asked)
    assert not patched(name) and not model.object_patches and not model.object_patches_backup
    assert not any("forward" in vars(m) for m in network(name).modules())
    assert hearing._options.get() is None


@pytest.mark.parametrize("name", HIDDEN)
def test_a_failed_run_leaves_nothing_on_the_network(name: str) -> None:
    model = inject(tiny(name), bank_of(name))

    def fail(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("out of memory")

    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "fail", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(model, name)
    assert not patched(name) and not model.object_patches
    assert torch.equal(sample(tiny(name), name), plain(name))


@pytest.mark.parametrize("name", HIDDEN)
def test_the_hosts_own_code_runs_to_the_bit(name: str) -> None:
    """Every pass of the run is heard, and the pictures are the plain ones: at strength 0 nothing else is computed."""
    heard: list[tuple[str, int]] = []

    def other(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        heard.append(
            tuple(kwargs["transformer_options"][key] for key in ("block_type", "block_index"))
        )
        return func(*args, **kwargs)

    model = inject(tiny(name), bank_of(name), strength=0.0)
    assert torch.equal(sample(model, name), plain(name))
    model = inject(tiny(name), bank_of(name), start_percent=0.98, end_percent=0.99)
    model.model_options["transformer_options"]["optimized_attention_override"] = other
    assert torch.equal(sample(model, name), plain(name))
    calls = [block[:2] for block in recognise(tiny(name)).calls]
    assert heard and heard == calls * (len(heard) // len(calls))


@pytest.mark.parametrize("name", HIDDEN)
def test_a_block_is_read_where_it_is_chosen(name: str) -> None:
    one, every = (
        sample(inject(tiny(name), bank_of(name), blocks=b), name) for b in (FIRST[name], "all")
    )
    assert apart(one, plain(name)) > FELT and apart(one, every) > FELT


@pytest.mark.parametrize("name", HIDDEN)
def test_weights_that_a_node_patches_are_the_ones_that_are_read(name: str) -> None:
    """A LoRA on an attention's own weights."""
    weight = attention_of(name).get_parameter(VALUES[name]).detach()
    model = tiny(name).clone()
    model.add_patches({f"diffusion_model.{SELF[name]}.{VALUES[name]}": ("diff", (0.5 * weight,))})
    changed, way = sample(model, name, cfg=1.0), way_of(name, model, cfg=1.0)[1]
    assert apart(changed, sample(tiny(name), name, cfg=1.0)) > FELT
    bank = capture(model, None, prompt(name), inversion=way, mask=WHITE)[0]
    assert apart(sample(inject(model, bank, 3.0), name, cfg=1.0), changed) < SAME
    assert torch.equal(sample(tiny(name), name), plain(name))


# beside other packs -------------------------------------------------------------------------------


@contextmanager
def ran(model: Any, name: str) -> Iterator[Tensor]:
    """A picture of a MODEL that other nodes patched, whose patches are there afterwards too."""
    before, patches = sample(model, name), dict(model.object_patches)
    yield before
    assert torch.equal(sample(model, name), before) and model.object_patches == patches


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_another_packs_attention_is_run_and_heard(factor: float) -> None:
    name = "PixArtSigma"
    model = beside(name, factor)
    with ran(model, name) as alone:
        assert (apart(alone, plain(name)) < SAME) is (factor == 1.0)
        chosen = inject(model, bank_of(name), blocks="self 1")
        assert apart(sample(chosen, name), alone) > FELT
        held = chosen.object_patches[forward_of(name)]
        assert held is model.object_patches[forward_of(name)]
    assert torch.equal(sample(tiny(name), name), plain(name)) and not patched(name)


def test_another_packs_attention_is_read_as_it_is() -> None:
    """The picture that reads itself stays as that pack draws it."""
    name = "PixArtSigma"
    model = beside(name, 0.5)
    alone, way = way_of(name, model, cfg=1.0)
    bank = capture(model, None, prompt(name), inversion=way, mask=WHITE)[0]
    assert apart(sample(inject(model, bank, 3.0), name, cfg=1.0), alone) < SAME


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("kind", [around, Called, importing, by_module])
def test_a_forward_that_cannot_be_heard_is_refused(name: str, kind: Any) -> None:
    """Before the work, wherever it is asked."""
    model = tiny(name).clone()
    model.add_object_patch(forward_of(name), kind(own_forward(name)))
    words = f"an attention of its own at {SELF[name]}, .*Remove the node that patches it."
    with pytest.raises(ValueError, match=words):
        inject(model, bank_of(name))
    with pytest.raises(ValueError, match=words):
        capture(model, {"samples": bank_of(name).trajectory.latents[0]}, prompt(name), mask=WHITE)
    late = inject(tiny(name), bank_of(name))
    late.add_object_patch(forward_of(name), kind(own_forward(name)))
    with pytest.raises(ValueError, match=words):
        sample(late, name)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_another_model_left_on_the_network_is_not_heard(name: str) -> None:
    """The host takes patches away when the next MODEL is loaded, not when a run ends."""
    other = tiny(name).clone()
    other.add_object_patch(forward_of(name), around(own_forward(name)))
    sample(other, name)
    assert patched(name)
    ours = sample(inject(tiny(name), bank_of(name)), name)
    assert apart(ours, plain(name)) > FELT
    assert torch.equal(sample(other, name), plain(name))


def test_a_class_that_another_pack_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(attention_of("PixArtSigma"))
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: x)
    with pytest.raises(ValueError, match="an attention of its own at blocks.0.attn"):
        inject(tiny("PixArtSigma"), bank_of("PixArtSigma"))


def test_a_skipped_block_is_no_other_blocks() -> None:
    """HunyuanDiT's blocks may be replaced: what is read in the next one is that block's own."""

    def skip(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return {"img": args["img"]}

    name = "HunyuanDiT"
    model = tiny(name).clone()
    model.set_model_patch_replace(skip, "dit", "double_block", 1)
    alone, way = way_of(name, model, cfg=1.0)
    bank = capture(model, None, prompt(name), inversion=way, mask=WHITE, blocks="self 2")[0]
    read = sample(inject(model, bank, 3.0, blocks="self 2"), name, cfg=1.0)
    assert apart(alone, sample(tiny(name), name, cfg=1.0)) > FELT and apart(read, alone) < SAME


def test_positions_that_a_node_scales_are_the_references_too() -> None:
    """ScaleROPE on Ernie, whose kept keys are placed by us."""
    name = "ErnieImage"
    model = tiny(name).clone()
    model.set_model_rope_options(2.0, 3.0, 0.5, 1.0, 1.0, 5.0)
    alone, way = way_of(name, model, cfg=1.0)
    bank = capture(model, None, prompt(name), inversion=way, mask=WHITE)[0]
    assert apart(alone, sample(tiny(name), name, cfg=1.0)) > FELT
    assert apart(sample(inject(model, bank, 3.0), name, cfg=1.0), alone) < SAME


def test_a_patch_of_ours_is_known_as_the_hosts_own() -> None:
    """A network asked about while a run lasts."""
    name, found = "ErnieImage", []

    def ask(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        found.append(recognise(model))
        return executor(*args, **kwargs)

    model = inject(tiny(name), bank_of(name))
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "ask", ask)
    sample(model, name)
    assert found and not any(backbone.unheard for backbone in found)
    assert KEY not in vars(attention_of(name))
