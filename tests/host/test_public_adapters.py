"""Public adapters on small FLUX.1 and SD3.5 networks, against the published formulas put in by the host's own hooks."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_patcher
import folder_paths
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.siglip import PoolingHead
from kindred.nodes import host
from kindred.nodes.concept import ConceptEncoderLoad, CrossAttnDetailInject
from safetensors.torch import save_file
from small_adapters import drawn, published
from test_transformers import FELT, SAME, apart
from tiny_networks import FLUX, Family, build, pooled, sample, tiny
from torch import Tensor, nn

HEADS = 2


class Vision:
    """A CLIP_VISION of any kind whose tokens are random numbers times the picture's mean; of zero pixels a constant."""

    image_size, load_device = 8, torch.device("cpu")

    def __init__(self, layout: str, seen: int) -> None:
        self.model_type = "clip_vision_model" if layout == "xlabs" else "siglip_vision_model"
        self.config = {
            "hidden_size": 20 if layout == "xlabs" else seen,
            "projection_dim": seen,
            "num_attention_heads": 2,
        }
        self.seen = seen
        cpu = torch.device("cpu")
        self.patcher = comfy.model_patcher.ModelPatcher(nn.Identity(), cpu, cpu)

    def encode_image(self, image: Tensor, crop: bool = True) -> dict[str, Tensor]:
        outputs = self.model(image, -2)
        names = ("last_hidden_state", "penultimate_hidden_states", "image_embeds")
        return dict(zip(names, outputs))

    def model(
        self, pixel_values: Tensor, intermediate_output: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        loud = pixel_values.mean() + 0.5
        shapes = ((1, 7, self.seen), (1, 7, self.seen), (1, self.seen))
        return tuple(loud * drawn(*shape, seed=70 + i) for i, shape in enumerate(shapes))


@cache
def flux() -> Any:
    """As FLUX.1: twice as many single blocks as double ones."""
    return build(Family("Flux", FLUX | {"depth_single_blocks": 4}, extras=pooled))


@cache
def head_of(seen: int) -> PoolingHead:
    torch.manual_seed(4)
    head = PoolingHead(seen, 2, 2 * seen)
    nn.init.normal_(head.probe)
    return head.eval().requires_grad_(False)


def managed(layout: str, folder: Path) -> host.ManagedEncoder:
    tensors, sizes = published(layout)
    save_file(tensors, folder / "adapter.safetensors")
    encoder = load_concept_encoder(folder / "adapter.safetensors")
    head = head_of(sizes["seen"]) if layout == "shakker" else None
    return host.ManagedEncoder.of(
        encoder, "adapter.safetensors", Vision(layout, sizes["seen"]), head
    )


def photo(seed: int = 3) -> Tensor:
    return torch.rand(1, 30, 30, 3, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def concept(model: Any, encoder: host.ManagedEncoder, seed: int = 3, **more: Any) -> Any:
    told = {"start_percent": 0.0} | more
    return CrossAttnDetailInject.execute(model, encoder, photo(seed), **told).result[0]


def apart_in_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def shakker_by_hand(encoder: host.ManagedEncoder, weight: float) -> Any:
    """The published formula through the host's hooks before positions are put on and behind the attention."""
    model, asked = flux().clone(), {}
    made = encoder.encoder.keys_values(encoder.encoder.features(encoder.look(photo())))

    def before(
        q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any, extra_options: Any
    ) -> dict:
        asked["q"] = q
        return {}

    def behind(attn: Tensor, extra: dict[str, Any]) -> Tensor:
        start, stop = extra["img_slice"]
        k, v = (
            apart_in_heads(t, HEADS) for t in made[extra["block_type"], extra["block_index"], 0]
        )
        k, v = (t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() for t in (k, v))
        given = F.scaled_dot_product_attention(asked["q"][:, :, start:stop], k, v)
        attn = attn.clone()
        attn[:, start:stop] += weight * given.transpose(1, 2).flatten(2)
        return attn

    model.set_model_attn1_patch(before)
    model.set_model_patch(behind, "attn1_output_patch")
    return model


def xlabs_by_hand(encoder: host.ManagedEncoder, weight: float) -> Any:
    """What is read is added to the picture's stream behind each double block."""
    model, asked = flux().clone(), {}
    made = encoder.encoder.keys_values(encoder.encoder.features(encoder.look(photo())))

    def before(
        q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any, extra_options: Any
    ) -> dict:
        asked["q"], asked["from"] = q, extra_options["img_slice"][0]
        return {}

    def block(index: int) -> Any:
        def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            out = extra["original_block"](args)
            k, v = (apart_in_heads(t, HEADS) for t in made["double", index, 0])
            given = F.scaled_dot_product_attention(asked["q"][:, :, asked["from"] :], k, v)
            return out | {"img": out["img"] + weight * given.transpose(1, 2).flatten(2)}

        return replaced

    model.set_model_attn1_patch(before)
    for index in range(2):
        model.set_model_patch_replace(block(index), "dit", "double_block", index)
    return model


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """[b h n d], each head over its root mean square, times a weight."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def sd3_by_hand(name: str, encoder: host.ManagedEncoder, weight: float) -> Any:
    """A joint block computed by its own parts, with the adapter's attention on queries and keys as they are projected."""
    model, now, layers = tiny(name).clone(), {}, encoder.encoder
    seen = encoder.look(photo())

    def told(apply: Any, args: dict[str, Any]) -> Tensor:
        time = float(args["timestep"].flatten()[0]) * 1000
        now["tokens"], now["time"] = layers.resampler(seen, time)
        return apply(args["input"], args["timestep"], **args["c"])

    def block(index: int) -> Any:
        own, adapter = tiny(name).model.diffusion_model.joint_blocks[index], layers.blocks[index]

        def replaced(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            raw: list[Tensor] = []
            handle = own.x_block.attn.qkv.register_forward_hook(lambda m, a, out: raw.append(out))
            text, kept_text = own.context_block.pre_attention(args["txt"], args["vec"])
            alone = own.x_block.x_block_self_attn
            if alone:
                picture, second, kept = own.x_block.pre_attention_x(args["img"], args["vec"])
            else:
                picture, kept = own.x_block.pre_attention(args["img"], args["vec"])
            handle.remove()
            heads = own.x_block.attn.num_heads
            q, k, v = (apart_in_heads(t, heads) for t in raw[0].chunk(3, -1))
            flat = [tuple(t.flatten(2) if t.ndim == 4 else t for t in x) for x in (text, picture)]
            joint = [torch.cat(pair, 1) for pair in zip(*flat)]
            out = optimized_attention(*joint, heads=heads)
            rows = flat[0][0].shape[1]
            x = adapter.norm_ip(now["tokens"], now["time"])
            k_ip, v_ip = (
                apart_in_heads(layer(x), heads) for layer in (adapter.to_k_ip, adapter.to_v_ip)
            )
            keys = torch.cat(
                (
                    norm(k, adapter.norm_k.weight),
                    norm(k_ip, adapter.norm_ip_k.weight).expand(len(k), -1, -1, -1),
                ),
                2,
            )
            values = torch.cat((v, v_ip.expand(len(v), -1, -1, -1)), 2)
            given = F.scaled_dot_product_attention(norm(q, adapter.norm_q.weight), keys, values)
            of_picture = out[:, rows:] + weight * given.transpose(1, 2).flatten(2)
            txt = None
            if not own.context_block.pre_only:
                txt = own.context_block.post_attention(out[:, :rows], *kept_text)
            if alone:
                other = optimized_attention(
                    *(t.flatten(2) if t.ndim == 4 else t for t in second), heads=heads
                )
                return {"txt": txt, "img": own.x_block.post_attention_x(of_picture, other, *kept)}
            return {"txt": txt, "img": own.x_block.post_attention(of_picture, *kept)}

        return replaced

    model.set_model_unet_function_wrapper(told)
    for index in range(len(tiny(name).model.diffusion_model.joint_blocks)):
        model.set_model_patch_replace(block(index), "dit", "double_block", index)
    return model


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_shakkers_is_the_published_formula(weight: float, tmp_path: Path) -> None:
    encoder = managed("shakker", tmp_path)
    ours = sample(concept(flux(), encoder, weight=weight), "Flux", cfg=1.0)
    assert apart(ours, sample(shakker_by_hand(encoder, weight), "Flux", cfg=1.0)) < SAME
    assert apart(ours, sample(flux(), "Flux", cfg=1.0)) > FELT


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_xlabs_is_the_published_formula(weight: float, tmp_path: Path) -> None:
    encoder = managed("xlabs", tmp_path)
    ours = sample(concept(flux(), encoder, weight=weight), "Flux", cfg=1.0)
    assert apart(ours, sample(xlabs_by_hand(encoder, weight), "Flux", cfg=1.0)) < SAME
    assert apart(ours, sample(flux(), "Flux", cfg=1.0)) > FELT


@pytest.mark.parametrize("name", ["SD3", "SD3.5"])
def test_instantxs_is_the_published_formula(name: str, tmp_path: Path) -> None:
    encoder = managed("sd3", tmp_path)
    ours = sample(concept(tiny(name), encoder, weight=0.6), name, cfg=1.0)
    with torch.inference_mode():
        assert apart(ours, sample(sd3_by_hand(name, encoder, 0.6), name, cfg=1.0)) < SAME
    assert apart(ours, sample(tiny(name), name, cfg=1.0)) > FELT


@pytest.mark.parametrize("layout, name", [("shakker", "Flux"), ("xlabs", "Flux"), ("sd3", "SD3.5")])
def test_with_guidance_in_a_batch_and_gone_again(layout: str, name: str, tmp_path: Path) -> None:
    model = flux() if name == "Flux" else tiny(name)
    encoder, without = managed(layout, tmp_path), sample(model, name, pictures=3)
    pictures = [
        sample(concept(model, encoder, halves=halves), name, pictures=3)
        for halves in ("both", "cond only")
    ]
    assert all(p.isfinite().all() and apart(p, without) > FELT for p in pictures)
    assert (
        apart(*pictures) > FELT
    )  # of no picture the negative half is told something else than nothing
    assert torch.equal(sample(model, name, pictures=3), without)


def test_beside_another_packs_replacement_of_the_block(tmp_path: Path) -> None:
    """XLabs' is added behind whatever stands for the block."""
    encoder, seen = managed("xlabs", tmp_path), []

    def same(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        seen.append(1)
        return extra["original_block"](args)

    model = concept(flux(), encoder)
    ours = sample(model, "Flux")
    model.set_model_patch_replace(same, "dit", "double_block", 1)
    assert torch.equal(sample(model, "Flux"), ours) and seen


def test_what_is_held_is_counted(tmp_path: Path) -> None:
    """Keys and values of both halves, 4 bytes each; of a timed adapter its own weights."""
    (kept,) = host.injected(concept(flux(), managed("shakker", tmp_path)))
    sizes = published("shakker")[1]
    whole = 2 * 2 * len(sizes["blocks"]) * sizes["tokens"] * sizes["channels"] * 4
    assert kept.held(flux(), (1, 16, 8, 8)) == whole
    (timed,) = host.injected(concept(tiny("SD3"), managed("sd3", tmp_path)))
    weights = sum(value.numel() for value in published("sd3")[0].values())
    assert timed.held(tiny("SD3"), (1, 16, 8, 8)) == 4 * weights


# what is wired ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's folders of encoders and towers, with nothing else in them."""
    known = dict(folder_paths.folder_names_and_paths)
    for kind in (host.CONCEPTS, "clip_vision"):
        known[kind] = ([str(tmp_path)], {".safetensors"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def load(layout: str, folder: Path, vision: Any, **more: Any) -> host.ManagedEncoder:
    save_file(published(layout)[0], folder / "adapter.safetensors")
    return ConceptEncoderLoad.execute("adapter.safetensors", vision, **more).result[0]


@pytest.mark.parametrize(
    "layout, tower",
    [("shakker", "SigLIP so400m"), ("xlabs", "CLIP ViT-L"), ("sd3", "SigLIP so400m")],
)
def test_a_missing_tower_is_named(layout: str, tower: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"adapter.safetensors holds no CLIP tower.*Wire {tower}"):
        load(layout, folder, None)


@pytest.mark.parametrize("layout", ["shakker", "xlabs", "sd3"])
def test_a_tower_of_another_width_or_kind_is_named(layout: str, folder: Path) -> None:
    seen = published(layout)[1]["seen"]
    other = Vision("sd3" if layout == "xlabs" else "xlabs", seen)
    for vision, width in ((Vision(layout, 33), 33), (other, "")):
        with pytest.raises(
            ValueError, match=f"reads .*, {seen} wide, but the CLIP Vision wired is a .*{width}"
        ):
            load(layout, folder, vision)


def test_the_pooling_head_is_asked_for_and_read(folder: Path) -> None:
    seen = published("shakker")[1]["seen"]
    vision, head = Vision("shakker", seen), head_of(seen)
    with pytest.raises(ValueError, match="Choose in pooling_head the file that clip_vision"):
        load("shakker", folder, vision)
    state = {f"vision_model.head.{name}": value for name, value in head.state_dict().items()}
    save_file(state, folder / "siglip.safetensors")
    encoder = load("shakker", folder, vision, pooling_head="siglip.safetensors")
    tokens = vision.encode_image(photo())["last_hidden_state"]
    torch.testing.assert_close(encoder.look(photo()), head(tokens), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="Concept Encoder Load: adapter.safetensors holds no pooling head"
    ):
        load("shakker", folder, vision, pooling_head="adapter.safetensors")


@pytest.mark.parametrize(
    "layout, name",
    [("shakker", "Flux"), ("shakker", "Chroma"), ("xlabs", "QwenImage"), ("sd3", "Flux")],
)
def test_an_adapter_on_another_network_is_refused(layout: str, name: str, tmp_path: Path) -> None:
    family = "SD3" if layout == "sd3" else "Flux"
    with pytest.raises(
        ValueError,
        match=f"the concept encoder was trained for {family}.*but the model given is {name}",
    ):
        concept(tiny(name), managed(layout, tmp_path))
