"""Writes the trained parts as the files the pack ships: one checkpoint for the host, one reader, both half precision."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .autoencoder import Autoencoder
from .control import WEIGHTS as CONTROL
from .control import packed
from .layout import CONTEXT, FLOW
from .reader import WEIGHTS as READER
from .training import load, save
from .world import world_hash

log = logging.getLogger(__name__)
VERSION = "1"
CHECKPOINT = READER.parent / "checkpoints" / "kindred_miniature.safetensors"
FLOW_CHECKPOINT = READER.parent / "flow" / "kindred_flow_miniature.safetensors"
FLOW_AUTOENCODER = READER.parent / "kindred_flow_autoencoder.safetensors"  # alone
TABLE = 49_408  # rows of the standard token table


def load_autoencoder(path: Path = CHECKPOINT) -> Autoencoder:
    """The autoencoder of a packed checkpoint in float32; its latents are the raw ones, not yet divided by their spread."""
    from safetensors.torch import load_file

    prefix = "first_stage_model."
    weights = {
        name.removeprefix(prefix): value.float()
        for name, value in load_file(path).items()
        if name.startswith(prefix + "taesd")
    }
    model = Autoencoder(weights["taesd_decoder.1.weight"].shape[1])
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def checkpoint_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The trainings' state files in `folder` -> weights under Stable Diffusion 1.5's key names, and the metadata."""
    device = torch.device("cpu")
    unet, autoencoder = load(folder / "unet.pt", device), load(folder / "autoencoder.pt", device)
    tuned = load(folder / "decoder.pt", device)
    weights: dict[str, Tensor] = {}
    for name, value in unet["average"].items():
        part, _, rest = name.partition(".")
        if part == "unet":
            weights[f"model.diffusion_model.{rest}"] = value
        elif not rest.endswith("position_ids"):
            weights[
                f"cond_stage_model.transformer.text_model.{rest.removeprefix('text_model.')}"
            ] = value
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    table = torch.zeros(TABLE, CONTEXT)  # words it never saw mean nothing to it
    table[unet["tokens"]] = weights[key]
    weights[key] = table
    for name, value in (tuned or autoencoder)["model"].items():
        weights[f"first_stage_model.{name}"] = value
    weights = {name: value.half().contiguous() for name, value in weights.items()}
    weights["first_stage_model.vae_scale"] = torch.tensor(float(unet["spread"]))
    weights["first_stage_model.vae_shift"] = torch.tensor(0.0)
    eps, mask = unet["losses"]
    metadata = {
        "kindred.miniature": VERSION,
        "kindred.world": world_hash(),
        "kindred.unet_steps": str(unet["step"]),
        "kindred.autoencoder_steps": str(autoencoder["step"]),
        "kindred.decoder_steps": str(tuned["step"] if tuned else 0),
        "kindred.seed": str(unet.get("seed", 1)),
        "kindred.loss_eps": f"{eps:.4f}",
        "kindred.loss_mask": f"{mask:.4f}",
    }
    return weights, metadata


def pack(folder: Path) -> None:
    """Writes into miniature/weights whatever `folder` holds: the checkpoint if the UNet has begun, the reader if it has."""
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    if (folder / "unet.pt").exists():
        weights, metadata = checkpoint_weights(folder)
        save_file(weights, CHECKPOINT, metadata)
        log.info("%s %.2f MiB %s", CHECKPOINT.name, CHECKPOINT.stat().st_size / 2**20, metadata)
    pack_reader(folder)
    pack_flow(folder)
    pack_control(folder)


def pack_reader(folder: Path) -> None:
    """Writes the reader if its training has begun in `folder`, and its head for one whole subject if that one's has.

    What the folder does not have of them stays as it is shipped, to the bit.
    """
    from safetensors.torch import load_file

    states = {
        name: load(folder / f"{name}.pt", torch.device("cpu")) for name in ("reader", "whole")
    }
    if not any(states.values()):
        return
    weights, metadata = (load_file(READER), _facts(READER)) if READER.exists() else ({}, {})
    metadata |= {"kindred.reader": VERSION, "kindred.world": world_hash()}
    for (name, state), prefix, steps in zip(
        states.items(), ("", "whole."), ("kindred.steps", "kindred.whole_steps"), strict=True
    ):
        if state is not None:
            weights |= {f"{prefix}{n}": v.half().contiguous() for n, v in state["model"].items()}
            metadata[steps] = str(state["step"])
    save_file(weights, READER, metadata)
    log.info("%s %.2f MiB %s", READER.name, READER.stat().st_size / 2**20, metadata)


