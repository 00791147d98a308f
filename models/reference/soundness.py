"""What every reference agrees with itself in: counts, shapes and magnitudes that a run relies on without looking again."""

from __future__ import annotations

import torch
from torch import Tensor

from .bank import Half, ReferenceBank

GREATEST = 65504.0  # float16's; beyond it a run would overflow, and no model leaves such values
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
