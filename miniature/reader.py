"""The attribute reader: a small network that reads class, scene and identity from a picture of the miniature's world.

Identity is thereby a number, not an impression. It is trained on renderings only, half of them passed through the
autoencoder, because that is what every generated picture passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data import stack
from .world import CLASSES, HATS, PATTERNS, SCENES, Identity, held_out_identity, render

WEIGHTS = Path(__file__).parent / "weights" / "kindred_reader.safetensors"
GRID = 64  # pictures are read at this size
MASK_GRID = 16
KINDS = {"class": CLASSES, "scene": SCENES, "pattern": PATTERNS, "hat": HATS}
HUES = ("hue", "second_hue", "hat_hue")
SHARES = {
    "body": 0.35,
    "second_hue": 0.25,
    "pattern": 0.25,
    "hat": 0.15,
}  # of the similarity: roughly how much one sees of each
HUE_REACH = 0.25  # of the colour circle: hues this far apart agree not at all, so two random hues agree 0.25


@dataclass(frozen=True)
class Reading:
    """What is read from b pictures."""

    probabilities: dict[str, Tensor]  # "class" [b 5], "scene" [b 8], "pattern" [b 4], "hat" [b 4]
    colours: dict[str, Tensor]  # "hue", "saturation", "value", "second_hue", "hat_hue": [b] in 0..1
    mask: Tensor  # [b 16 16], probability that this is the subject
    whole: Tensor  # [b], probability that the picture shows one whole subject

    def names(self, kind: str) -> list[str]:
        """The likeliest name of "class", "scene", "pattern" or "hat" for every picture."""
        return [KINDS[kind][index] for index in self.probabilities[kind].argmax(1).tolist()]

    def __len__(self) -> int:
        return len(self.mask)


def _layer(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False),
        nn.GroupNorm(8, n_out),
        nn.ReLU(),
    ]


class OneWhole(nn.Module):
    """The head that looks for one whole subject: none, two, a copy in a corner, two heads or a half are none."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.near = nn.Sequential(*_layer(80 + 1, width, 2))
        self.far = nn.Sequential(*_layer(width + 112, width), *_layer(width, width, 2))
        self.verdict = nn.Sequential(nn.Linear(16 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, near: Tensor, far: Tensor, subject: Tensor) -> Tensor:
        """The reader's features [b 80 16 16] and [b 112 8 8] and mask logits [b 1 16 16] -> logits [b]."""
        seen = self.far(torch.cat((self.near(torch.cat((near, subject), 1)), far), 1))
        return self.verdict(seen.flatten(1))[:, 0]


class Reader(nn.Module):
    """A plain convolutional network with a head per attribute, and one that learns when the others have."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Sequential(
            *_layer(3, 32), *_layer(32, 48, 2), *_layer(48, 48), *_layer(48, 80, 2), *_layer(80, 80)
        )
        self.far = nn.Sequential(*_layer(80, 112, 2), *_layer(112, 112))
        self.subject = nn.Conv2d(80, 1, 1)
        self.kinds = nn.ModuleDict(
            {kind: nn.Linear(2 * 112 + 80, len(names)) for kind, names in KINDS.items()}
        )
        self.hues = nn.Linear(2 * 112 + 80, 2 * len(HUES))  # cosine and sine of each
        self.tones = nn.Linear(2 * 112 + 80, 2)  # saturation, value
        self.whole = OneWhole()

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Pictures [b 3 64 64] in 0..1 -> logits by kind, "hues" [b 3 2], "tones" [b 2], "mask" logits [b 16 16], "whole" logits [b].

        No gradient goes from the last one into what it shares with the others.
        """
        near = self.near(pictures - 0.5)
        far = self.far(near)
        subject = self.subject(near)
        share = subject.flatten(2).float().softmax(2).to(near.dtype)
        on_subject = (near.flatten(2) * share).sum(
            2
        )  # what the subject looks like wherever it stands
        seen = torch.cat((far.mean((2, 3)), far.amax((2, 3)), on_subject), 1)
        out = {kind: head(seen).float() for kind, head in self.kinds.items()}
        hues = self.hues(seen).float().unflatten(1, (len(HUES), 2))
        return out | {
            "hues": hues,
            "tones": self.tones(seen).float(),
            "mask": subject[:, 0].float(),
            "whole": self.whole(near.detach(), far.detach(), subject.detach()).float(),
        }

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Images in the host's layout [b y x 3], 0..1, of any size -> what they show."""
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"The reader takes images [b y x 3]; it got {list(images.shape)}.")
        small = F.interpolate(images.permute(0, 3, 1, 2).float(), (GRID, GRID), mode="area")
        parts = [self(part) for part in small.split(64)]
        out = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        turns = torch.atan2(out["hues"][..., 1], out["hues"][..., 0]) / (2 * pi) % 1.0
        colours = dict(zip(HUES, turns.unbind(1), strict=True))
        colours |= dict(
            zip(("saturation", "value"), out["tones"].clamp(0, 1).unbind(1), strict=True)
        )
        return Reading(
            {kind: out[kind].softmax(1) for kind in KINDS},
            colours,
            out["mask"].sigmoid(),
            out["whole"].sigmoid(),
        )


def load_reader(path: Path = WEIGHTS) -> Reader:
    """The trained reader, in float32 on the CPU."""
    from safetensors.torch import load_file

    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return reader.eval().requires_grad_(False)


def hue_agreement(a: float | Tensor, b: float | Tensor) -> Tensor:
    """1 for equal hues, falling straight to 0 at a quarter of the colour circle."""
    apart = (torch.as_tensor(a) - torch.as_tensor(b) + 0.5) % 1.0 - 0.5
    return (1 - apart.abs() / HUE_REACH).clamp(min=0)


