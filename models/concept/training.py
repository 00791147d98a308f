"""Trains a concept encoder by reconstruction, eq. (10) of paper A (arXiv 2403.11284, section 2.3): one loop for every front end.

Everything random follows from (seed, step): a resumed run is the run that was not stopped, and p processes with batch b each
are one process with batch p * b. The UNet is frozen; the encoder's tower, MLP and projections learn.
Axes: b pictures of a step, c y x latents, n examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ..attention.attend import ReferenceTokens
from ..files import of_system, unread, whole
from ..identity import differences, read_key
from ..injection import AttnCall, BlockSite, Merge, References, Role
from .encoder import ConceptEncoder, KeysValues


@dataclass(frozen=True)
class TrainSettings:
    """The paper's run is batch 2 (it does not say whether on each of its 4 GPUs), rate 1e-5, 100,000 steps, tower and projections
    updated (section 3.1)."""

    steps: int = 100_000
    batch: int = 2  # per process and micro-step
    accumulate: int = 1  # micro-steps per step
    rate: float = 1e-5
    tower_rate: float | None = None  # None: `rate`; 0 leaves the tower as it came
    schedule: str = "constant"  # or cosine, down to 2 % of the rate
    warm_up: int = 0  # steps of rising rate
    weight_warm_up: int = (
        0  # steps over which W_C rises from 1 % to 1 (method.md 2.3: null columns absorb mass)
    )
    drop_text: float = (
        0.05  # arXiv 2308.06721's dropout, so that guidance has something to compare with
    )
    drop_image: float = 0.05
    drop_both: float = 0.05
    average: float = 0.9999  # decay of the averaged weights; 0 keeps none
    clip: float = 1.0  # greatest norm of a step's gradient
    weight_decay: float = 0.01
    noise_from: float = 0.0  # noise levels are drawn from this share of the schedule up: what a subject is, is decided where it is noisy
    weighting: str = "plain"  # eq. (10) as it is; velocity: the same error as one of v, which weighs the noisy levels up (arXiv 2202.00512)
    min_snr: float | None = None  # gamma of arXiv 2303.09556, on top; None for none
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError names the setting, its value and what it may be."""
        for name, fits, remedy in (
            ("steps", self.steps >= 1, "1 or more"),
            ("batch", self.batch >= 1, "1 or more"),
            ("accumulate", self.accumulate >= 1, "1 or more"),
            ("warm_up", self.warm_up >= 0, "0 or more"),
            ("weight_warm_up", self.weight_warm_up >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("rate", 0 < self.rate < 1, "above 0 and below 1, for instance 1e-5"),
            ("average", 0 <= self.average < 1, "0 to 0.99999"),
            (
                "tower_rate",
                self.tower_rate is None or 0 <= self.tower_rate < 1,
                "0 (frozen tower) to 1",
            ),
            ("schedule", self.schedule in ("constant", "cosine"), "constant or cosine"),
            ("noise_from", 0 <= self.noise_from < 1, "0 (every level) to below 1"),
            ("weighting", self.weighting in ("plain", "velocity"), "plain or velocity"),
            (
                "drop_text",
                min(self.drop_text, self.drop_image, self.drop_both) >= 0
                and self.drop_text + self.drop_image + self.drop_both < 1,
                "0 or more, and below 1 together with drop_image and drop_both",
            ),
            ("clip", self.clip > 0, "above 0"),
            ("min_snr", self.min_snr is None or self.min_snr > 0, "above 0, or none"),
        ):
            if not fits:
                raise ValueError(f"training: {name} is {getattr(self, name)}; it must be {remedy}.")

    def rate_at(self, step: int) -> float:
        """Share of the rate at a step."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warm_up) / max(self.steps - self.warm_up, 1)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def weight_at(self, step: int) -> float:
        """W_C at a step."""
        return 1.0 if step >= self.weight_warm_up else 0.01 ** (1 - step / self.weight_warm_up)


@dataclass(frozen=True)
class Learning:
    """The concept tokens of one training step, an ActiveInjection: every row reads them as a sampler's cond rows do."""

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
    """Recompute in the backward pass; the host moves its block counter inside the options, so they are kept as they are now."""

    def again(*args: Any, **kwargs: Any) -> Any:
        args = tuple(dict(a) if isinstance(a, dict) else a for a in args)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return again


class Denoiser(Protocol):
    """The frozen UNet, in the words of the sampler."""

    sigmas: Tensor  # ascending noise levels [T]
    velocity: bool  # the network predicts v and not eps

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        prompts: Sequence[str],
        keys_values: KeysValues,
        weight: float,
    ) -> Tensor:
        """x [b c y x] = clean + sigma [b] * noise -> denoised [b c y x], differentiable in keys_values [b m c']."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The training pictures: latents [n c y x] in model scale, pixels uint8 [n s s 3] for the tower, a prompt each.

    Pictures of one subject share a number in `subjects`: then the tower sees another one of them than the UNet has to draw, so
    that only the subject carries over; a picture alone is its own partner, which is the paper's reconstruction.
    """

    latents: Tensor
    pixels: Tensor
    prompts: Sequence[str]
    subjects: Sequence[int]
    groups: Mapping[int, list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        groups: dict[int, list[int]] = {}
        for i, subject in enumerate(self.subjects):
            groups.setdefault(subject, []).append(i)
        object.__setattr__(self, "groups", groups)

    def __len__(self) -> int:
        return len(self.prompts)

    def partner(self, index: int, draw: float) -> int:
        """The picture that the tower sees beside picture `index`; draw in [0, 1)."""
        others = [i for i in self.groups[self.subjects[index]] if i != index]
        return others[int(draw * len(others))] if others else index


class Engine(Protocol):
    """What one process has of the whole run: accelerate's in the program, plain torch's in the node."""

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


@dataclass(frozen=True)
class Draw:
    """All that is random in one micro-step, for this process's b pictures."""

    index: list[int]  # pictures to draw
    partner: list[int]  # pictures the tower sees
    level: Tensor  # [b] into the denoiser's sigmas, uniform, one of b equal strata each
    noise: Tensor  # [b c y x]
    no_text: list[bool]
    no_image: Tensor  # bool [b]


def draw(
    settings: TrainSettings,
    examples: Examples,
    levels: int,
    micro_step: int,
    rank: int = 0,
    processes: int = 1,
) -> Draw:
    """This process's share of the whole step: p processes with batch b are one with p * b."""
    total = settings.batch * processes
    generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + micro_step) % (1 << 63))
    index = torch.randint(len(examples), (total,), generator=generator).tolist()
    chosen, dropped, offset = torch.rand(3, total, generator=generator)
    share = (torch.randperm(total, generator=generator) + offset) / total
    level = (
        ((settings.noise_from + (1 - settings.noise_from) * share) * levels)
        .long()
        .clamp(max=levels - 1)
    )
    noise = torch.randn(total, *examples.latents.shape[1:], generator=generator)
    own = slice(rank * settings.batch, (rank + 1) * settings.batch)
    text, image = settings.drop_text, settings.drop_text + settings.drop_image
    both = image + settings.drop_both
    dropped = dropped[own]
    partners = [examples.partner(i, float(d)) for i, d in zip(index, chosen)]
    return Draw(
        index[own],
        partners[own],
        level[own],
        noise[own],
        [bool(d < text or image <= d < both) for d in dropped],
        (dropped >= text) & (dropped < both),
    )


