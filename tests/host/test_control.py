"""The miniature's ControlNet through the host's own nodes: it loads, says nothing at strength 0, moves the subject at 1, and composes
with this pack's injections. And the miniature's live previews."""

from __future__ import annotations

import gc
from functools import cache
from pathlib import Path

import latent_preview
import numpy as np
import pytest
import torch
from kindred.miniature.control import (
    EXAMPLE,
    WEIGHTS,
    build_network,
    control,
    covered,
    hint_of,
    load_weights,
)
from kindred.miniature.data import Renderings, held_out
from kindred.miniature.measure import overlap
from kindred.miniature.reader import MASK_GRID, load_reader
from kindred.miniature.registration import MiniatureLatent
from kindred.miniature.world import CLASSES, SCENES, prompt
from kindred.models.run import Run
from kindred.nodes.capture import RefUNetCapture
from kindred.nodes.concept import ConceptEncoderLoad, CrossAttnDetailInject
from kindred.nodes.inject import MaskedSelfAttnInject
from kindred.nodes.prompts import SubjectPrompts
from matrix import seed_all, states
from studio import ConsiStory, differs, of_model
from torch import Tensor

import nodes

pytestmark = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="no weights: python -m miniature.train control writes them"
)
PICTURES, STEPS = 2, 6


@cache
@torch.inference_mode()
def loaded():
    return nodes.CheckpointLoaderSimple().load_checkpoint("kindred_miniature.safetensors")


@cache
def net():
    return nodes.ControlNetLoader().load_controlnet(WEIGHTS.name)[0]


@cache
def world() -> Renderings:
    """Of 24 held-out renderings those whose subjects stand furthest from the middle, where the plain ones stand."""
    drawn = held_out(24, offset=40_000)
    columns = np.arange(128) - 63.5
    away = [abs((mask.sum(0) * columns).sum() / mask.sum()) for mask in drawn.masks]
    rows = np.argsort(away)[-PICTURES:]
    return Renderings(
        *(getattr(drawn, name)[rows] for name in ("images", "masks", "labels", "colours"))
    )


@cache
@torch.inference_mode()
def conditions() -> tuple[list, list]:
    """A row for each of the held-out pictures, and the negative."""
    lines = "\n".join(prompt(CLASSES[row[0]], SCENES[row[1]]) for row in world().labels)
    words = ", ".join(dict.fromkeys(CLASSES[row[0]] for row in world().labels))
    return SubjectPrompts.execute(loaded()[1], lines, words).result[
        0
    ], nodes.CLIPTextEncode().encode(loaded()[1], "")[0]


@torch.inference_mode()
def applied(strength: float = 1.0, hints: Tensor | None = None) -> tuple[list, list]:
    hints = hint_of(world().masks).movedim(1, -1) if hints is None else hints
    return nodes.ControlNetApplyAdvanced().apply_controlnet(
        *conditions(), net(), hints, strength, 0.0, 1.0
    )


@torch.inference_mode()
def sampled(model, both: tuple[list, list], steps: int = STEPS) -> Tensor:
    latent = nodes.EmptyLatentImage().generate(128, 128, PICTURES)[0]
    return nodes.common_ksampler(model, 11, steps, 4.0, "ddim", "ddim_uniform", *both, latent)[0][
        "samples"
    ]


@cache
def plain() -> Tensor:
    return sampled(loaded()[0], conditions())


@cache
def steered() -> Tensor:
    return sampled(loaded()[0], applied())


@torch.inference_mode()
def iou(latents: Tensor) -> float:
    mask = load_reader().read(loaded()[2].decode(latents)).mask > 0.5
    return overlap(mask.numpy(), covered(torch.from_numpy(world().masks), MASK_GRID).numpy())


def test_the_hosts_loader_lists_and_loads_it():
    names = nodes.ControlNetLoader.INPUT_TYPES()["required"]["control_net_name"][0]
    assert WEIGHTS.name in names and type(net()).__name__ == "ControlLora"


def test_the_example_hint_is_offered():
    import folder_paths

    offered = Path(folder_paths.get_temp_directory()) / f"kindred_{EXAMPLE.name}"
    assert offered.read_bytes() == EXAMPLE.read_bytes()


def test_strength_0_is_the_plain_picture_bit_for_bit():
    assert torch.equal(sampled(loaded()[0], applied(0.0), 2), sampled(loaded()[0], conditions(), 2))


def test_the_subject_goes_where_the_silhouette_is():
    with_it, without = iou(steered()), iou(plain())
    assert with_it > without + 0.15 and with_it > 0.6, (with_it, without)


def test_a_moved_silhouette_moves_the_subject():
    """The same class and the same noise, the silhouette mirrored: not a better picture but another place."""
    hints = hint_of(world().masks[..., ::-1]).movedim(1, -1)
    mirrored = sampled(loaded()[0], applied(hints=hints))
    assert iou(steered()) > iou(mirrored) + 0.1


