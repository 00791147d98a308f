"""A reference as one .safetensors: every tensor of a ReferenceBank, and whatever is no tensor as
JSON in the metadata.

Rows of different lengths (anchors keep other tokens at every step) lie one after another in one
tensor, their lengths in the
metadata: a file has dozens of tensors, not thousands. Nothing in it knows the machine that wrote
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import torn, unread, whole
from ..identity import read_parts, tell_parts
from ..network.blocks import UNET_STAGES, Grid
from ..network.call import Half
from ..noise.inversion import InversionTrajectory
from ..noise.path import DIFFUSION, Diffusion, Flow, Noise
from ..safetensor import GREATEST, check_safetensors, number
from ..subject.words import SubjectTokens
from .bank import BANK_VERSION, AnchorFeatures, Kept, ReferenceBank, ReferencePrompt
from .rows import Layer
from .soundness import Rows, check

FORMAT = "kindred.reference"  # the metadata's one key: safetensors writes several in no fixed order
DTYPES = {
    str(kind).removeprefix("torch."): kind
    for kind in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
    )
}
# A transformer's blocks and a flow's latents mean nothing to a Kindred that knows UNets alone: it
# reads version 1 and no other.
TRANSFORMER_VERSION = BANK_VERSION + 1
STAGE = re.compile("[a-z]{1,16}")
AGAIN = "Copy it again, or save the reference again."
MOST = 1 << 40  # of anything counted; a real file is far below
Description = Mapping[str, Any]


def save_reference(bank: ReferenceBank, path: Path) -> None:
    """One file, whole or absent: an older one of that name stays where the write fails. The same
    bank gives the same bytes.

    Raises ValueError for a bank that could not be loaded again (another version, NaN), OSError
    where the disk does.
    """
    if bank.version != BANK_VERSION:
        raise ValueError(
            f"the reference is of version {bank.version}, but this Kindred writes version "
            f"{BANK_VERSION}. Make it again."
        )
    parcel = Parcel()
    try:
        check(bank)
        description = parcel.bank(bank)
    except ValueError as error:
        raise ValueError(f"the reference cannot be saved: {error}. Make it again.") from error
    with whole(path, parcel.tensors.values()) as partial:
        save_file(parcel.tensors, partial, {FORMAT: json.dumps(description)})


def load_reference(
    path: Path, progress: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None
) -> ReferenceBank:
    """What save_reference wrote, bit for bit, in memory of its own: the file may be replaced or
    deleted afterwards.

    progress: given the number of tensors, returns what is told how many were read.
    Raises ValueError that names the file, what it holds, what was needed and what to do: another
    format or version, a torn file, a missing tensor, NaN; FileNotFoundError where there is none.
    """
    check_safetensors(path)
    try:
        with safe_open(path, "pt") as file:
            description, names = read_metadata(path, file.metadata() or {}), set(file.keys())
            tell, read = progress(len(names)), set()

            def tensor(name: str) -> Tensor:
                if name not in names:
                    raise ValueError(f"the tensor {name!r:.80} is missing among its {len(names)}")
                tell(len(read))
                read.add(name)
                return file.get_tensor(name).clone()  # out of the mapped file

            bank = read_bank(description, tensor)
            check(bank)
            tell(len(names))
    except OSError as error:
        raise unread(path, error) from error
    except SafetensorError as error:
        raise torn(path, error) from error
    except Refused:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(
            f"{path.name}: its description is damaged ({error!r:.120}). {AGAIN}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{path.name} does not fit together: {str(error).rstrip('.')}. {AGAIN}"
        ) from error
    return bank


class Refused(ValueError):
    """A file that is no reference of this version; its sentence is complete."""


def read_metadata(path: Path, metadata: Mapping[str, str]) -> Description:
    """The description of a reference of this version; Refused for any other file."""
    if FORMAT not in metadata:
        ours, names = (
            [n for n in sorted(metadata) if n.startswith(start)] for start in ("kindred.", "")
        )
        content = (
            f"of format {', '.join(ours):.80}"
            if ours
            else f"no reference (its metadata names {', '.join(names) or 'nothing':.80})"
        )
        raise Refused(
            f"{path.name} is {content}, but a reference is of format {FORMAT}. Choose a file that "
            f"Save Reference wrote."
        )
    try:
        description = json.loads(metadata[FORMAT])
        version = number(description["version"], 0, MOST, "version")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise Refused(
            f"{path.name}: its description is damaged ({error!r:.120}). {AGAIN}"
        ) from error
    if version not in (BANK_VERSION, TRANSFORMER_VERSION):
        raise Refused(
            f"{path.name} is a reference of version {version}, but this Kindred reads versions "
            f"{BANK_VERSION} and "
            f"{TRANSFORMER_VERSION}. Update Kindred, or make and save the reference again."
        )
    return description


# writing ------------------------------------------------------------------------------------------


@dataclass
class Parcel:
    """The tensors of one file; every method puts some in and returns what the description says of
    them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    _places: set[int] = field(default_factory=set)

    def put(self, name: str, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory
        self.tensors[name] = value.clone() if place in self._places else value
        self._places.add(place)

    def optional(self, name: str, value: Tensor | None) -> bool:
        if value is not None:
            self.put(name, value)
        return value is not None

    def rows(self, name: str, rows: Rows) -> dict[str, Any] | None:
        """None for [t s]; positions (int64) are stored in 32 bits where they fit."""
        if isinstance(rows, Tensor):
            return self.put(name, rows)
        filled = [row for row in rows if row.numel()]
        if len({row.dtype for row in filled}) > 1 or any(
            row.ndim != 1 or str(row.dtype)[6:] not in DTYPES for row in rows
        ):
            raise ValueError(
                f"{name} holds rows of {sorted({f'{row.dtype} {list(row.shape)}' for row in rows})}"
            )
        flat = torch.cat(filled) if filled else torch.zeros(0)
        if flat.dtype is torch.int64 and flat.max() < 1 << 31 and flat.min() >= 0:
            flat = flat.to(torch.int32)
        self.put(name, flat)
        dtypes = [str(row.dtype)[6:] for row in rows]  # an empty row may be of another one
        return {
            "lengths": [len(row) for row in rows],
            "dtypes": dtypes if len(set(dtypes)) > 1 else dtypes[:1],
        }

    def kept(self, name: str, kept: Kept) -> list[list[Any]]:
        return [
            [*grid, self.rows(f"{name}.{grid[0]}x{grid[1]}", rows)] for grid, rows in kept.items()
        ]

    def bank(self, bank: ReferenceBank) -> dict[str, Any]:
        for grid, mask in bank.masks.items():
            self.put(f"mask.{grid[0]}x{grid[1]}", mask)
        new = (
            bank.live
            or isinstance(bank.trajectory.noise, Flow)
            or any(block[0] not in UNET_STAGES for block in bank.blocks)
        )
        version = TRANSFORMER_VERSION if new else bank.version
        return {
            "version": version,
            "model": str(bank.model_key),
            "identity": tell_parts(bank.model_key),
            "trajectory": self.trajectory(bank.trajectory),
            "prompts": {
                half.value: self.prompt(f"prompt.{half.value}", prompt)
                for half, prompt in bank.prompts.items()
            },
            "layers": described_layers(bank.layers),
            "masks": [list(grid) for grid in bank.masks],
            "features": {
                half.value: self.rows(f"features.{half.value}", rows)
                for half, rows in bank.features.items()
            },
            "share": bank.share,
            "maps": self.optional("maps", bank.maps),
            "anchors": None if bank.anchors is None else self.anchors(bank.anchors),
        }

    def trajectory(self, path: InversionTrajectory) -> dict[str, Any]:
        self.put("trajectory.sigmas", path.sigmas)
        self.put("trajectory.latents", path.latents)
        return {
            "method": path.method,
            "prompt": path.prompt,
            "model": str(path.model_key),
            "schedule": path.schedule,
            "noise_maps": self.optional("trajectory.noise_maps", path.noise_maps),
            **described_noise(path.noise),
        }

    def prompt(self, name: str, prompt: ReferencePrompt) -> dict[str, Any]:
        self.put(f"{name}.cross", prompt.cross)
        extras, subject = [], prompt.subject
        for key, value in prompt.extras.items():  # a list, since their order is theirs
            tensor = isinstance(value, Tensor)
            if tensor:
                self.put(f"{name}.extra.{key}", value)
            extras.append([key, None if tensor else value])
        return {
            "text": prompt.text,
            "extras": extras,
            "subject": None
            if subject is None
            else {
                "words": subject.words,
                "positions": subject.positions,
                "by_word": subject.by_word,
            },
        }

    def anchors(self, anchors: AnchorFeatures) -> dict[str, Any]:
        return {
            "kept": self.kept("anchors.kept", anchors.kept),
            "first_kept": self.kept("anchors.first_kept", anchors.first_kept),
            "first": {
                half.value: self.rows(f"anchors.first.{half.value}", rows)
                for half, rows in anchors.first.items()
            },
            "outputs": self.rows("anchors.outputs", anchors.outputs),
            "output_layers": described_layers(anchors.output_layers),
            "features": self.optional("anchors.features", anchors.features),
            "subject": self.optional("anchors.subject", anchors.subject),
            "settings": dict(anchors.settings),
        }


def described_noise(noise: Noise) -> dict[str, Any]:
    """Nothing of a diffusion: its file stays the one that every Kindred reads."""
    return {"flow": {"scale": noise.scale}} if isinstance(noise, Flow) else {}


def described_layers(layers: Sequence[Layer]) -> list[list[Any]]:
    return [[*layer.block, *layer.grid, layer.channels] for layer in layers]


# reading ------------------------------------------------------------------------------------------

Source = Callable[[str], Tensor]  # a tensor of the file by its name


def read_bank(description: Description, tensor: Source) -> ReferenceBank:
    """ValueError, KeyError, TypeError, AttributeError or IndexError where the description is not
    what Parcel.bank says.
    """
    # older references have the name alone
    path, model = (
        description["trajectory"],
        read_parts(word(description["model"]), description.get("identity")),
    )
    trajectory = InversionTrajectory(
        tensor("trajectory.sigmas"),
        tensor("trajectory.latents"),
        word(path["method"]),
        word(path["prompt"]),
        model if path["model"] == model else word(path["model"]),
        word(path["schedule"]),
        tensor("trajectory.noise_maps") if path["noise_maps"] else None,
        read_noise(path) if description["version"] == TRANSFORMER_VERSION else DIFFUSION,
    )
    prompts = {
        Half(half): read_prompt(own, f"prompt.{half}", tensor)
        for half, own in description["prompts"].items()
    }
    masks = {
        grid: tensor(f"mask.{grid[0]}x{grid[1]}")
        for grid in (read_grid(*g) for g in description["masks"])
    }
    return ReferenceBank(
        trajectory,
        prompts,
        read_layers(description["layers"], description["version"]),
        masks,
        read_halves(description["features"], "features", tensor),
        model,
        tensor("maps") if description["maps"] else None,
        None
        if description["anchors"] is None
        else read_anchors(description["anchors"], tensor, description["version"]),
        BANK_VERSION,
        read_share(description.get("share", 1.0)),
    )


def read_noise(path: Description) -> Diffusion | Flow:
    """The noise path of a trajectory."""
    flow = path.get("flow")
    if flow is None:
        return DIFFUSION
    scale = flow["scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale <= GREATEST:
        raise ValueError(f"{scale!r:.40} where the scale of a flow's noise belongs, above 0")
    return Flow(float(scale))


def read_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{value!r:.40} where a share of the tokens belongs, above 0 and up to 1")
    return float(value)


def read_prompt(description: Description, name: str, tensor: Source) -> ReferencePrompt:
    extras = {
        word(key): tensor(f"{name}.extra.{key}") if value is None else scalar(value)
        for key, value in description["extras"]
    }
    subject = description["subject"]
    if subject is not None:
        subject = SubjectTokens(
            tuple(map(word, subject["words"])),
            places(subject["positions"]),
            tuple(places(own) for own in subject["by_word"]),
        )
    return ReferencePrompt(word(description["text"]), tensor(f"{name}.cross"), extras, subject)


def read_anchors(description: Description, tensor: Source, version: int) -> AnchorFeatures:
    return AnchorFeatures(
        read_kept(description["kept"], "anchors.kept", tensor),
        read_halves(description["first"], "anchors.first", tensor),
        read_kept(description["first_kept"], "anchors.first_kept", tensor),
        read_rows(description["outputs"], "anchors.outputs", tensor),
        read_layers(description["output_layers"], version),
        tensor("anchors.features") if description["features"] else None,
        tensor("anchors.subject") if description["subject"] else None,
        {key: scalar(value) for key, value in description["settings"].items()},
    )


def read_rows(description: Description | None, name: str, tensor: Source) -> Rows:
    stored = tensor(name)
    if description is None:
        return stored
    lengths, dtypes = (
        [number(n, 0, MOST, f"a row of {name}") for n in description["lengths"]],
        [DTYPES[kind] for kind in description["dtypes"]],
    )
    if stored.ndim != 1 or sum(lengths) != len(stored):
        raise ValueError(
            f"{name} is {list(stored.shape)}, but its description says {len(lengths)} rows of "
            f"{sum(lengths)} values together"
        )
    if len(dtypes) not in (min(len(lengths), 1), len(lengths)):
        raise ValueError(
            f"{name} has {len(lengths)} rows, but its description says {len(dtypes)} dtypes"
        )
    dtypes = dtypes * len(lengths) if len(dtypes) == 1 else dtypes
    return tuple(row.to(kind) for row, kind in zip(stored.split(lengths), dtypes))


def read_kept(description: Sequence[Any], name: str, tensor: Source) -> Kept:
    return {read_grid(y, x): read_rows(own, f"{name}.{y}x{x}", tensor) for y, x, own in description}


def read_halves(description: Description, name: str, tensor: Source) -> dict[Half, Rows]:
    return {
        Half(half): read_rows(own, f"{name}.{half}", tensor) for half, own in description.items()
    }


def read_layers(description: Sequence[Any], version: int) -> tuple[Layer, ...]:
    layers = tuple(
        Layer(
            (stage, number(i, 0, 999, "a block"), number(d, 0, 999, "a block")),
            read_grid(y, x),
            number(c, 1, MOST, "channels"),
        )
        for stage, i, d, y, x, c in description
    )
    unknown = next(
        (
            layer.block
            for layer in layers
            if layer.block[0] not in UNET_STAGES
            and (version == BANK_VERSION or not STAGE.fullmatch(str(layer.block[0])))
        ),
        None,
    )
    if unknown:
        raise ValueError(f"a layer lies in {unknown[0]!r:.40}; a UNet has {', '.join(UNET_STAGES)}")
    return layers


def read_grid(y: Any, x: Any) -> Grid:
    return number(y, 1, 1 << 20, "a grid"), number(x, 1, 1 << 20, "a grid")


def places(description: Sequence[Sequence[Any]]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(number(i, 0, MOST, "a token's position") for i in row) for row in description
    )


def word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} where text belongs")
    return value


def scalar(value: Any) -> int | float | str:
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{value!r:.40} where a number or text belongs")
    return value


# both ways ----------------------------------------------------------------------------------------
