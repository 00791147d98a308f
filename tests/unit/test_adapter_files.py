"""Public adapters of transformers by their files: small ones of the published layouts, against the published formulas written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import convert_adapter
import pytest
import torch
import torch.nn.functional as F
from kindred.models.attention.parts import Merge
from kindred.models.concept.adapters import PooledEncoder
from kindred.models.concept.config import FORMAT, ConceptConfig, Kind, check_layers
from kindred.models.concept.decoupled import Decoupled, rms_normed
from kindred.models.concept.encoder import ConceptEncoder
from kindred.models.concept.file import load_concept_encoder
from kindred.models.concept.siglip import load_pooling_head
from kindred.models.concept.timed import Norms, TimedEncoder
from safetensors.torch import save_file
from small_adapters import SD3, SHAKKER, XLABS, drawn, published
from small_attention import sdpa_attend
from torch import Tensor

HEADS = 2


@pytest.fixture(params=["shakker", "xlabs", "sd3"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def written(folder: Path, tensors: dict[str, Tensor], name: str = "ip-adapter.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def test_a_published_layout_is_known(layout: str, tmp_path: Path) -> None:
    tensors, sizes = published(layout)
    encoder = load_concept_encoder(written(tmp_path, tensors))
    config = encoder.config
    assert (config.width, config.tower_width) == (sizes["width"], sizes["seen"])
    assert (
        config.merge is Merge.ADD and config.decoupled and config.adapter.tokens == sizes["tokens"]
    )
    assert config.family == ("SD3" if layout == "sd3" else "Flux")
    assert sum(p.numel() for p in encoder.parameters()) == sum(t.numel() for t in tensors.values())
    assert [b for b, _ in config.layers] == sizes["blocks"]
    assert all(c == sizes["channels"] for _, c in config.layers)


def test_shakkers_tokens_keys_and_values(tmp_path: Path) -> None:
    """norm(W2 gelu(W1 x)) as m tokens; K and V are linear and divided by each head's root mean square."""
    t, sizes = published("shakker")
    encoder = load_concept_encoder(written(tmp_path, t))
    pooled = drawn(2, sizes["seen"], seed=8)
    hidden = F.gelu(pooled @ t["image_proj.proj.0.weight"].T + t["image_proj.proj.0.bias"])
    rows = hidden @ t["image_proj.proj.2.weight"].T + t["image_proj.proj.2.bias"]
    tokens = rows.reshape(2, sizes["tokens"], sizes["width"])
    tokens = F.layer_norm(tokens, tokens.shape[-1:]) * t["image_proj.norm.weight"]
    tokens = tokens + t["image_proj.norm.bias"]
    assert isinstance(encoder, PooledEncoder)
    found = encoder.keys_values(encoder.features(pooled))
    q = drawn(2, 5, sizes["channels"], seed=9)
    for i, block in enumerate(sizes["blocks"]):
        k, v = (tokens @ t[f"ip_adapter.{i}.to_{half}_ip.weight"].T for half in "kv")
        heads = [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)]
        k, v = (x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in heads[1:])
        expected = F.scaled_dot_product_attention(heads[0], k, v).transpose(1, 2).flatten(2)
        read = Decoupled(*found[block], normed=True).read(sdpa_attend, q, (q, q), HEADS)
        torch.testing.assert_close(read, expected, rtol=1e-5, atol=1e-5)