def test_training_and_host_put_the_same_network_together():
    core = loaded()[0].model
    with torch.inference_mode():
        x, t = (
            torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1)),
            torch.tensor([900, 300]),
        )
        context, hint = (
            torch.randn(2, 77, 64, generator=torch.Generator().manual_seed(2)),
            hint_of(world().masks[:2]),
        )
        theirs = net().copy()
        theirs.pre_run(core, core.model_sampling.percent_to_sigma)
        told = theirs.control_model(x=x, hint=hint, timesteps=t.float(), context=context)
        base = {name: value.float() for name, value in core.diffusion_model.state_dict().items()}
        import comfy.options

        ours = control(
            build_network(Path(comfy.options.__file__).parents[1]),
            load_weights(base),
            x,
            hint,
            t.float(),
            context,
        )
    assert [len(told[name]) for name in ("output", "middle")] == [4, 1]
    for name, parts in ours.items():
        for a, b in zip(told[name], parts, strict=True):
            assert float(b.abs().max()) > 0 and torch.allclose(
                a.float(), b, atol=1e-2 * float(b.abs().max())
            )


@cache
@torch.inference_mode()
def bank():
    """Of the first picture, captured for the same steps."""
    model, clip, vae = loaded()
    coarse = SubjectPrompts.execute(clip, "a photo of a cat", "cat").result[0]
    latent = {"samples": vae.encode(torch.from_numpy(world().images[:1]).float() / 255)}
    return RefUNetCapture.execute(model, coarse, STEPS, "ddim_uniform", latent=latent).result[0]


@torch.inference_mode()
def injecting(model):
    return MaskedSelfAttnInject.execute(model, bank()).result[0]


@torch.inference_mode()
def telling(model):
    return ConsiStory.execute(model).result[0]


@torch.inference_mode()
def detailing(model):
    """Cross-Attn Detail Inject of the same picture, with its defaults."""
    encoder = ConceptEncoderLoad.execute("kindred_miniature_concept.safetensors").result[0]
    return CrossAttnDetailInject.execute(
        model, encoder, torch.from_numpy(world().images[:1]).float() / 255
    ).result[0]


def everything(model):
    return telling(detailing(injecting(model)))


@pytest.mark.parametrize("patch", [injecting, telling, detailing, everything])
def test_it_composes_with_an_injection(patch):
    """Together: finite, other than each alone, and the subject still stands where the silhouette is."""
    patched = patch(loaded()[0])
    alone, together = sampled(patched, conditions()), sampled(patched, applied())
    for other in (alone, steered(), plain()):
        assert differs(together, other) > 0.05
    assert iou(together) > iou(alone) + 0.3


def test_whose_node_ran_first_is_not_felt():
    """It hangs on the prompts and ours on the model, but both are read in one run: the hint before ours, and behind, after runs of each."""
    hinted = applied()
    before = sampled(everything(loaded()[0]), hinted, 2)
    patched = everything(loaded()[0])
    for own in (sampled(patched, conditions(), 2), sampled(loaded()[0], hinted, 2)):
        assert differs(own, before) > 0.05
    assert torch.equal(sampled(patched, applied(), 2), before)


def test_nothing_stays_behind():
    """Of all three beside the hint: the plain pictures, the MODEL and the random states are what they were, and no run is alive."""
    model = loaded()[0]
    before, was = sampled(model, conditions(), 2), of_model(model)
    seed_all()
    hinted, left = sampled(model, applied(), 2), states()
    gc.collect()
    gc.freeze()  # runs that tests before this one may still hold are not looked through
    patched = everything(model)
    seed_all()
    assert differs(sampled(patched, applied(), 2), hinted) > 0.05 and states() == left
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, Run)]
    gc.unfreeze()
    assert not alive
    assert torch.equal(sampled(model, conditions(), 2), before) and of_model(model) == was


def test_live_previews_show_the_picture():
    """Latent2RGB, the host's own: one pixel per cell, as the picture averaged over 8 x 8 pixels.

    Over 60 held-out renderings and three colours the correlation was 0.957 on average and 0.854 at least, the error 0.044.
    """
    images = torch.from_numpy(world().images).float() / 255
    previewer = latent_preview.Latent2RGBPreviewer(
        MiniatureLatent.latent_rgb_factors, MiniatureLatent.latent_rgb_factors_bias
    )
    with torch.inference_mode():
        latents = loaded()[2].encode(images)
        for image, latent in zip(images, latents, strict=True):
            in_model = loaded()[0].model.process_latent_in(latent[None])
            shown = torch.from_numpy(np.array(previewer.decode_latent_to_preview(in_model))).float()
            small = torch.nn.functional.avg_pool2d(image.movedim(-1, 0), 8).movedim(0, -1)
            for colour in range(3):
                pair = torch.stack((shown[..., colour].flatten(), small[..., colour].flatten()))
                assert float(torch.corrcoef(pair)[0, 1]) > 0.8
            assert float((shown / 255 - small).abs().mean()) < 0.08


def test_the_host_previews_the_miniature(monkeypatch):
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Auto)
    model = loaded()[0]
    assert latent_preview.get_previewer(model.load_device, model.model.latent_format) is not None
