"""Paper A's training-free half on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.reference.bank import ReferenceBank
from kindred.models.reference.file import load_reference, save_reference
from kindred.nodes import host
from kindred.nodes.host.latents import framed
from kindred.nodes.host.sites import require_backbone
from studio import capture, inject, invert
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor

FAMILIES = tuple(READ)
WHITE = torch.ones(1, 32, 32)
HALF = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], 2)
FELT = 1e-3  # of the greatest value: an effect that cannot be rounding
SAME = 1e-5  # of the greatest value: what rounding may do


def flat(samples: Tensor) -> Tensor:
    """[b c (1) y x] -> [b c y x]."""
    return samples.squeeze(2) if samples.ndim == 5 else samples


def apart(one: Tensor, other: Tensor) -> float:
    """Their greatest difference, in the greatest value of the second."""
    return float((one - other).abs().max() / other.abs().max())


@cache
def plain(name: str) -> Tensor:
    return sample(tiny(name), name)


@cache
def bank_of(name: str, masked: bool = True, **how: Any) -> ReferenceBank:
    """A photo of random cells, inverted and read."""
    photo = {"samples": latent(name, seed=21)}
    steps = {"steps": 3, "scheduler": "simple"}
    mask = HALF if masked else WHITE
    return capture(tiny(name), photo, prompt(name, seed=4), **steps, mask=mask, **how)[0]


def way_of(name: str, model: Any = None, **how: Any) -> tuple[Tensor, InversionTrajectory]:
    """A plain picture, and its own way through the noise as if it were a photo's; model: not the family's plain one."""
    seen: dict[float, Tensor] = {}

    def noted(executor: Any, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        seen[float(timestep.flatten()[0])] = flat(x).float().clone()
        return executor(x, timestep, *args)

    asked = model or tiny(name)
    watched = asked.clone()
    watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "noted", noted)
    picture = sample(watched, name, **how)
    sigmas = sorted(seen)
    way = torch.stack([torch.zeros_like(seen[sigmas[0]]), *(seen[s] for s in sigmas)])
    noise, key = host.noise_of(tiny(name), "test"), host.model_key(asked)
    return picture, InversionTrajectory(
        torch.tensor([0.0, *sigmas]), way, "fireflow", "", key, "simple", noise=noise
    )


@cache
def itself(name: str) -> ReferenceBank:
    """The plain picture, read as if it were a photo."""
    trajectory = way_of(name, cfg=1.0)[1]
    return capture(tiny(name), None, prompt(name), inversion=trajectory, mask=WHITE)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_is_felt_and_gone_with_its_node(name: str) -> None:
    model = inject(tiny(name), bank_of(name))
    assert apart(sample(model, name), plain(name)) > FELT
    assert torch.equal(sample(tiny(name), name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_that_reads_itself_stays_as_it_is(name: str) -> None:
    """At its own positions, with the text's share kept, at every weight; without guidance, which multiplies rounding."""
    alone = sample(tiny(name), name, cfg=1.0)
    for weight in (0.5, 3.0):
        model = inject(tiny(name), itself(name), weight)
        assert apart(sample(model, name, cfg=1.0), alone) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_held_or_read_anew_the_reference_is_the_same(name: str) -> None:
    live, held = bank_of(name), bank_of(name, keeps="keys and values")
    assert live.live and not live.bytes and not held.live and held.bytes
    pictures = [sample(inject(tiny(name), bank), name) for bank in (live, held)]
    assert apart(*pictures) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_an_inversion_and_its_latent_lead_to_the_same_reference(name: str) -> None:
    photo = {"samples": latent(name, seed=21)}
    path, noise, _ = invert(tiny(name), photo, prompt(name, seed=4), steps=3, scheduler="simple")
    bank = capture(tiny(name), None, prompt(name, seed=4), inversion=path, mask=HALF)[0]
    assert torch.equal(bank.trajectory.latents, bank_of(name).trajectory.latents)
    assert (
        noise["samples"].shape == photo["samples"].shape
        and bank.trajectory.latents.isfinite().all()
    )


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [
    {"cfg": 1.0}, {"pictures": 3}, {"sampler": "heun"}, {"sampler": "euler_ancestral"}, {"sampler": "dpmpp_2m_sde"}, {"steps": 5},
], ids=str)  # fmt: skip
def test_it_is_felt_however_one_samples(name: str, how: dict[str, Any]) -> None:
    with_it, without = (
        sample(m, name, **how) for m in (inject(tiny(name), bank_of(name)), tiny(name))
    )
    assert with_it.isfinite().all() and apart(with_it, without) > FELT


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_keeps_its_share_unless_told_otherwise(name: str) -> None:
    """Where text and picture are in one softmax, plain concatenation dims the text; where they are apart it changes nothing."""
    alone = sample(tiny(name), name, cfg=1.0)
    kept, dimmed = (
        sample(inject(tiny(name), itself(name), 3.0, text_share=share), name, cfg=1.0)
        for share in ("kept", "plain")
    )
    joint = require_backbone(tiny(name), "test").joint
    assert apart(kept, alone) < SAME and (apart(dimmed, alone) > FELT) is joint


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "SD3.5", "CosmosPredict2"])
def test_a_scale_of_kept_keys_acts(name: str) -> None:
    """I64: behind the norm, where a scale is a temperature."""
    soft, plain_one = (
        sample(inject(tiny(name), bank_of(name), weight, weight_mode="key scale"), name)
        for weight in (0.25, 1.0)
    )
    assert apart(soft, plain_one) > FELT


