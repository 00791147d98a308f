"""The miniature in the real host: its loader, its sampler, its VAE, and the two ways of running it agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kindred.miniature import measure
from kindred.miniature.autoencoder import Autoencoder, psnr
from kindred.miniature.data import held_out
from kindred.miniature.layout import FLOW_OFFERED
from kindred.miniature.pack import CHECKPOINT, FLOW_CHECKPOINT, load_autoencoder
from kindred.miniature.registration import KindredFlowMiniature, KindredMiniature, register
from safetensors import safe_open

pytestmark = pytest.mark.skipif(
    not CHECKPOINT.exists(), reason="no weights: python -m miniature.train pack writes them"
)


@pytest.fixture(scope="module")
def loaded(host):
    with torch.inference_mode():
        return host.CheckpointLoaderSimple().load_checkpoint("kindred_miniature.safetensors")


def test_it_is_registered_once():
    import comfy.supported_models
    import folder_paths

    register()
    register()
    assert comfy.supported_models.models.count(KindredMiniature) == 1
    assert [
        m
        for m in comfy.supported_models.models
        if issubclass(m, comfy.supported_models.FluxSchnell)
    ][0] is KindredFlowMiniature
    assert folder_paths.get_folder_paths("checkpoints").count(str(CHECKPOINT.parent)) == 1
    assert ours_in_load_checkpoint() == {CHECKPOINT.name} | (
        {FLOW_CHECKPOINT.name} if FLOW_OFFERED else set()
    )
    assert folder_paths.get_filename_list("concept_encoders") == [
        "kindred_miniature_concept.safetensors"
    ]
    assert folder_paths.get_filename_list("controlnet") == [
        "kindred_miniature_silhouette.safetensors"
    ]


def ours_in_load_checkpoint() -> set[str]:
    import folder_paths

    return {name for name in folder_paths.get_filename_list("checkpoints") if "kindred" in name}


def test_one_flag_puts_the_flow_miniature_into_load_checkpoint(monkeypatch):
    """Its file alone: the autoencoder that its training goes on from lies elsewhere."""
    import folder_paths
    from kindred.miniature import registration

    places, kinds = folder_paths.folder_names_and_paths["checkpoints"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([*places], {*kinds}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(registration, "FLOW_OFFERED", True)
    register()
    assert ours_in_load_checkpoint() == {CHECKPOINT.name, FLOW_CHECKPOINT.name}


def test_the_host_rebuilds_held_out_renderings(loaded):
    images = torch.from_numpy(held_out(64).images).float() / 255
    with torch.inference_mode():
        latents = loaded[2].encode(images)
        rebuilt = loaded[2].decode(latents)
    assert latents.shape == (64, 8, 16, 16) and 0.7 < float(latents.std()) < 1.3
    assert float(psnr(rebuilt.permute(0, 3, 1, 2), images.permute(0, 3, 1, 2)).mean()) >= 26


def test_a_plain_workflow_runs_from_an_empty_latent(host, loaded):
    """EmptyLatentImage gives four channels; the host itself makes them eight."""
    model, clip, vae = loaded
    with torch.inference_mode():
        positive = host.CLIPTextEncode().encode(clip, "a photo of a cat on the beach")[0]
        negative = host.CLIPTextEncode().encode(clip, "")[0]
        empty = host.EmptyLatentImage().generate(128, 128, 2)[0]
        latent = host.common_ksampler(
            model, 1, 2, 4.0, "ddim", "ddim_uniform", positive, negative, empty
        )[0]["samples"]
        image = vae.decode(latent)
    assert (
        latent.shape == (2, 8, 16, 16)
        and image.shape == (2, 128, 128, 3)
        and bool(image.isfinite().all())
    )


def test_pictures_that_it_cannot_draw_are_warned_of_before_the_first_step(host, loaded, caplog):
    """512 pixels are usual on the canvas, and it knows 128; twice of it is still asked for by those who look closer."""
    from kindred.nodes.consistory import ConsiStory

    model, clip, _ = loaded
    mask = torch.ones(1, 64, 64)
    with torch.inference_mode():
        text = host.CLIPTextEncode().encode(clip, "a photo of a cat on the beach")[0]
        story = ConsiStory.execute(model, masks=mask)[0]  # in two stages

    def drawn(side: int) -> list[str]:
        caplog.clear()
        empty = host.EmptyLatentImage().generate(side, 128, 2)[0]
        with torch.inference_mode():
            host.common_ksampler(story, 1, 4, 1.0, "euler", "simple", text, text, empty)
        return [r.getMessage() for r in caplog.records if "draws 128x128" in r.getMessage()]

    assert drawn(128) == drawn(256) == []
    (said,) = drawn(264)
    assert "pictures are 264x128" in said and "Set every width and height to 128" in said


def test_freeu_is_felt_by_its_second_pair_of_numbers_alone(host, loaded):
    """Its first pair is of features four times as wide as the model's first ones; the miniature has them but twice as wide."""
    from comfy_extras.nodes_freelunch import FreeU

    model, clip, _ = loaded
    with torch.inference_mode():
        positive, negative = (
            host.CLIPTextEncode().encode(clip, text)[0]
            for text in ("a photo of a cat on the beach", "")
        )
        empty = host.EmptyLatentImage().generate(128, 128, 1)[0]
        plain, paper, first, second = (
            host.common_ksampler(m, 1, 2, 4.0, "ddim", "ddim_uniform", positive, negative, empty)[
                0
            ]["samples"]
            for m in (
                model,
                *(
                    FreeU.execute(model, *scales)[0]
                    for scales in ((1.1, 1.2, 0.6, 0.4), (2, 1.2, 0.1, 0.4), (1.1, 1, 0.6, 1))
                ),
            )
        )
    assert float((paper - plain).abs().mean()) > 0.1 * float(plain.std())
    assert torch.equal(first, paper) and torch.allclose(second, plain, atol=1e-4)


