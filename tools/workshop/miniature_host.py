"""The miniature in the host of this process, for measurements that run nodes without a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from boot import boot

CHECKPOINT, ENCODER = "kindred_miniature.safetensors", "kindred_miniature_concept.safetensors"


class Studio:
    """The miniature in the host of this process, driven through the very nodes that a workflow runs."""

    size, batch = 128, 4  # of its pictures, and how many of one subject are sampled at once
    scheduler = "ddim_uniform"
    first = "time_embed"  # a part of its network that runs once in every evaluation

    def __init__(self, host: Path, steps: int, cfg: float, cpu: bool = True) -> None:
        import torch

        self.torch, self.nodes, self.steps, self.cfg = torch, boot(host, cpu), steps, cfg
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)
        with torch.inference_mode():
            self.model, self.clip, self.vae = self.load()

    def load(self) -> tuple[Any, Any, Any]:
        """MODEL, CLIP, VAE."""
        return self.nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT)[:3]

    def run(self, node: str, **inputs: Any) -> tuple[Any, ...]:
        with self.torch.inference_mode():
            return self.nodes.NODE_CLASS_MAPPINGS[node].execute(**inputs).result

    @cached_property
    def encoder(self) -> Any:
        return self.run("KindredConceptEncoderLoad", file=ENCODER)[0]

    def freeu(self, model: Any, **scales: float) -> Any:
        """The MODEL behind the host's own FreeU node, which no run without a server has among its nodes."""
        from comfy_extras.nodes_freelunch import FreeU

        return FreeU.execute(model, **scales)[0]

    def encode(self, image: Any) -> dict[str, Any]:
        """IMAGE -> LATENT."""
        with self.torch.inference_mode():
            return {"samples": self.vae.encode(image)}

    def picture(self, image: Any) -> Any:
        """uint8 [y x 3] -> IMAGE."""
        return self.torch.tensor(image).float().div(255)[None]

    def decode(self, samples: Any) -> Any:
        with self.torch.inference_mode():
            return self.vae.decode(samples).clamp(0, 1)

    def autoencode(self, images: Any) -> Any:
        with self.torch.inference_mode():
            return self.decode(self.vae.encode(images))

    def prompts(self, lines: Sequence[str], subject: str = "") -> Any:
        return self.run(
            "KindredSubjectPrompts",
            clip=self.clip,
            prompts="\n".join(lines) or " ",
            subject=subject,
        )[0]

    def empty(self) -> Any:
        with self.torch.inference_mode():
            return self.nodes.CLIPTextEncode().encode(self.clip, "")[0]

    def blank(self, count: int) -> Any:
        """The samples [b c y x] of `count` empty latents."""
        side, channels = self.size // 8, self.model.model.latent_format.latent_channels
        return self.torch.zeros(count, channels, side, side)

    def sample(
        self,
        model: Any,
        positive: Any,
        count: int,
        seed: int,
        cfg: float | None = None,
        latent: dict[str, Any] | None = None,
        denoise: float = 1.0,
    ) -> Any:
        """IMAGE [b y x 3] of `count` pictures from one latent batch, which is empty unless given.

        denoise: the share of the noise levels that a given one begins at, as KSampler has it.
        """
        latent = latent or {"samples": self.blank(count)}
        cfg = self.cfg if cfg is None else cfg
        with self.torch.inference_mode():
            samples = self.nodes.common_ksampler(
                model,
                seed,
                self.steps,
                cfg,
                "euler",
                self.scheduler,
                positive,
                self.empty(),
                latent,
                denoise=denoise,
            )[0]
        return self.decode(samples["samples"])

    @contextmanager
    def counted(self) -> Iterator[list[Any]]:
        """A list that grows by one with every evaluation of the network, also one that a wrapper makes inside another."""
        calls: list[Any] = []
        part = getattr(self.model.model.diffusion_model, self.first)
        hook = part.register_forward_hook(lambda *_: calls.append(None))
        try:
            yield calls
        finally:
            hook.remove()


class FlowStudio(Studio):
    """The same of the flow miniature, a transformer, at the state of training that is shipped."""

    scheduler = "simple"
    first = "img_in"

    def load(self) -> tuple[Any, Any, Any]:
        """MODEL, CLIP, VAE, by the host's own loader; the file lies in no folder that it lists."""
        from comfy.sd import load_checkpoint_guess_config
        from kindred.miniature.pack import FLOW_CHECKPOINT

        return load_checkpoint_guess_config(str(FLOW_CHECKPOINT))[:3]
