"""What every reference agrees with itself in: counts, shapes and magnitudes that a run relies on
without looking again.

Axes: t steps, r reference pictures, n tokens, l kept tokens, s values of a row, w words, c
channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..network.blocks import UNET_STAGES, Grid, block_name
from ..network.call import Half
from ..safetensor import GREATEST
from .bank import AnchorFeatures, Kept, ReferenceBank, ReferencePrompt
from .rows import Layer

Rows = Tensor | Sequence[Tensor]  # [t s], or t of [s_i]
# of the others some cannot even be compared
FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
# entries of a conditioning that are no numbers to the host
OBJECTS = (
    "area",
    "control",
    "hooks",
    "gligen",
)


def check(bank: ReferenceBank) -> None:
    """ValueError says what does not fit together or is not finite: on CUDA a wrong position would
    take the whole server down.
    """
    t, anchors = len(bank.trajectory.sigmas) - 1, bank.anchors
    for (y, x), mask in bank.masks.items():
        if mask.dtype is not torch.bool or tuple(mask.shape) != (bank.pictures, y, x):
            raise ValueError(
                f"the mask of {y}x{x} is {mask.dtype} {list(mask.shape)}, but it has to be bool "
                f"{[bank.pictures, y, x]}"
            )
    for half, prompt in bank.prompts.items():
        check_finite(f"the {half.value} prompt", [prompt.cross])
    kept = (
        {grid: [positions] * t for grid, positions in bank.kept.items()}
        if anchors is None
        else anchors.kept
    )
    for half, rows in bank.features.items() if not bank.live else ():
        check_tokens(f"the features of the {half.value} half", rows, bank.layers, kept, t)
    check_masks(bank)
    if anchors is not None:
        check_anchors(bank, anchors, t)
    check_agreement(bank)


def check_masks(bank: ReferenceBank) -> None:
    """There is a mask of every grid; anchors whose words nobody heard in the cross-attention have
    none at all.
    """
    whole = tuple(bank.trajectory.latents.shape[-2:])
    photos = bank.anchors is None
    lacking = {*bank.grids.values(), *([whole] if photos else [])} - bank.masks.keys()
    if lacking and (photos or bank.masks):
        have, need = _names(bank.masks), _names(sorted(lacking))
        raise ValueError(f"there are masks of {have or 'no grid'}, but none of {need}")


def _names(grids: Iterable[Grid]) -> str:
    return " and ".join(f"{y}x{x}" for y, x in grids)


def check_anchors(bank: ReferenceBank, anchors: AnchorFeatures, t: int) -> None:
    """What anchors leave in t steps: their tokens in both stages, what they are compared by, and
    their outputs.
    """
    for kept in (anchors.kept, anchors.first_kept):
        for (y, x), rows in kept.items():
            for positions in rows:
                check_positions(f"the kept tokens of {y}x{x}", positions, bank.pictures * y * x)
    if "first_from" in anchors.settings and anchors.first.keys() != bank.features.keys():
        raise ValueError(
            f"the first stage holds {sorted(h.value for h in anchors.first)}, but the features "
            f"hold "
            f"{sorted(h.value for h in bank.features)}"
        )
    for half, rows in anchors.first.items():
        if any(row.numel() for row in rows):
            what = f"the first stage of the {half.value} half"
            check_tokens(what, rows, bank.layers, anchors.first_kept, t, may_lack=True)
    subject, features = anchors.subject, anchors.features
    if features is not None and subject is not None:
        check_finite("the anchors' correspondence features", [features])
        check_positions("the anchors' subject", subject, features.shape[:-1].numel())
        if (subject.diff() <= 0).any():
            raise ValueError("the anchors' subject is not in ascending order")
    if any(row.numel() for row in anchors.outputs):
        layers = anchors.output_layers
        kept = {} if subject is None else {layer.grid: [subject] * t for layer in layers}
        check_tokens("the anchors' outputs", anchors.outputs, layers, kept, t, may_lack=True)


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
                f"{block_name(layer.block)} has {grid} tokens, but nothing says which of them are "
                f"kept"
            )
    for i, row in enumerate(rows):
        wanted = sum(len(kept[layer.grid][i]) * layer.channels for layer in layers)
        if tuple(row.shape) != (wanted,) and not (may_lack and not row.numel()):
            raise ValueError(
                f"{what} are {list(row.shape)} at step {i}, but the tokens kept there need "
                f"[{wanted}]"
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
                else f"{what} hold {int((row.abs() > GREATEST).sum())} values beyond {GREATEST:g} "
                f"in row {i}"
            )


def check_agreement(bank: ReferenceBank) -> None:
    """ValueError says which two parts of the bank disagree, or what lies beyond all bounds."""
    check_path(bank)
    check_halves(bank)
    for half, prompt in bank.prompts.items():
        unet = all(block[0] in UNET_STAGES for block in bank.blocks)
        if not unet and prompt.cross.ndim == 3 and not prompt.cross.shape[1]:
            continue  # what some transformers are given for an empty prompt (Lens)
        check_prompt(
            f"the {half.value} prompt",
            prompt.cross,
            prompt.subject and prompt.subject.positions,
            prompt.subject and prompt.subject.by_word,
            prompt.subject and prompt.subject.words,
        )
        check_extras(half, prompt)
    if bank.maps is not None:
        check_maps(bank, bank.maps)
    if bank.anchors is not None:
        check_anchor_features(bank.anchors, bank.pictures)
        check_first_stage(bank.anchors)


def check_path(bank: ReferenceBank) -> None:
    """The trajectory is of some picture, and nothing of it beyond all bounds."""
    path = bank.trajectory
    for name, values in (
        ("sigmas", path.sigmas),
        ("latents", path.latents),
        ("noise maps", path.noise_maps),
    ):
        check_bounded(f"the {name}", values)
    if not path.latents.numel():
        raise ValueError(f"the latents are {list(path.latents.shape)}, which is no picture")


def check_halves(bank: ReferenceBank) -> None:
    """There are features of the cond half, a prompt for each half, and each layer once."""
    halves = bank.features.keys()
    if Half.COND not in halves or not halves <= bank.prompts.keys():
        raise ValueError(
            f"it holds the features of {named(halves)} and the prompts of {named(bank.prompts)}, "
            f"but it needs those of cond, "
            "and a prompt for each half"
        )
    if not bank.layers or len(set(bank.blocks)) < len(bank.layers):
        raise ValueError(
            f"{len(bank.layers)} layers are named, {len(set(bank.blocks))} of them once"
        )


def check_extras(half: Half, prompt: ReferencePrompt) -> None:
    """Entries are plain; their values are the host's: SD1.5's pooled text is read by nobody, and
    may be NaN.
    """
    for key, value in prompt.extras.items():
        if key in OBJECTS or key == "mask" and not isinstance(value, Tensor):
            raise ValueError(
                f"the {half.value} prompt has an entry {key!r:.40}, which is no part of a plain "
                f"prompt"
            )


def check_maps(bank: ReferenceBank, maps: Tensor) -> None:
    """maps [t r y x] are of the bank's steps and pictures."""
    t = len(bank.trajectory.sigmas) - 1
    # what is read live was looked at where the mask is found
    steps = range(1, t + 1) if bank.live else (t,)
    fits = maps.ndim == 4 and maps.shape[0] in steps and maps.shape[1] == bank.pictures
    if maps.dtype not in FLOATS or not fits or not maps.numel():
        raise ValueError(
            f"the words' maps are {maps.dtype} {list(maps.shape)}, but it has {t} steps of "
            f"{bank.pictures} "
            "pictures"
        )
    check_bounded("the words' maps", maps)