def test_several_frames_are_refused() -> None:
    model = inject(tiny("QwenImage"), bank_of("QwenImage"))
    film = torch.zeros_like(latent("QwenImage")).repeat(1, 1, 3, 1, 1)
    with pytest.raises(ValueError, match="3 frames.*Take a latent of one picture"):
        sample(model, "QwenImage", start=film)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_inversion_starts_the_hosts_sampler_at_its_end(name: str) -> None:
    """I60: of a flow as noise, finite at sigma 1; of a diffusion as a latent without noise. The network is first asked about it."""
    import comfy.sample

    photo, seen = {"samples": latent(name, seed=21)}, []
    path, given, _ = invert(tiny(name), photo, prompt(name, seed=4), steps=3, scheduler="simple")
    backbone, end = require_backbone(tiny(name), "test"), path.latents[-1]
    assert end.isfinite().all() and (float(path.sigmas[-1]) == 1.0) is backbone.flow

    def noted(executor: Any, x: Tensor, *args: Any) -> Tensor:
        seen.append(flat(x).clone())
        return executor(x, *args)

    model, noise = tiny(name).clone(), framed(tiny(name), end / backbone.noise_scale)
    none = torch.zeros_like(noise)
    start = (noise, none) if backbone.flow else (none, given["samples"])
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "noted", noted)
    how, texts = (3, 1.0, "euler", "simple"), (prompt(name, seed=4), prompt(name, seed=3))
    with torch.inference_mode():
        out = comfy.sample.sample(model, start[0], *how, *texts, start[1], seed=0)
    assert out.isfinite().all() and apart(seen[0], end) < SAME
    assert torch.equal(seen[0], end) or not backbone.flow


def test_a_pass_that_skips_blocks_counts_the_others_right(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Skip Layer Guidance on SD3.5, where blocks are counted: ours is felt, and no block is taken for another."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(model: Any) -> Any:
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, double_layers="1").result[0]

    plain_one = sample(guided(tiny("SD3.5")), "SD3.5")
    with_ours = sample(guided(inject(tiny("SD3.5"), bank_of("SD3.5"))), "SD3.5")
    assert apart(with_ours, plain_one) > FELT and not torch.equal(plain_one, plain("SD3.5"))
    assert not [r for r in caplog.records if "told apart by their number" in r.message]