class Trainer:
    """The loop, one step at a time. `encoder` is changed in place; `averaged` gives the one to keep."""

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
        self.encoder, self.denoise, self.examples, self.settings = (
            encoder,
            denoise,
            examples,
            settings,
        )
        self.engine = engine or OneProcess()
        encoder.to(self.engine.device, torch.float32).train().requires_grad_(True)
        tower = [] if encoder.tower is None else list(encoder.tower.parameters())
        if (
            encoder.tower is not None
            and self.engine.device.type == "cpu"
            and hasattr(encoder.tower.model, "set_attn_implementation")
        ):
            encoder.tower.model.set_attn_implementation(
                "eager"
            )  # faster than the fused kernel in a CPU's backward pass
        tower_rate = settings.rate if settings.tower_rate is None else settings.tower_rate
        if tower_rate == 0 and tower:
            encoder.tower.requires_grad_(False)
            tower = []
        known = {id(p) for p in tower}
        rest = [p for p in encoder.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": rest, "rate": settings.rate}] + (
            [{"params": tower, "rate": tower_rate}] if tower else []
        )
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
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

    def loss(self, d: Draw, weight: float = 1.0) -> Tensor:
        """Eq. (10) for one draw: the squared error of eps (or v), mean over the pictures -> []."""
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
                clean + wide * d.noise.to(device), sigma, prompts, keys_values, weight
            ).float()
        squared = (denoised - clean).square().mean((1, 2, 3)) / sigma.square()  # of eps
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
        """One optimizer step; returns its loss, mean over processes. FloatingPointError, with nothing changed, when it is not finite."""
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
            loss = self.loss(d, s.weight_at(self.step_number)) / s.accumulate
            engine.backward(loss)
            total += loss.detach()
        value = float(engine.mean(total))
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), s.clip)
        if not math.isfinite(value) or not torch.isfinite(norm):
            raise FloatingPointError(
                f"training: the loss of step {self.step_number + 1} is {value} and its gradient {float(norm)}. "
                f"Lower the learning rate (now {s.rate}) or use no mixed precision; that is another run, so give it "
                "another folder or name, and start it from the encoder saved last if you like."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * s.rate_at(self.step_number)
        self.optimizer.step()
        self.step_number += 1
        self.losses.append(value)
        if self.average is not None:
            decay = min(
                s.average, self.step_number / (9 + self.step_number)
            )  # early averages forget the start
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
        """The averaged encoder, then the state, each whole or as it was: a state is never ahead. OSError where the disk says no."""
        self.kept(**facts).save(encoder)
        told = self.state(**made_with)
        held = [told["encoder"], told["average"] or {}, *told["optimizer"]["state"].values()]
        with whole(
            state, [t for part in held for t in part.values() if isinstance(t, Tensor)]
        ) as partial:
            torch.save(told, partial)

    def resume(self, state: Mapping[str, Any], **made_with: Any) -> None:
        """Continue from `state`; steps may differ under a constant rate. ValueError names a setting that would make it another run."""
        self.refuse(state, self.unlike(state))
        was = {
            **asdict(TrainSettings()),
            **state["settings"],
            **state.get("made_with", {}),
        }  # a setting it does not know came later
        now = {**asdict(self.settings), **{k: v for k, v in made_with.items() if k in was}}
        free = (
            () if self.settings.schedule == "cosine" else ("steps",)
        )  # a cosine ends where the run does
        file = f" {state['file']}" if "file" in state else ""
        if "base" in now:  # the same weights may be loaded in another precision
            was["base"], now["base"] = read_key(was["base"]), read_key(now["base"])
        differ = [
            k
            for k, v in now.items()
            if k not in free and (differences(was[k], v) != () if k == "base" else was.get(k) != v)
        ]
        if differ:
            raise ValueError(
                f"training: the checkpoint{file} was made with "
                + ", ".join(f"{k} {was.get(k)!s:.80}" for k in differ)
                + ", but "
                + ", ".join(f"{k} {now[k]}" for k in differ)
                + " was asked for. Give the same settings, "
                "or another output folder or name."
            )
        self.refuse(state, self.unlike_learned(state))
        self.encoder.load_state_dict(state["encoder"])
        groups = self.optimizer.state_dict()[
            "param_groups"
        ]  # they follow from the settings, which are the same
        self.optimizer.load_state_dict(
            {"state": state["optimizer"]["state"], "param_groups": groups}
        )
        if self.average is not None:
            for name, value in state["average"].items():
                self.average[name].copy_(value)
        self.step_number, self.losses = state["step"], list(state["losses"])

    @staticmethod
    def refuse(state: Mapping[str, Any], fault: str) -> None:
        if fault:
            raise ValueError(
                f"training: {state.get('file', 'the state')} is damaged, or of another encoder: {fault}. Remove it to begin "
                "again; the encoder beside it is a file of its own."
            )

    def unlike(self, state: Mapping[str, Any]) -> str:
        """What of a state is none at all, before its settings are compared; "" where there is nothing."""
        for name, kind in (
            ("settings", Mapping),
            ("encoder", Mapping),
            ("optimizer", Mapping),
            ("losses", list),
            ("step", int),
        ):
            if not isinstance(state.get(name), kind):
                return f"its {name} is {state.get(name)!r:.40}"
        if not isinstance(state.get("made_with", {}), Mapping) or not isinstance(
            state["optimizer"].get("state"), Mapping
        ):
            return "it does not say how it was made, or how far"
        return ""

    def unlike_learned(self, state: Mapping[str, Any]) -> str:
        """What of a state does not fit this encoder's tensors, or is not finite; "" where everything does."""
        step, losses = state["step"], state["losses"]
        if (
            step < 0
            or len(losses) != step
            or not all(type(x) is float and math.isfinite(x) for x in losses)
        ):
            return f"it is of step {step} and tells {len(losses)} losses"
        fault = unlike_tensors("encoder", state["encoder"], self.encoder.state_dict())
        if self.average is not None:
            fault = fault or unlike_tensors("average", state.get("average"), self.average)
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = state["optimizer"]["state"]
        if not fault and step and moments.keys() != set(range(len(learning))):
            return f"it has moments of {len(moments)} tensors, and {len(learning)} learn"
        for i, own in moments.items() if not fault else ():
            fault = (
                fault
                or unlike_tensors(
                    f"moments of tensor {i}",
                    own,
                    {"step": torch.zeros(()), "exp_avg": learning[i], "exp_avg_sq": learning[i]},
                )
                or (
                    "negative squares"
                    if (own["exp_avg_sq"] < 0).any() or own["step"] != step
                    else ""
                )
            )
        return fault


def unlike_tensors(what: str, given: Any, own: Mapping[str, Tensor]) -> str:
    """How tensors of a file differ from those they are to replace, in names, shapes or finiteness; "" where they do not."""
    if not isinstance(given, Mapping) or given.keys() != own.keys():
        return f"its {what} has other names"
    for name, value in own.items():
        if not isinstance(given[name], Tensor) or given[name].shape != value.shape:
            return f"{name} of its {what} is {list(getattr(given[name], 'shape', ()))}, but {list(value.shape)} is needed"
        if value.is_floating_point() and not (
            given[name].is_floating_point() and torch.isfinite(given[name]).all()
        ):
            return f"{name} of its {what} holds NaN or infinite values"
    return ""


def read_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What Trainer.save wrote, and its file's name; nothing in it is executed.

    ValueError for a torn or foreign one, OSError where the system does not give it.
    """
    try:
        path.open("rb").close()
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle fails in every way there is
        if of_system(error):
            raise unread(path, error) from error
        raise ValueError(
            f"training: {path.name} is torn or no state of a training ({(str(error) or repr(error)).splitlines()[0]:.200}). "
            "Remove it to begin again; the encoder beside it is a file of its own."
        ) from error
    return {**state, "file": path.name}
