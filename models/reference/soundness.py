"""What every reference agrees with itself in: counts, shapes and magnitudes that a run relies on without looking again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..network.blocks import block_name
from ..network.call import Half
from ..safetensor import GREATEST
from .bank import Kept, ReferenceBank
from .rows import Layer

FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)  # of the others some cannot even be compared
OBJECTS = (
    "area",
    "control",
    "hooks",
    "gligen",
)  # entries of a conditioning that are no numbers to the host


def check_agreement(bank: ReferenceBank) -> None:
    """ValueError says which two parts of the bank disagree, or what lies beyond all bounds."""
    path, halves = bank.trajectory, bank.features.keys()
    t, a = len(path.sigmas) - 1, bank.anchors
    for name, values in (
        ("sigmas", path.sigmas),
        ("latents", path.latents),
        ("noise maps", path.noise_maps),
    ):
        check_bounded(f"the {name}", values)
    if not path.latents.numel():
        raise ValueError(f"the latents are {list(path.latents.shape)}, which is no picture")
    if Half.COND not in halves or not halves <= bank.prompts.keys():
        raise ValueError(
            f"it holds the features of {told(halves)} and the prompts of {told(bank.prompts)}, but it needs those of cond, "
            "and a prompt for each half"
        )
    if not bank.layers or len(set(bank.blocks)) < len(bank.layers):
        raise ValueError(
            f"{len(bank.layers)} layers are named, {len(set(bank.blocks))} of them once"
        )
    for half, prompt in bank.prompts.items():
        check_prompt(
            f"the {half.value} prompt",
            prompt.cross,
            prompt.subject and prompt.subject.positions,
            prompt.subject and prompt.subject.by_word,
            prompt.subject and prompt.subject.words,
        )
        for (
            key,
            value,
        ) in (
            prompt.extras.items()
        ):  # their values are the host's: SD1.5's pooled text is read by nobody, and may be NaN
            if key in OBJECTS or key == "mask" and not isinstance(value, Tensor):
                raise ValueError(
                    f"the {half.value} prompt has an entry {key!r:.40}, which is no part of a plain prompt"
                )
    if bank.maps is not None:
        steps = (
            range(1, t + 1) if bank.live else (t,)
        )  # what is read live was looked at where the mask is found
        fits = (
            bank.maps.ndim == 4
            and bank.maps.shape[0] in steps
            and bank.maps.shape[1] == bank.pictures
        )
        if bank.maps.dtype not in FLOATS or not fits or not bank.maps.numel():
            raise ValueError(
                f"the words' maps are {bank.maps.dtype} {list(bank.maps.shape)}, but it has {t} steps of {bank.pictures} "
                "pictures"
            )
        check_bounded("the words' maps", bank.maps)
    if a is None:
        return
    if a.features is not None and (
        a.features.dtype not in FLOATS or a.features.ndim != 3 or len(a.features) != bank.pictures
    ):
        raise ValueError(
            f"the anchors' correspondence features are {a.features.dtype} {list(a.features.shape)}, but there are "
            f"{bank.pictures} pictures"
        )
    if (
        a.features is not None
        and a.features.numel() == 0
        or (a.features is None) != (a.subject is None)
    ):
        raise ValueError(
            "the anchors' correspondence features and the places of their subject do not both stand there"
        )
    for name in ("first_from", "first_until"):
        if (
            type(a.settings.get(name, 0.0)) not in (int, float)
            or not a.settings.get(name, 0.0) >= 0
        ):
            raise ValueError(
                f"the anchors' {name} is {a.settings[name]!r:.40}, which is no noise level"
            )
    if ("first_from" in a.settings) != ("first_until" in a.settings):
        raise ValueError("the anchors' first stage begins or ends nowhere")


def check_prompt(
    what: str, cross: Tensor, positions: tuple | None, by_word: tuple | None, words: tuple | None
) -> None:
    """cross [r w c]; positions: of the subject in each row, below w; by_word: the same for each word alone."""
    if cross.ndim != 3 or not cross.numel():
        raise ValueError(
            f"{what} is {list(cross.shape)}, which is no text of [rows words channels]"
        )
    if positions is None:
        return
    if not positions or by_word and (len(by_word) != len(words or ()) or not all(by_word)):
        raise ValueError(
            f"{what} names {len(words or ())} words and the places of {len(by_word or positions)}"
        )
    at = [place for rows in (positions, *(by_word or ())) for row in rows for place in row]
    if at and max(at) >= cross.shape[1]:
        raise ValueError(f"{what} has its subject at token {max(at)} of {cross.shape[1]}")


def check_bounded(what: str, values: Tensor | None) -> None:
    """NaN, infinite or beyond GREATEST: ValueError says how many are."""
    if values is None or values.dtype not in FLOATS or not values.numel():
        return
    if not all(
        abs(float(x)) <= GREATEST for x in torch.aminmax(values)
    ):  # NaN comes through; a tenth of isfinite's time
        bad = int((~(values.abs() <= GREATEST)).sum())
        kind = "beyond" if values.isfinite().all() else "NaN, infinite or beyond"
        raise ValueError(
            f"{what} hold {bad} values of {values.numel()} that are {kind} {GREATEST:g}"
        )


def told(halves: object) -> str:
    return ", ".join(sorted(half.value for half in halves)) or "none"


Rows = Tensor | Sequence[Tensor]  # [t s], or t of [s_i]


def check(bank: ReferenceBank) -> None:
    """ValueError says what does not fit together or is not finite: on CUDA a wrong position would take the whole server down."""
    t, a = len(bank.trajectory.sigmas) - 1, bank.anchors
    for (y, x), mask in bank.masks.items():
        if mask.dtype is not torch.bool or tuple(mask.shape) != (bank.pictures, y, x):
            raise ValueError(
                f"the mask of {y}x{x} is {mask.dtype} {list(mask.shape)}, but it has to be bool {[bank.pictures, y, x]}"
            )
    for half, prompt in bank.prompts.items():
        check_finite(f"the {half.value} prompt", [prompt.cross])
    kept = {grid: [positions] * t for grid, positions in bank.kept.items()} if a is None else a.kept
    for half, rows in bank.features.items() if not bank.live else ():
        check_tokens(f"the features of the {half.value} half", rows, bank.layers, kept, t)
    whole = tuple(bank.trajectory.latents.shape[-2:])
    lacking = {*bank.grids.values(), *([whole] if a is None else [])} - bank.masks.keys()
    if lacking and (
        a is None or bank.masks
    ):  # anchors whose words nobody heard in the cross-attention have none
        have, need = (
            " and ".join(f"{y}x{x}" for y, x in grids) for grids in (bank.masks, sorted(lacking))
        )
        raise ValueError(f"there are masks of {have or 'no grid'}, but none of {need}")
    if a is not None:
        for held in (a.kept, a.first_kept):
            for grid, rows in held.items():
                for positions in rows:
                    check_positions(
                        f"the kept tokens of {grid[0]}x{grid[1]}",
                        positions,
                        bank.pictures * grid[0] * grid[1],
                    )
        if "first_from" in a.settings and a.first.keys() != bank.features.keys():
            raise ValueError(
                f"the first stage holds {sorted(h.value for h in a.first)}, but the features hold "
                f"{sorted(h.value for h in bank.features)}"
            )
        for half, rows in a.first.items():
            if any(row.numel() for row in rows):
                check_tokens(
                    f"the first stage of the {half.value} half",
                    rows,
                    bank.layers,
                    a.first_kept,
                    t,
                    may_lack=True,
                )
        if a.features is not None and a.subject is not None:
            check_finite("the anchors' correspondence features", [a.features])
            check_positions("the anchors' subject", a.subject, a.features.shape[:-1].numel())
            if (a.subject.diff() <= 0).any():
                raise ValueError("the anchors' subject is not in ascending order")
        if any(row.numel() for row in a.outputs):
            subject = (
                {}
                if a.subject is None
                else {layer.grid: [a.subject] * t for layer in a.output_layers}
            )
            check_tokens(
                "the anchors' outputs", a.outputs, a.output_layers, subject, t, may_lack=True
            )
    check_agreement(bank)


def check_positions(what: str, positions: Tensor, n: int) -> None:
    """positions: int64 [l], each below n."""
    fits = positions.dtype is torch.int64 and positions.ndim == 1
    if not fits or positions.numel() and not (0 <= positions.min() and positions.max() < n):
        raise ValueError(f"{what} are not positions below {n}")


def check_tokens(
    what: str, rows: Rows, layers: Sequence[Layer], kept: Kept, t: int, may_lack: bool = False
) -> None:
    """rows: one per step, each as long as the tokens that its layers keep; may_lack: or empty."""
    if len(rows) != t:
        raise ValueError(f"{what} have {len(rows)} rows, but there are {t} steps")
    for layer in layers:
        if len(kept.get(layer.grid, ())) != t:
            grid = f"{layer.grid[0]}x{layer.grid[1]}"
            raise ValueError(
                f"{block_name(layer.block)} has {grid} tokens, but nothing says which of them are kept"
            )
    for i, row in enumerate(rows):
        wanted = sum(len(kept[layer.grid][i]) * layer.channels for layer in layers)
        if tuple(row.shape) != (wanted,) and not (may_lack and not row.numel()):
            raise ValueError(
                f"{what} are {list(row.shape)} at step {i}, but the tokens kept there need [{wanted}]"
            )
    check_finite(what, rows)


def check_finite(what: str, rows: Rows) -> None:
    for i, row in enumerate(rows):
        if row.dtype not in FLOATS:
            raise ValueError(
                f"{what} are of {row.dtype}, which is no floating point of 16, 32 or 64 bits"
            )
        if row.numel() and not all(
            abs(float(x)) <= GREATEST for x in torch.aminmax(row)
        ):  # NaN comes through; a tenth of isfinite's time
            bad = int((~row.isfinite()).sum())
            raise ValueError(
                f"{what} hold {bad} NaN or infinite values of {row.numel()} in row {i}"
                if bad
                else f"{what} hold {int((row.abs() > GREATEST).sum())} values beyond {GREATEST:g} in row {i}"
            )