def test_xlabs_tokens_keys_and_values(tmp_path: Path) -> None:
    t, sizes = published("xlabs")
    encoder = load_concept_encoder(written(tmp_path, t))
    vector = drawn(1, sizes["seen"], seed=8)
    rows = vector @ t["ip_adapter_proj_model.proj.weight"].T + t["ip_adapter_proj_model.proj.bias"]
    tokens = rows.reshape(1, sizes["tokens"], sizes["width"])
    tokens = F.layer_norm(tokens, tokens.shape[-1:]) * t["ip_adapter_proj_model.norm.weight"]
    tokens = tokens + t["ip_adapter_proj_model.norm.bias"]
    found = encoder.keys_values(encoder.features(vector))
    for i, block in enumerate(sizes["blocks"]):
        for half, ours in zip("kv", found[block]):
            name = f"double_blocks.{i}.processor.ip_adapter_double_stream_{half}_proj."
            expected = tokens @ t[name + "weight"].T + t[name + "bias"]
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def resampled(t: dict[str, Tensor], seen: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """InstantX's time resampler, written out -> tokens, the time's embedding."""
    t = {name.removeprefix("image_proj."): value for name, value in t.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ t[f"{name}.weight"].T
        return out + t[f"{name}.bias"] if f"{name}.bias" in t else out

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * t[f"{name}.weight"] + t[f"{name}.bias"]

    half = t["time_embedding.linear_1.weight"].shape[1] // 2
    angles = time * torch.tensor([10000.0 ** -(i / half) for i in range(half)])
    code = torch.cat((angles.cos(), angles.sin()))[None]
    told = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", code)))
    x, latents = linear("proj_in", seen) + told[:, None], t["latents"]
    for i in range(SD3["depth"]):
        four = linear(f"layers.{i}.2.1", F.silu(told))[:, None].chunk(4, -1)
        normed = norm(f"layers.{i}.0.norm2", latents) * (1 + four[1]) + four[0]
        both = torch.cat((norm(f"layers.{i}.0.norm1", x), normed), 1)
        q = linear(f"layers.{i}.0.to_q", normed)
        k, v = linear(f"layers.{i}.0.to_kv", both).chunk(2, -1)
        d = min(64, q.shape[-1])
        q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y in (q, k, v))
        mixed = ((q @ k.mT / math.sqrt(d)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        latents = linear(f"layers.{i}.0.to_out", mixed) + latents
        inner = norm(f"layers.{i}.1.0", latents) * (1 + four[3]) + four[2]
        latents = linear(f"layers.{i}.1.3", F.gelu(linear(f"layers.{i}.1.1", inner))) + latents
    return norm("norm_out", linear("proj_out", latents)), told


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """[b n (h d)] -> [b h n d], each head over its root mean square."""
    apart = x.unflatten(-1, (-1, len(weight))).transpose(1, 2)
    return apart / (apart.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_instantxs_keys_and_values_follow_the_time(tmp_path: Path) -> None:
    """The network hands queries and keys with its own norms on them; the adapter's take them as they were before."""
    t, sizes = published("sd3")
    encoder = load_concept_encoder(written(tmp_path, t))
    assert isinstance(encoder, TimedEncoder)
    seen, c = drawn(1, 7, sizes["seen"], seed=8), sizes["channels"]
    raw_q, raw_k, v = (drawn(1, 5, c, seed=seed) for seed in (9, 10, 11))
    own = Norms(drawn(sizes["head"], seed=12) + 2, drawn(sizes["head"], seed=13) + 2)
    normed = [rms(x, w).transpose(1, 2).flatten(2) for x, w in ((raw_q, own.q), (raw_k, own.k))]
    answers, heads = [], c // sizes["head"]
    for time in (900.0, 120.0):
        tokens, told = resampled(t, seen, time)
        made = encoder.at(seen, time, dict.fromkeys(sizes["blocks"], own))
        for i, block in enumerate(sizes["blocks"]):
            name = f"ip_adapter.{i}."
            two = (
                F.silu(told) @ t[name + "norm_ip.linear.weight"].T + t[name + "norm_ip.linear.bias"]
            )
            shift, scale = two[:, None].chunk(2, -1)
            x = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift
            keys = rms(x @ t[name + "to_k_ip.weight"].T, t[name + "norm_ip_k.weight"])
            values = (x @ t[name + "to_v_ip.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
            q = rms(raw_q, t[name + "norm_q.weight"])
            keys = torch.cat((rms(raw_k, t[name + "norm_k.weight"]), keys), 2)
            values = torch.cat((v.unflatten(-1, (heads, -1)).transpose(1, 2), values), 2)
            expected = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)
            read = made[block].read(sdpa_attend, normed[0], (normed[1], v), heads)
            torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-5)
            answers.append(read)
    assert (answers[0] - answers[len(sizes["blocks"])]).abs().max() > 1e-3


def test_rms_normed_by_hand() -> None:
    x, weight = drawn(2, 3, 8, seed=1), drawn(4, seed=2)
    expected = rms(x, weight).transpose(1, 2).flatten(2)
    torch.testing.assert_close(rms_normed(x, 2, 1e-6, weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["missing", "more", "cut", "gap", "whole numbers"])
def test_a_file_that_is_not_quite_one_is_refused(layout: str, change: str, tmp_path: Path) -> None:
    tensors, _ = published(layout)
    names = [name for name in tensors if "to_v_ip" in name or "v_proj.weight" in name]
    if change == "missing":
        del tensors[names[1]]
    elif change == "more":
        tensors["ip_adapter.0.to_q_ip.weight"] = torch.zeros(2, 2)
    elif change == "cut":
        tensors[names[0]] = tensors[names[0]][:, :-1]
    elif change == "gap":
        second = ("ip_adapter.1.", "double_blocks.1.")
        for name in [name for name in tensors if name.startswith(second)]:
            tensors[name.replace(".1.", ".7.", 1)] = tensors.pop(name)
    else:
        tensors[names[0]] = tensors[names[0]].to(torch.int8)
    with pytest.raises(ValueError, match=r"^ip-adapter.safetensors") as error:
        load_concept_encoder(written(tmp_path, tensors))
    assert str(error.value).rstrip(".").split(". ")[-1].split()[0] in ("Copy", "Use")


def test_an_adapter_for_57_blocks_is_not_read_by_another_network(tmp_path: Path) -> None:
    encoder = load_concept_encoder(written(tmp_path, published("shakker")[0]))
    fewer = [layer for layer in encoder.config.layers if layer[0][0] == "double"]
    for family, layers in (("Flux", fewer), ("Chroma", encoder.config.layers)):
        with pytest.raises(
            ValueError, match=f"trained for Flux .6 blocks.*model given is {family}"
        ):
            check_layers(encoder.config, family, layers, None, "Node")
    check_layers(encoder.config, "FluxSchnell", encoder.config.layers, None, "Node")


def test_the_kinds_say_whose_they_are() -> None:
    assert {SHAKKER["kind"], XLABS["kind"], SD3["kind"]} == {*Kind}


def test_siglips_pooling_head_is_transformers(tmp_path: Path) -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(3)
    told = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = SiglipVisionModel(SiglipVisionConfig(**told, image_size=16, patch_size=8)).eval()
    state = {
        name if name.startswith("vision_model.") else f"vision_model.{name}": value
        for name, value in model.state_dict().items()
    }
    path = written(tmp_path, state, "siglip.safetensors")
    out = model(torch.rand(2, 3, 16, 16))
    head = load_pooling_head(path, 16, 2)
    torch.testing.assert_close(head(out.last_hidden_state), out.pooler_output, rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="siglip.safetensors holds no pooling head of a SigLIP 32 wide"
    ):
        load_pooling_head(path, 32, 2)
    bare = {name: value for name, value in state.items() if ".head." not in name}
    with pytest.raises(ValueError, match="bare.safetensors holds no pooling head.*0 tensors"):
        load_pooling_head(written(tmp_path, bare, "bare.safetensors"), 16, 2)


def test_tied_blocks_read_the_same_keys_and_values(tmp_path: Path) -> None:
    """Two neighbours of one kind share theirs, in the file too; another stage or width begins anew."""
    blocks = [
        ("double", 0, 0),
        ("double", 1, 0),
        ("double", 2, 0),
        ("single", 0, 0),
        ("single", 1, 0),
    ]
    layers = tuple((block, 8 if i < 4 else 12) for i, block in enumerate(blocks))
    config = ConceptConfig("Flux", layers, 6, 8, merge=Merge.ADD, tied=2)
    ConceptEncoder(config).save(tmp_path / "tied.safetensors")
    encoder = load_concept_encoder(tmp_path / "tied.safetensors")
    assert encoder.config == config and len(encoder.to_k) == len(encoder.to_v) == 4
    read = encoder.keys_values(drawn(1, 3, 6, seed=1))
    first, second, third = (read["double", i, 0][0] for i in range(3))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert [*read] == blocks and read["single", 1, 0][0].shape[-1] == 12
    apart = replace(config, tied=1)
    assert "tied" not in apart.metadata()[FORMAT] and len(ConceptEncoder(apart).to_k) == 5


class Stranger:
    """What a pickle may hold besides tensors."""


@pytest.mark.parametrize("name", ["shakker", "sd3"])
def test_a_published_pickle_becomes_a_file_that_is_read(name: str, tmp_path: Path) -> None:
    """InstantX's files are two dicts of tensors in one pickle."""
    tensors, _ = published(name)
    nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        half, _, rest = key.partition(".")
        nested[half][rest] = value
    torch.save(nested, tmp_path / "ip-adapter.bin")
    assert convert_adapter.main([str(tmp_path / "ip-adapter.bin")]) == 0
    encoder = load_concept_encoder(tmp_path / "ip-adapter.safetensors")
    assert sum(p.numel() for p in encoder.parameters()) == sum(t.numel() for t in tensors.values())
    with pytest.raises(SystemExit, match="is there already. Give another name behind it"):
        convert_adapter.main([str(tmp_path / "ip-adapter.bin")])


@pytest.mark.parametrize("content", [{"image_proj": [1, 2]}, {"a": Stranger()}, None])
def test_a_pickle_of_anything_else_is_not_converted(content: object, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    if content is None:
        path.write_bytes(b"no pickle")
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit, match="x.bin is no pickle of weights alone.*Download it again"):
        convert_adapter.main([str(path)])
    assert not path.with_suffix(".safetensors").exists()