def test_measuring_without_the_loader_is_the_same_model(host, loaded):
    """Text encoder, VAE and UNet of miniature/measure.py against the host's own, same weights."""
    import comfy.options

    model, clip, vae = loaded
    with torch.inference_mode():
        direct = measure.open_miniature(Path(comfy.options.__file__).parents[1])
        context = host.CLIPTextEncode().encode(clip, "a photo of a dog in a room")[0][0][0]
        assert torch.allclose(
            direct.context(["a photo of a dog in a room"]), context.float(), atol=2e-3
        )
        images = torch.from_numpy(held_out(2).images).float() / 255
        latents = direct.encode(images)
        assert torch.allclose(latents, vae.encode(images).float(), atol=2e-3)
        core = model.model.diffusion_model
        theirs = core(latents, torch.tensor([500, 20]), context=context.float().expand(2, -1, -1))
        ours = direct.unet(
            latents, torch.tensor([500, 20]), context=context.float().expand(2, -1, -1)
        )
        assert torch.allclose(ours, theirs.float(), atol=2e-3)


def test_the_autoencoder_rebuilds_held_out_renderings():
    model = load_autoencoder()
    parts = torch.from_numpy(held_out(64).images).permute(0, 3, 1, 2).float().div(255).split(16)
    assert (
        float(torch.cat([psnr(model.decode(model.encode(part)), part) for part in parts]).mean())
        >= 26
    )


def test_the_autoencoder_starts_as_principal_components():
    """The encoder's start is linear: eight channels of unit variance and no correlation."""
    pictures = torch.from_numpy(held_out(24).images).permute(0, 3, 1, 2).float() / 255
    model = Autoencoder()
    model.start_from_principal_components(pictures)
    latents = model.encode(pictures).transpose(0, 1).flatten(1)
    assert torch.allclose(torch.cov(latents), torch.eye(8), atol=1e-2)
    full, short = model.encode(pictures[:2]), model.coarse(pictures[:2], torch.zeros(()))[0]
    assert torch.allclose(full, short, atol=1e-5)


# the flow miniature's autoencoder ------------------------------------------------------------------------------------------------


def test_the_hosts_loader_reads_the_flow_autoencoder_and_its_pictures_come_back_at_30_db():
    from comfy.sd import VAE
    from comfy.utils import load_torch_file
    from kindred.miniature.data import held_out
    from kindred.miniature.pack import FLOW_AUTOENCODER

    vae = VAE(sd=load_torch_file(str(FLOW_AUTOENCODER)))
    images = torch.from_numpy(held_out(32).images).float() / 255
    with torch.inference_mode():
        latents = vae.encode(images)
        rebuilt = vae.decode(latents)
    assert vae.latent_channels == 16 and latents.shape == (32, 16, 16, 16)
    assert float(psnr(rebuilt.permute(0, 3, 1, 2), images.permute(0, 3, 1, 2)).mean()) >= 30
    assert 0.5 < float(latents.std()) < 1.5 and abs(float(latents.mean())) < 0.2


def test_a_new_work_folder_goes_on_from_the_shipped_flow_autoencoder(tmp_path):
    """So the latents are the same on every machine; what it was trained for comes with it, and a folder's own stays."""
    from kindred.miniature.layout import FLOW
    from kindred.miniature.pack import FLOW_AUTOENCODER, begin_flow, flow_autoencoder, flow_weights
    from kindred.miniature.training import load

    begin_flow(tmp_path)
    path = tmp_path / f"{FLOW}autoencoder.pt"
    state = load(path, torch.device("cpu"))
    assert all(
        torch.equal(value, state["model"][name]) for name, value in flow_autoencoder().items()
    )
    weights, facts = flow_weights(tmp_path)
    with safe_open(FLOW_AUTOENCODER, "pt") as shipped:
        assert facts == shipped.metadata() and all(
            torch.equal(weights[name], shipped.get_tensor(name)) for name in shipped.keys()
        )
    torch.save(state | {"step": 7}, path)
    begin_flow(tmp_path)
    assert load(path, torch.device("cpu"))["step"] == 7