def similarity_parts(reading: Reading, identity: Identity, index: int = 0) -> dict[str, float]:
    """How far picture `index` of a reading agrees with an identity in each attribute, 0..1.

    body: hue agreement times what saturation and value leave over (1 - |ds| - |dv|, at least 0).
    pattern: probability of the true one. hat: probability of the true kind, times hue agreement where there is one.
    """
    colours = {name: float(values[index]) for name, values in reading.colours.items()}
    tone = max(
        0.0,
        1
        - abs(colours["saturation"] - identity.saturation)
        - abs(colours["value"] - identity.value),
    )
    hat = float(reading.probabilities["hat"][index, HATS.index(identity.hat)])
    if identity.hat != "none":
        hat *= float(hue_agreement(colours["hat_hue"], identity.hat_hue))
    return {
        "body": float(hue_agreement(colours["hue"], identity.hue)) * tone,
        "second_hue": float(hue_agreement(colours["second_hue"], identity.second_hue)),
        "pattern": float(reading.probabilities["pattern"][index, PATTERNS.index(identity.pattern)]),
        "hat": hat,
    }


def identity_similarity(reading: Reading, identity: Identity, index: int = 0) -> float:
    """The mean of similarity_parts with the weights of SHARES: 1 = the same identity, a random other one about 0.2."""
    return sum(
        SHARES[name] * part for name, part in similarity_parts(reading, identity, index).items()
    )


def pairwise_similarity(one: Reading, other: Reading) -> Tensor:
    """Identity similarity of every picture of one reading with every picture of another -> [a b], 1 = the same subject.

    A reading tells an identity with some doubt, so this is the expectation of identity_similarity over the identities that the
    other reading allows. Pattern: probability that both show the same. Hat: the same for its kind, times hue agreement where there
    is one. Colours are read without doubt. Both directions give the same number, so it is their mean as well; a reading without
    doubt is an identity and gives identity_similarity; a picture with itself gives 1 as far as the reader is sure of it.
    """
    mine, theirs = (
        {name: values.double() for name, values in r.colours.items()} for r in (one, other)
    )
    hue = {name: hue_agreement(mine[name][:, None], theirs[name]) for name in HUES}
    tone = 1 - sum((mine[name][:, None] - theirs[name]).abs() for name in ("saturation", "value"))
    same = {
        kind: one.probabilities[kind].double()[:, None] * other.probabilities[kind].double()
        for kind in ("pattern", "hat")
    }
    bare = HATS.index("none")
    worn = same["hat"].sum(2) - same["hat"][..., bare]
    parts = {
        "body": hue["hue"] * tone.clamp(min=0),
        "second_hue": hue["second_hue"],
        "pattern": same["pattern"].sum(2),
        "hat": same["hat"][..., bare] + worn * hue["hat_hue"],
    }
    return sum(share * parts[name] for name, share in SHARES.items())


def consistency(reading: Reading) -> float:
    """Mean similarity of all pairs of b pictures, b at least 2: how far they show one subject."""
    b = len(reading)
    if b < 2:
        raise ValueError(
            f"Consistency compares pictures with one another and takes at least 2; it got {b}."
        )
    return float(pairwise_similarity(reading, reading)[tuple(torch.triu_indices(b, b, 1))].mean())


def subject_boxes(reading: Reading) -> Tensor:
    """Where the subject stands -> [b 4]: centre x, centre y, width, height in picture sizes; NaN where no subject is seen.

    The box that has the first two moments of the mask's part above one half, exact for a filled rectangle of whole cells and
    finer than a cell for the reader's soft edges.
    """
    weight = (2 * reading.mask.double() - 1).clamp(min=0)
    weight = weight / weight.sum((1, 2), keepdim=True)  # 0 / 0 where nothing is above: NaN
    centres, sizes = [], []
    for along in (weight.sum(1), weight.sum(2)):  # x, y: [b n]
        n = along.shape[1]
        cells = torch.arange(n, dtype=torch.float64, device=along.device) + 0.5
        centre = (along * cells).sum(1)
        spread = (along * (cells - centre[:, None]) ** 2).sum(1)
        centres.append(centre / n)
        sizes.append(
            (12 * spread + 1).sqrt() / n
        )  # m equal cells in a row have the variance (m^2 - 1) / 12
    return torch.stack(centres + sizes, 1)


def layout_spread(boxes: Tensor) -> float:
    """How much boxes [b 4] differ: their standard deviation, averaged over the four numbers. 0 where all are equal.

    Pictures without a subject (NaN) are left out; NaN where fewer than two are left.
    """
    seen = boxes[~boxes.isnan().any(1)]
    return float(seen.std(0, correction=0).mean()) if len(seen) > 1 else float("nan")


def floor_and_ceiling(
    reader: Reader, autoencode: Callable[[Tensor], Tensor] | None = None, count: int = 40
) -> tuple[float, float]:
    """Identity similarity of a random other identity, and of the same one rendered again in another scene and pose.

    Over `count` held-out identities. `autoencode` maps images [b y x 3] to images: give the model's own round trip, since
    every generated picture has passed it; None judges the renderings themselves.
    """
    identities = [held_out_identity(index) for index in range(count)]
    pictures = [
        render(who, CLASSES[i % len(CLASSES)], SCENES[i % len(SCENES)], 7919 + i)
        for i, who in enumerate(identities)
    ]
    images = torch.from_numpy(stack(pictures).images).float() / 255
    reading = reader.read(autoencode(images) if autoencode else images)
    same = [identity_similarity(reading, who, index) for index, who in enumerate(identities)]
    other = [
        identity_similarity(reading, identities[(index + 1) % count], index)
        for index in range(count)
    ]
    return sum(other) / count, sum(same) / count
