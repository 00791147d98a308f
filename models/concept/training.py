"""Trains a concept encoder by reconstruction, eq. (10) of paper A (arXiv 2403.11284, section 2.3):
one loop for every front end.

Everything random follows from (seed, step): a resumed run is the run that was not stopped, and p
processes with batch b each are one process with batch p * b. The UNet is frozen; the encoder's
tower, MLP and projections learn.
Axes: b pictures of a step, c y x latents, n examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ..attention.parts import Merge, References
from ..attention.references import ReferenceTokens
from ..files import whole
from ..network.call import AttnCall, Role
from ..network.sites import BlockSite
from ..noise.path import Diffusion, Flow
from .draws import Draw, Examples, draw
from .encoder import ConceptEncoder, KeysValues
from .settings import TrainSettings
from .training_state import (
    check_settings,
    refuse,
    unlike_a_state,
    unlike_losses,
    unlike_moments,
    unlike_tensors,
)


@dataclass(frozen=True)
class Learning:
    """The concept tokens of one training step, an ActiveInjection: every row reads them as a
    sampler's cond rows do.
    """

    keys_values: KeysValues
    weight: float
    merge: Merge
    node: ClassVar[str] = "Concept Encoder Train"
    wants: ClassVar[bool] = True

    def begin_step(self, sigma: float) -> None: ...

    def concerns(self, call: AttnCall) -> bool:
        return call.cross

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        if not self.concerns(call):
            return []
        k, v = self.keys_values[call.block]
        return [
            References(
                {Role.COND: ReferenceTokens(k.to(q), v.to(q), self.weight)}, merge=self.merge
            )
        ]


def checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Recompute in the backward pass; the host moves its block counter inside the options, so they
    are kept as they are now.
    """

    def again(*args: Any, **kwargs: Any) -> Any:
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


class Denoiser(Protocol):
    """The frozen network, in the words of the sampler."""

    sigmas: Tensor  # ascending noise levels [T]
    velocity: bool  # the network predicts v and not eps
    noise: Diffusion | Flow  # how it mixes a picture with noise

    def learning(self) -> AbstractContextManager[Any]:
        """Around a forward pass and the backward pass of its loss."""

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[str],
        keys_values: KeysValues,
        weight: float,
    ) -> Tensor:
        """x [b c y x], mixed at sigma [b] -> denoised [b c y x], differentiable in keys_values
        [b m c'].
        """