def pack_flow(folder: Path) -> None:
    """Writes the flow miniature's autoencoder if its training has begun in `folder`, and its checkpoint if the transformer's has."""
    if not (folder / f"{FLOW}autoencoder.pt").exists():
        return
    weights, metadata = flow_weights(folder)
    FLOW_AUTOENCODER.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, FLOW_AUTOENCODER, metadata)
    log.info("%s %.2f MiB", FLOW_AUTOENCODER.name, FLOW_AUTOENCODER.stat().st_size / 2**20)
    if (folder / f"{FLOW}transformer.pt").exists():
        weights, metadata = flow_checkpoint_weights(folder)
        save_file(weights, FLOW_CHECKPOINT, metadata)
        log.info(
            "%s %.2f MiB %s", FLOW_CHECKPOINT.name, FLOW_CHECKPOINT.stat().st_size / 2**20, metadata
        )


def flow_checkpoint_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Transformer (averaged), autoencoder and the UNet miniature's text encoder in half precision, and the metadata.

    The host projects pooled text; the training pooled it as it was, so the projection is the identity.
    """
    from safetensors.torch import load_file

    state = load(folder / f"{FLOW}transformer.pt", torch.device("cpu"))
    autoencoder, metadata = flow_weights(folder)
    text = "cond_stage_model.transformer."
    weights = {
        f"model.diffusion_model.{name}": value.half() for name, value in state["average"].items()
    }
    weights |= {
        name: value for name, value in load_file(CHECKPOINT).items() if name.startswith(text)
    }
    weights[f"{text}text_projection.weight"] = torch.eye(CONTEXT).half()
    weights |= {f"first_stage_model.{name}": value for name, value in autoencoder.items()}
    weights["first_stage_model.vae_scale"] = torch.tensor(float(state["spread"]))
    metadata |= {
        "kindred.flow_steps": str(state["step"]),
        "kindred.seed": str(state["seed"]),
        "kindred.velocity_loss": f"{state['loss']:.4f}",
    }
    return {name: value.contiguous() for name, value in weights.items()}, metadata


def flow_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The flow miniature's autoencoder in half precision, its decoder as it was tuned last, and the metadata."""
    state, tuned = (
        load(folder / f"{FLOW}{part}.pt", torch.device("cpu"))
        for part in ("autoencoder", "decoder")
    )
    weights = {name: value.half().contiguous() for name, value in (tuned or state)["model"].items()}
    metadata = {
        "kindred.flow": VERSION,
        "kindred.world": world_hash(),
        "kindred.autoencoder_steps": str(state["step"]),
        "kindred.decoder_steps": str(tuned["step"] if tuned else 0),
    }
    return weights | {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}, metadata


def flow_autoencoder() -> dict[str, Tensor]:
    """The shipped autoencoder of the flow miniature in float32."""
    from safetensors.torch import load_file

    return {
        name: value.float()
        for name, value in load_file(FLOW_AUTOENCODER).items()
        if name.startswith("taesd")
    }


def begin_flow(folder: Path) -> None:
    """A work folder goes on from what is shipped: every machine then trains on the same latents, and no step is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{FLOW}autoencoder.pt"
    if not path.exists() and FLOW_AUTOENCODER.exists():
        steps = _facts(FLOW_AUTOENCODER)["kindred.autoencoder_steps"]
        save(path, {"model": flow_autoencoder(), "step": int(steps)})
    path = folder / f"{FLOW}transformer.pt"
    if not path.exists() and FLOW_CHECKPOINT.exists():
        save(path, shipped_flow())


def shipped_flow() -> dict:
    """The shipped transformer as a state of its training, without its optimizers'."""
    from safetensors.torch import load_file

    weights, facts, prefix = (
        load_file(FLOW_CHECKPOINT),
        _facts(FLOW_CHECKPOINT),
        "model.diffusion_model.",
    )
    model = {
        name.removeprefix(prefix): value.float()
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    return {
        "model": model,
        "average": {name: value.clone() for name, value in model.items()},
        "step": int(facts["kindred.flow_steps"]),
        "spread": float(weights["first_stage_model.vae_scale"]),
        "seed": int(facts["kindred.seed"]),
        "loss": float(facts["kindred.velocity_loss"]),
    }


def _facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as shipped:
        return shipped.metadata()


def pack_control(folder: Path) -> None:
    """Writes the Control-LoRA if its training has begun in `folder`."""
    state = load(folder / "control.pt", torch.device("cpu"))
    if state is not None:
        CONTROL.parent.mkdir(parents=True, exist_ok=True)
        metadata = {
            "kindred.control": VERSION,
            "kindred.world": world_hash(),
            "kindred.steps": str(state["step"]),
        }
        save_file(packed(state["model"]), CONTROL, metadata)
        log.info("%s %.2f MiB", CONTROL.name, CONTROL.stat().st_size / 2**20)