@pytest.mark.parametrize("tokens", [4, 200])
def test_calls_that_another_node_adds_are_said_once(
    tokens: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Where blocks are known by their number alone, one call more is taken for the next block's, unless it cannot be one."""
    from comfy.ldm.modules.attention import optimized_attention

    def one_more(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        t = torch.zeros(len(x), tokens, 64)
        told = [*args, *kwargs.values()]
        options = next(a for a in told if isinstance(a, dict) and "sigmas" in a)
        optimized_attention(t, t, t, 2, transformer_options=options)
        return executor(x, *args, **kwargs)

    model = inject(tiny("AuraFlow"), bank_of("AuraFlow"))
    ours = sample(model, "AuraFlow")
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "one more", one_more)
    same = torch.equal(sample(model, "AuraFlow"), ours)
    said = [r.message for r in caplog.records if "told apart by their number" in r.message]
    assert (same, len(said)) == ((True, 0) if tokens == 4 else (False, 1))
    assert all("Remove that node" in text for text in said)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("keeps", ["automatic", "keys and values"])
def test_a_saved_reference_draws_the_same_picture(name: str, keeps: str, tmp_path: Path) -> None:
    bank, path = bank_of(name, keeps=keeps), tmp_path / "saved.safetensors"
    save_reference(bank, path)
    loaded = load_reference(path)
    assert loaded.live is bank.live and loaded.layers == bank.layers
    pictures = [sample(inject(tiny(name), one), name) for one in (bank, loaded)]
    assert torch.equal(*pictures)


@pytest.mark.parametrize("name", FAMILIES)
def test_odd_sizes_and_other_texts_are_read_too(name: str) -> None:
    """Picture and photo of other sizes than one another's, odd where the host cuts them again; a prompt of another length."""
    family = READ[name]
    less = int(family.odd and family.patch > 1)
    rows, columns = family.grid
    y, x = rows * family.patch - less, (columns + 2) * family.patch - less
    start = torch.zeros_like(latent(name, size=((rows + 1) * family.patch - less, x)))
    photo = {"samples": latent(name, seed=21, size=(y, x))}
    bank = capture(tiny(name), photo, prompt(name, seed=4), steps=3, scheduler="simple", mask=HALF)[
        0
    ]
    how = {"positive": prompt(name, words=family.words + max(family.step, 3)), "start": start}
    pictures = [sample(m, name, **how) for m in (inject(tiny(name), bank), tiny(name))]
    assert pictures[0].isfinite().all() and pictures[0].shape == start.shape
    assert apart(*pictures) > FELT


def test_a_reference_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="Flux .*but the model given is Chroma"):
        inject(tiny("Chroma"), bank_of("Flux"))


@pytest.mark.parametrize("refused", ["hidden states"])
def test_hidden_states_of_a_transformer_are_refused(refused: str) -> None:
    with pytest.raises(ValueError, match="of a transformer keys and values are taken as they come"):
        bank_of("Flux", keeps=refused)


def test_a_live_pass_ends_behind_the_last_block_that_is_read() -> None:
    """Of FLUX's four blocks in three steps: as many calls as there are blocks up to the last one read."""
    seen: list[int] = []

    def counted(func: Any, *args: Any, **kwargs: Any) -> Tensor:
        run = kwargs["transformer_options"][host.KEY]
        seen.append(run.ways is None)  # the reference's own pass
        return func(*args, **kwargs)

    model = tiny("Flux").clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = counted
    counts = {}
    for blocks in ("double 0", "double", "single 0", "all"):
        seen.clear()
        sample(inject(model, bank_of("Flux"), blocks=blocks), "Flux", cfg=1.0)
        counts[blocks] = sum(seen)
    # the last block's own call need not be answered: what it reads was seen before
    assert counts == {"double 0": 0, "double": 3, "single 0": 6, "all": 9}


def test_a_repeated_text_is_refused_where_text_and_picture_share_a_softmax() -> None:
    """What Subject Prompts does to lines of unequal length is right in a cross-attention alone."""
    from kindred.nodes.host import REPEATS

    repeated = prompt("Flux", **{REPEATS: (2,)})
    with pytest.raises(ValueError, match="Flux reads text and picture in one attention"):
        sample(inject(tiny("Flux"), bank_of("Flux")), "Flux", positive=repeated)
    beside = prompt("Anima", **{REPEATS: (2,)})
    assert (
        sample(inject(tiny("Anima"), bank_of("Anima")), "Anima", positive=beside).isfinite().all()
    )