def test_an_autoencoder_that_came_without_its_optimizers_is_not_trained_on(tmp_path):
    from kindred.miniature.pack import begin_flow
    from kindred.miniature.train_autoencoder import train_autoencoder
    from kindred.miniature.training import Run

    begin_flow(tmp_path)
    with pytest.raises(
        ValueError, match="flow-autoencoder.pt holds the shipped autoencoder.*another folder"
    ):
        train_autoencoder(
            Run(tmp_path, torch.device("cpu"), renderings=256), 1, channels=16, name="flow-"
        )


@pytest.fixture(scope="module")
def flow_file(tmp_path_factory):
    """The flow miniature's checkpoint as its training packs it, of a transformer that has hardly begun."""
    import os

    from kindred.miniature.flow import build_flow
    from kindred.miniature.layout import FLOW
    from kindred.miniature.pack import begin_flow, flow_checkpoint_weights
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("flow")
    begin_flow(folder)
    torch.manual_seed(3)
    flow = build_flow(Path(os.environ["KINDRED_HOST"]))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    average = {name: value.half().float() for name, value in flow.state_dict().items()}
    torch.save(
        {"average": average, "model": average, "step": 5, "spread": 0.9, "seed": 1, "loss": 1.5},
        folder / f"{FLOW}transformer.pt",
    )
    path = folder / "packed.safetensors"
    save_file(*flow_checkpoint_weights(folder)[:1], path, flow_checkpoint_weights(folder)[1])
    return path, average


@pytest.fixture(scope="module")
def flow_loaded(flow_file):
    from comfy.sd import load_checkpoint_guess_config

    with torch.inference_mode():
        return load_checkpoint_guess_config(str(flow_file[0]))[:3]


def test_the_hosts_loader_takes_the_flow_miniature_for_itself(flow_loaded, flow_file):
    """Before FLUX.1, whose class fits too; its velocity is the trained one's, and the pooled text is what the training pooled."""
    import os

    from kindred.miniature.flow import captions_encoded

    model, clip, vae = flow_loaded
    assert type(model.model.model_config) is KindredFlowMiniature and vae.latent_channels == 16
    core = model.model.diffusion_model
    assert all(
        torch.equal(value.float(), flow_file[1][name]) for name, value in core.state_dict().items()
    )
    with torch.inference_mode():
        encoded = clip.encode_from_tokens(
            clip.tokenize("a photo of a cat on the beach"), return_pooled=True
        )
    context, pooled = captions_encoded(
        Path(os.environ["KINDRED_HOST"]), ["a photo of a cat on the beach"]
    )
    assert torch.allclose(encoded[0].float(), context, atol=2e-3) and torch.allclose(
        encoded[1].float(), pooled, atol=2e-3
    )


def test_a_plain_workflow_draws_with_the_flow_miniature(host, flow_loaded):
    model, clip, vae = flow_loaded
    with torch.inference_mode():
        positive = host.CLIPTextEncode().encode(clip, "a photo of a cat on the beach")[0]
        negative = host.CLIPTextEncode().encode(clip, "")[0]
        empty = host.EmptyLatentImage().generate(128, 128, 2)[0]
        latent = host.common_ksampler(
            model, 1, 2, 4.0, "euler", "simple", positive, negative, empty
        )[0]["samples"]
        image = vae.decode(latent)
        back = vae.encode(image)
    assert (
        latent.shape == (2, 16, 16, 16)
        and image.shape == (2, 128, 128, 3)
        and bool(image.isfinite().all())
    )
    assert back.shape == latent.shape


def test_a_new_work_folder_goes_on_from_the_shipped_transformer(tmp_path, flow_file, monkeypatch):
    """In half precision and without its optimizers, which begin anew."""
    from kindred.miniature import pack
    from kindred.miniature.layout import FLOW
    from kindred.miniature.training import load

    monkeypatch.setattr(pack, "FLOW_CHECKPOINT", flow_file[0])
    pack.begin_flow(tmp_path)
    state = load(tmp_path / f"{FLOW}transformer.pt", torch.device("cpu"))
    assert state["step"] == 5 and abs(state["spread"] - 0.9) < 1e-6 and "optimizers" not in state
    assert all(torch.equal(value, flow_file[1][name]) for name, value in state["model"].items())
