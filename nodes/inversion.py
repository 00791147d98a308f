"""DDIM Invert: a photo's latent, step by step, back to the noise it could have come from."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.metrics import psnr
from ..models.noise import inversion as method
from ..models.noise.inversion import InversionTrajectory, require_below_top
from ..models.noise.path import Noise
from ..models.reference.bank import ReferencePrompt
from . import host

NODE = "DDIM Invert"
DDIM, EDIT_FRIENDLY, FIREFLOW, FORWARD = "ddim", "edit-friendly ddpm", "fireflow", "forward noise"
log = logging.getLogger(__name__)


class DDIMInvert(io.ComfyNode):
    """The inversion of paper A section 2.1, at guidance 1 through the host's own model wrapper
    (eps, v and flow models).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredDDIMInvert",
            display_name=NODE,
            category="Kindred",
            description="Turns an encoded photo back into noise and keeps every step on the way, "
            "so that Ref-UNet Feature Capture "
            "can read the subject at each of them. Reports how well the photo comes back.",
            search_aliases=[
                "ddim inversion",
                "unsampler",
                "invert image",
                "noise inversion",
                "reverse sampling",
                "fireflow",
                "rectified flow inversion",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will generate, with its LoRAs."),
                io.Latent.Input("latent", tooltip="The photo of the subject, through VAE Encode."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A coarse description of the photo, such as: a photo of a cat (Subject "
                    "Prompts).",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=1000,
                    tooltip="Match your sampler's steps. A mismatch works but is slower.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.schedulers(),
                    default="ddim_uniform",
                    tooltip="Match your sampler's scheduler: simple for Flux, SD3.5, "
                    "Qwen-Image and most transformers.",
                ),
                io.Combo.Input(
                    "method",
                    options=[DDIM, EDIT_FRIENDLY, FIREFLOW, FORWARD],
                    default=DDIM,
                    advanced=True,
                    tooltip="ddim: no random noise; transformers (Flux, Qwen-Image, SD3.5 "
                    "...) are inverted by fireflow instead. edit-friendly ddpm: new "
                    "random noise at every step, kept so that the photo comes back "
                    "exactly (arXiv 2304.06140). fireflow: no random noise, second "
                    "order, one model call more (arXiv 2412.07517). forward noise: "
                    "adds one noise to the photo without running the model; for "
                    "turbo and lightning models of few steps, which cannot be "
                    "inverted.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Noise seed of edit-friendly ddpm and forward noise; ddim and "
                    "fireflow use no noise.",
                ),
                io.Boolean.Input(
                    "check",
                    default=True,
                    advanced=True,
                    tooltip="Samples back from the noise and reports how far the result is "
                    "from the photo. Doubles the time of this node. Forward noise "
                    "has nothing to check.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The SIGMAS that your sampler gets; they replace steps and scheduler.",
                ),
            ],
            outputs=[
                host.Inversion.Output(
                    display_name="inversion",
                    tooltip="The photo at every step, for Ref-UNet Feature Capture.",
                ),
                io.Latent.Output(
                    display_name="noise",
                    tooltip="The last step, for KSampler (Advanced) with add_noise "
                    "disabled. Not for flow models: at full noise their samplers "
                    "ignore the latent.",
                ),
            ],
            has_intermediate_output=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        latent: dict[str, Any],
        positive: host.Conditioning,
        steps: int,
        scheduler: str,
        method: str = DDIM,
        seed: int = 0,
        check: bool = True,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        noise = host.require_invertible(model, NODE)
        way = FIREFLOW if method == DDIM and not host.draws_by_unet(model) else method
        down, name = host.chosen_sigmas(model, steps, scheduler, sigmas, NODE)
        require_below_top(down.flip(0), noise, f"{NODE} ({name})")
        z0 = host.latent_in(model, latent["samples"], NODE)
        prompt = host.read_prompt(model, positive, "positive", NODE, len(z0))
        latents, maps, back = brought_to_noise(model, z0, down, prompt, way, seed, check, noise)
        trajectory = InversionTrajectory(
            down.flip(0), latents, way, prompt.text, host.model_key(model), name, maps, noise
        )
        report = f"{name}, {way}" + (f" (what {method} is on this model)" if way != method else "")
        report += "" if back is None else round_trip(z0, back)
        log.info("%s: %s", NODE, report)
        host.tell(cls, report)
        noised = latent | {"samples": host.latent_out(model, latents[-1])}
        return io.NodeOutput(trajectory, noised, ui=ui.PreviewText(report))


def brought_to_noise(
    model: Any,
    z0: Tensor,
    down: Tensor,
    prompt: ReferencePrompt,
    way: str,
    seed: int,
    check: bool,
    noise: Noise,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The photo z0 [b c y x] at every level of down [t+1], from the last to the first: latents
    [t+1 b c y x], the noise of each step where it is kept, and the photo sampled back if asked.
    """
    if way == FORWARD:
        return forward_noise(z0, down, seed, noise), None, None
    loop = (
        edit_friendly_loop(z0, down, seed, check, noise)
        if way == EDIT_FRIENDLY
        else ode_loop(z0, down, check, noise, way)
    )
    steps = len(down) - 1
    calls = steps + (way == FIREFLOW) + steps * check
    return host.reference_pass(model, z0.shape, down, prompt, None, loop, total=calls)


def round_trip(z0: Tensor, back: Tensor) -> str:
    """How well the photo came back, for the report."""
    # a photo of one colour has no range
    spread = (z0.max() - z0.min()).item() or z0.abs().max().item()
    return f": round trip {psnr(back, z0, spread):.1f} dB in latent space"


def forward_noise(z0: Tensor, down: Tensor, seed: int, noise: Noise) -> Tensor:
    """The photo under one noise at every level [t+1 b c y x]; the model is not asked."""
    return method.forward_noise(
        z0, down.flip(0), torch.Generator("cpu").manual_seed(seed), noise=noise
    )


def ode_loop(z0: Tensor, down: Tensor, check: bool, noise: Noise, way: str) -> method.Loop:
    """Invert along the flipped sigmas: by FireFlow, or with the noise read at each target's label;
    sample back if asked.
    """

    def loop(
        denoise: method.Denoiser, device: torch.device, progress: method.Progress
    ) -> tuple[Any, ...]:
        def step(i: int, total: int, x: Tensor, denoised: Tensor) -> None:
            progress(i, denoised, x)

        up, photo = down.flip(0), z0.to(device)
        if way == FIREFLOW:
            latents = method.fireflow_invert(denoise, photo, up, noise=noise, on_step=step)
        else:
            latents = method.ddim_invert(
                denoise, photo, up, label="target", noise=noise, on_step=step
            )
        calls = len(up) - 1 + (way == FIREFLOW)
        back = (
            method.ddim_sample(
                denoise, latents[-1], down, on_step=lambda i, *a: step(i + calls, *a)
            )
            if check
            else None
        )
        return latents.cpu(), None, None if back is None else back.cpu()

    return loop


def edit_friendly_loop(
    z0: Tensor, down: Tensor, seed: int, check: bool, noise: Noise
) -> method.Loop:
    """DDPM inversion with independent noise per step (method.md 3.5); the replay needs the model
    again.
    """

    def loop(
        denoise: method.Denoiser, device: torch.device, progress: method.Progress
    ) -> tuple[Any, ...]:
        def step(i: int, total: int, x: Tensor, denoised: Tensor) -> None:
            progress(i, denoised, x)

        generator = torch.Generator("cpu").manual_seed(seed)
        latents, maps = method.edit_friendly_invert(
            denoise, z0.to(device), down.flip(0), generator, noise=noise, on_step=step
        )
        back = None
        if check:
            back = method.edit_friendly_replay(
                denoise,
                latents[-1],
                down.flip(0),
                maps,
                noise=noise,
                on_step=lambda i, *a: step(i + len(down) - 1, *a),
            ).cpu()
        return latents.cpu(), maps.cpu(), back

    return loop