def check_anchor_features(anchors: AnchorFeatures, pictures: int) -> None:
    """The features [r n c] that pictures are compared by, and where their subject is, stand there
    both or not at all.
    """
    features = anchors.features
    if features is not None and (
        features.dtype not in FLOATS or features.ndim != 3 or len(features) != pictures
    ):
        raise ValueError(
            f"the anchors' correspondence features are {features.dtype} {list(features.shape)}, "
            f"but there are "
            f"{pictures} pictures"
        )
    empty = features is not None and features.numel() == 0
    if empty or (features is None) != (anchors.subject is None):
        raise ValueError(
            "the anchors' correspondence features and the places of their subject do not both "
            "stand there"
        )


def check_first_stage(anchors: AnchorFeatures) -> None:
    """Its two ends are noise levels."""
    for name in ("first_from", "first_until"):
        level = anchors.settings.get(name, 0.0)
        if type(level) not in (int, float) or not level >= 0:
            raise ValueError(f"the anchors' {name} is {level!r:.40}, which is no noise level")
    if ("first_from" in anchors.settings) != ("first_until" in anchors.settings):
        raise ValueError("the anchors' first stage begins or ends nowhere")


def check_prompt(
    what: str, cross: Tensor, positions: tuple | None, by_word: tuple | None, words: tuple | None
) -> None:
    """cross [r w c]; positions: of the subject in each row, below w; by_word: the same for each
    word alone.
    """
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


def named(halves: Iterable[Half]) -> str:
    """Their names, in order."""
    return ", ".join(sorted(half.value for half in halves)) or "none"