def test_a_batch_shares_one_pass_over_the_reference() -> None:
    """Live reading costs one row more in each step, whatever the batch, and only as deep as the last block that is read."""
    calls: list[int] = []

    def counted(executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.shape[0])
        return executor(x, *args, **kwargs)

    model = inject(tiny("Flux"), bank_of("Flux"))
    network = tiny("Flux").model
    applied = network._apply_model
    network._apply_model = lambda x, *args, **kwargs: counted(applied, x, *args, **kwargs)
    try:
        sample(model, "Flux", pictures=3)
    finally:
        del network._apply_model
    assert sorted(calls) == [1] * 3 + [6] * 3


@pytest.mark.parametrize("name", ["SD3.5", "AuraFlow", "HiDream", "PixelDiT", "Flux", "HunyuanDiT"])
def test_a_replaced_block_that_runs_the_block_changes_nothing(name: str) -> None:
    """Where blocks are counted too: a replacement may skip its block, so it says itself which one it is."""

    def same(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        return extra["original_block"](args)

    model = inject(tiny(name), bank_of(name))
    model.set_model_patch_replace(same, "dit", "double_block", 1)
    assert torch.equal(sample(model, name), sample(inject(tiny(name), bank_of(name)), name))


@pytest.mark.parametrize("keys", [4, 48, 60])
def test_another_attention_inside_of_a_named_block_is_its_own(keys: int) -> None:
    from comfy.ldm.modules.attention import optimized_attention

    def look(args: dict[str, Any]) -> dict[str, Any]:
        t = torch.ones(len(args["img"]), keys, 64)
        optimized_attention(t, t, t, 2, transformer_options=args["transformer_options"])
        return args

    model = inject(tiny("QwenImage"), bank_of("QwenImage"))
    ours = sample(model, "QwenImage")
    model.set_model_patch(look, "double_block")
    assert torch.equal(sample(model, "QwenImage"), ours)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_is_drawn(name: str) -> None:
    """Its latents come back to pictures through a VAE that takes them as the family has them."""
    from kindred.nodes.host import decode

    bank = bank_of(name)

    class Vae:
        latent_channels = bank.trajectory.latents.shape[2]

        def decode(self, latents: Tensor) -> Tensor:
            pictures = latents[:, :3].movedim(1, -1)
            return pictures.expand(*pictures.shape[:-1], 3)

    y, x = bank.trajectory.latents.shape[-2:]
    drawn = decode(Vae(), bank.trajectory.latents[0], bank.model_key, "Reference Preview")
    assert drawn.shape == (1, y, x, 3)


def test_two_checkpoints_of_one_family_have_two_names() -> None:
    from tiny_networks import build

    other = build(READ["Flux"])
    with torch.no_grad():
        for parameter in other.model.diffusion_model.parameters():
            parameter.mul_(1.5)
    mine, theirs = host.model_key(tiny("Flux")), host.model_key(other)
    assert mine == host.model_key(tiny("Flux")) and mine != theirs


@pytest.mark.parametrize("keeps", ["automatic", "keys and values"])
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize(
    "name", ["Flux", "LongCatImage", "Lumina2", "ZImage", "Omnigen2", "Boogu", "ErnieImage"]
)
def test_each_half_of_guidance_reads_beside_its_own_text(
    name: str, longer: bool, keeps: str
) -> None:
    """A picture that reads itself in both halves stays as it is, however long the negative prompt is."""
    words = READ[name].words + (max(READ[name].step, 3) + 4) * longer
    negative = prompt(name, seed=3, words=words)
    alone, trajectory = way_of(name, cfg=3.0, negative=negative)
    bank = capture(
        tiny(name),
        None,
        prompt(name),
        inversion=trajectory,
        mask=WHITE,
        negative=negative,
        keeps=keeps,
    )[0]
    model = inject(tiny(name), bank, 3.0, halves="both")
    assert apart(sample(model, name, cfg=3.0, negative=negative), alone) < SAME


@pytest.mark.parametrize("name", ["Flux", "QwenImage", "SD3.5", "ZImage"])
def test_chained_references_dim_the_text_only_where_one_of_them_does(name: str) -> None:
    """A picture that reads itself twice, both kept, stays as it is; with one that dims it, it does not."""
    alone = sample(tiny(name), name, cfg=1.0)
    once = inject(tiny(name), itself(name), 3.0)
    kept, dimmed = (inject(once, itself(name), 2.0, text_share=t) for t in ("kept", "plain"))
    assert apart(sample(kept, name, cfg=1.0), alone) < SAME
    assert apart(sample(dimmed, name, cfg=1.0), alone) > FELT


def test_two_photos_of_a_subject_are_one_reference() -> None:
    photo = {"samples": torch.cat([latent("Flux", seed=21), latent("Flux", seed=22)])}
    positive = prompt("Flux", seed=4)
    how = {"steps": 3, "scheduler": "simple", "mask": HALF}
    banks = [
        capture(tiny("Flux"), photo, positive, **how, keeps=keeps)[0]
        for keeps in ("automatic", "keys and values")
    ]
    pictures = [sample(inject(tiny("Flux"), bank), "Flux") for bank in banks]
    assert (
        apart(*pictures) < SAME
        and apart(pictures[0], sample(inject(tiny("Flux"), bank_of("Flux")), "Flux")) > FELT
    )


def test_another_guidance_than_the_references_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bank = capture(
        tiny("Flux"), {"samples": latent("Flux", seed=21)}, prompt("Flux", seed=4, guidance=1.0),
        steps=3, scheduler="simple", mask=HALF,
    )[0]  # fmt: skip
    sample(inject(tiny("Flux"), bank), "Flux", positive=prompt("Flux", guidance=8.0))
    assert "another guidance than the pictures are drawn at (1.0 and 8.0)" in caplog.text
    caplog.clear()
    sample(inject(tiny("Flux"), bank), "Flux", positive=prompt("Flux", guidance=1.0))
    assert "another guidance" not in caplog.text


def test_what_is_held_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    """FLUX in small: 4 blocks, 48 tokens under a half mask, keys and values of 64 channels each, float32, 3 steps."""
    caplog.set_level("INFO")
    photo = {"samples": latent("Flux", seed=23)}
    positive = prompt("Flux", seed=4)
    bank = capture(
        tiny("Flux"),
        photo,
        positive,
        steps=3,
        scheduler="simple",
        mask=HALF,
        keeps="keys and values",
    )[0]
    assert f"its keys and values take {bank.bytes / 1e6:.1f} MB of main memory." in caplog.text


def test_an_empty_negative_of_no_rows_is_saved(tmp_path: Path) -> None:
    """Lens is given no text at all for an empty prompt."""
    empty = prompt("Lens", seed=3)
    empty[0][0] = empty[0][0][:, :0]
    empty[0][1]["attention_mask"] = empty[0][1]["attention_mask"][:, :0]
    photo = {"samples": latent("Lens", seed=21)}
    bank = capture(
        tiny("Lens"), photo, prompt("Lens", seed=4), steps=3, scheduler="simple", mask=HALF, negative=empty
    )[0]  # fmt: skip
    save_reference(bank, tmp_path / "saved.safetensors")
    assert load_reference(tmp_path / "saved.safetensors").layers == bank.layers


@pytest.mark.parametrize("name", ["HiDream", "Flux", "SD3.5", "Lumina2", "HunyuanDiT"])
def test_beside_the_hosts_compiler_it_is_felt(name: str) -> None:
    """The host's Torch Compile node stands as a wrapper around the network; the compiler itself does not run here."""
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

    def around(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return executor(*args, **kwargs)

    model = inject(tiny(name), bank_of(name))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, COMPILE_KEY, around)
    assert apart(sample(model, name), sample(inject(tiny(name), bank_of(name)), name)) < SAME