class Engine(Protocol):
    """What one process has of the whole run: accelerate's in the program, plain torch's in the
    node.
    """

    device: torch.device
    rank: int
    processes: int

    def prepare(self, module: nn.Module) -> Callable[[Tensor], KeysValues]: ...
    def autocast(self) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def mean(self, value: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class OneProcess:
    """An Engine without accelerate."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None  # of the autocast; None computes in float32
    rank: int = 0
    processes: int = 1

    def prepare(self, module: nn.Module) -> Callable[[Tensor], KeysValues]:
        return module

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def mean(self, value: Tensor) -> Tensor:
        return value


def check_weighting(denoise: Denoiser, settings: TrainSettings) -> None:
    """ValueError where the loss is to be weighed by what a flow does not have."""
    if isinstance(denoise.noise, Flow) and (
        settings.weighting != "plain" or settings.min_snr is not None
    ):
        raise ValueError(
            f"training: weighting is {settings.weighting} and min_snr {settings.min_snr}, but "
            "this model is a flow, whose plain loss is that of the velocity already. Set "
            "weighting to plain and leave min_snr out."
        )


class Trainer:
    """The loop, one step at a time. `encoder` is changed in place; `averaged` gives the one to
    keep.
    """

    def __init__(
        self,
        encoder: ConceptEncoder,
        denoise: Denoiser,
        examples: Examples,
        settings: TrainSettings,
        engine: Engine | None = None,
    ) -> None:
        if not len(examples):
            raise ValueError("training: there are no pictures.")
        check_weighting(denoise, settings)
        self.encoder, self.denoise, self.examples, self.settings = (
            encoder,
            denoise,
            examples,
            settings,
        )
        self.engine = engine or OneProcess()
        encoder.to(self.engine.device, torch.float32).train().requires_grad_(True)
        self.optimizer = torch.optim.AdamW(
            self._groups(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        self.trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        self.average = (
            {name: p.detach().clone() for name, p in self.trained.items()}
            if settings.average
            else None
        )
        self.step_number, self.losses = 0, []
        self.forward = self.engine.prepare(encoder)
        pixels = encoder.config.preprocessing
        self.mean, self.std = (
            torch.tensor(v, device=self.engine.device)[:, None, None]
            for v in (pixels.mean, pixels.std)
        )

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: the tower may have a rate of its own, and with a rate of 0 it
        does not learn.
        """
        encoder, settings, tower = self.encoder, self.settings, []
        if encoder.tower is not None:
            tower = list(encoder.tower.parameters())
            on_cpu = self.engine.device.type == "cpu"
            if on_cpu and hasattr(encoder.tower.model, "set_attn_implementation"):
                # faster than the fused kernel in a CPU's backward pass
                encoder.tower.model.set_attn_implementation("eager")
        tower_rate = settings.rate if settings.tower_rate is None else settings.tower_rate
        if tower_rate == 0 and tower:
            encoder.tower.requires_grad_(False)
            tower = []
        known = {id(p) for p in tower}
        rest = [p for p in encoder.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": rest, "rate": settings.rate}]
        return groups + ([{"params": tower, "rate": tower_rate}] if tower else [])

    def loss(self, d: Draw, weight: float = 1.0) -> Tensor:
        """Eq. (10) for one draw: the squared error of eps (or v; of a flow that of its velocity),
        mean over the pictures -> [].
        """
        device, examples = self.engine.device, self.examples
        clean = examples.latents[d.index].detach().to(device, torch.float32)
        pixels = (
            examples.pixels[d.partner].to(device).movedim(-1, 1).float() / 255 - self.mean
        ) / self.std
        pixels = torch.where(d.no_image.to(device)[:, None, None, None], 0.0, pixels)
        sigma = self.denoise.sigmas.to(device)[d.level.to(device)].float()
        wide = sigma[:, None, None, None]
        prompts = ["" if none else examples.prompts[i] for i, none in zip(d.index, d.no_text)]
        with self.engine.autocast():
            keys_values = self.forward(pixels)
            denoised = self.denoise(
                self.denoise.noise.mix(clean, d.noise.to(device), wide),
                sigma,
                prompts,
                keys_values,
                weight,
            ).float()
        # of eps, or of a flow's velocity: (x - denoised) / sigma less (x - clean) / sigma
        squared = (denoised - clean).square().mean((1, 2, 3)) / sigma.square()
        velocity = self.denoise.velocity or self.settings.weighting == "velocity"
        if velocity:
            squared = squared * (1 + sigma.square())
        if self.settings.min_snr is not None:
            snr = sigma**-2
            squared = (
                squared * snr.clamp(max=self.settings.min_snr) / (snr + (1 if velocity else 0))
            )
        return squared.mean()

    def step(self) -> float:
        """One optimizer step; returns its loss, mean over processes. FloatingPointError, with
        nothing changed, when it is not finite.
        """
        s, engine = self.settings, self.engine
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=engine.device)
        for micro in range(s.accumulate):
            d = draw(
                s,
                self.examples,
                len(self.denoise.sigmas),
                self.step_number * s.accumulate + micro,
                engine.rank,
                engine.processes,
            )
            with self.denoise.learning():
                loss = self.loss(d, s.weight_at(self.step_number)) / s.accumulate
                engine.backward(loss)
            total += loss.detach()
        value = float(engine.mean(total))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), s.clip)
        if not math.isfinite(value) or not torch.isfinite(norm):
            raise FloatingPointError(
                f"training: the loss of step {self.step_number + 1} is {value} and its gradient "
                f"{float(norm)}. "
                f"Lower the learning rate (now {s.rate}) or use no mixed precision; that is "
                f"another run, so give it "
                "another folder or name, and start it from the encoder saved last if you like."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * s.rate_at(self.step_number)
        self.optimizer.step()
        self.step_number += 1
        self.losses.append(value)
        if self.average is not None:
            # early averages forget the start
            decay = min(s.average, self.step_number / (9 + self.step_number))
            for name, p in self.trained.items():
                self.average[name].lerp_(p.detach(), 1 - decay)
        return value

    def averaged(self) -> dict[str, Tensor]:
        """The encoder's tensors as they should be kept: averaged where they learn."""
        return {**self.encoder.state_dict(), **(self.average or {})}

    def kept(self, **facts: Any) -> ConceptEncoder:
        """The averaged encoder by itself, on the CPU, with what is to be known of its training."""
        config = self.encoder.config
        with torch.device(
            "meta"
        ):  # weights of its own would be drawn from the global random state, and thrown away
            kept = ConceptEncoder(
                replace(config, training={**config.training, "steps": self.step_number, **facts})
            )
        kept.load_state_dict(
            {name: value.detach().to("cpu", copy=True) for name, value in self.averaged().items()},
            assign=True,
        )
        return kept

    def state(self, **made_with: Any) -> dict[str, Any]:
        """Everything a resumed run needs; made_with: what else has to be the same then."""
        return {
            "encoder": self.encoder.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step_number,
            "losses": list(self.losses),
            "settings": asdict(self.settings),
            "made_with": made_with,
        }

    def save(
        self, encoder: Path, state: Path, made_with: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """The averaged encoder, then the state, each whole or as it was: a state is never ahead.
        OSError where the disk says no.
        """
        self.kept(**facts).save(encoder)
        content = self.state(**made_with)
        held = [
            content["encoder"],
            content["average"] or {},
            *content["optimizer"]["state"].values(),
        ]
        with whole(
            state, [t for part in held for t in part.values() if isinstance(t, Tensor)]
        ) as partial:
            torch.save(content, partial)

    def resume(self, state: Mapping[str, Any], **made_with: Any) -> None:
        """Continue from `state`; steps may differ under a constant rate. ValueError names a setting
        that would make it another run.
        """
        refuse(state, unlike_a_state(state))
        check_settings(state, self.settings, made_with)
        refuse(state, self.unlike_learned(state))
        self.encoder.load_state_dict(state["encoder"])
        # the groups follow from the settings, which are the same
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": state["optimizer"]["state"], "param_groups": groups}
        )
        if self.average is not None:
            for name, value in state["average"].items():
                self.average[name].copy_(value)
        self.step_number, self.losses = state["step"], list(state["losses"])

    def unlike_learned(self, state: Mapping[str, Any]) -> str:
        """What of a state does not fit this encoder's tensors, or is not finite; "" where
        everything does.
        """
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        return (
            unlike_losses(state)
            or unlike_tensors("encoder", state["encoder"], self.encoder.state_dict())
            or self.average is not None
            and unlike_tensors("average", state.get("average"), self.average)
            or unlike_moments(state, learning)
        )
