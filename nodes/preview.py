"""Reference Preview: what a reference knows of its subject, drawn over its pictures."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.network.call import grid_of
from ..models.overlay import draw_heat, draw_masks, draw_matches
from ..models.reference.bank import ReferenceBank
from ..models.subject.correspondence import correspond
from . import host

NODE = "Reference Preview"
ALL, MASKS, HEAT, MATCHES = "all", "masks", "heat map", "correspondences"
MEAN = -1.0
log = logging.getLogger(__name__)


class ReferencePreview(io.ComfyNode):
    """Masks of paper A eq. (5) and B appendix B, the maps they come from, and B's correspondences
    (eq. 5, 8, 9).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredReferencePreview",
            display_name=NODE,
            category="Kindred",
            is_output_node=True,
            description="Shows what a reference knows: where the subject was found, how "
            "strongly its word lights up, and which parts of several pictures "
            "match.",
            search_aliases=[
                "preview reference",
                "show mask",
                "subject mask",
                "attention map",
                "heatmap",
                "correspondence",
                "debug",
            ],
            inputs=[
                host.Reference.Input(
                    "reference",
                    tooltip="From Ref-UNet Feature Capture, ConsiStory Anchor Sampler or Load "
                    "Reference.",
                ),
                io.Vae.Input(
                    "vae",
                    tooltip="The VAE of the checkpoint that made the reference; it draws "
                    "the pictures underneath.",
                ),
                io.Combo.Input(
                    "show",
                    options=[ALL, MASKS, HEAT, MATCHES],
                    default=ALL,
                    tooltip="masks: the subject in colour, the rest grey. heat map: the "
                    "attention to the subject's word. correspondences: matching "
                    "parts share a colour. all: every available view side by side.",
                ),
                io.Float.Input(
                    "step_percent",
                    default=MEAN,
                    min=MEAN,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Which step the heat map shows: 0 = the first (noisiest), 1 = "
                    "the last, below 0 = the mean of all.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="One image per picture of the reference, its views side by side.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, reference: ReferenceBank, vae: Any, show: str = ALL, step_percent: float = MEAN
    ) -> io.NodeOutput:
        draw = {
            MASKS: masks_panel,
            HEAT: lambda pictures, bank: heat_panel(pictures, bank, step_percent),
            MATCHES: matches_panel,
        }
        missing = {
            MASKS: why_no_masks(reference),
            HEAT: why_no_heat(reference),
            MATCHES: why_no_matches(reference),
        }
        wanted = [name for name, why in missing.items() if not why and show in (ALL, name)]
        if not wanted:
            raise ValueError(f"{NODE}: {missing[MASKS if show == ALL else show]}")
        for name, why in missing.items():
            if show == ALL and why:
                log.info("%s: left out %s: %s", NODE, name, why)
        pictures = host.decode(vae, reference.trajectory.latents[0], reference.model_key, NODE)
        image = side_by_side([draw[name](pictures, reference) for name in wanted])
        shown = ui.ImageSaveHelper.save_images(
            image, "kindred_reference_preview", io.FolderType.temp, cls, compress_level=1
        )
        return io.NodeOutput(image, ui=ui.SavedImages(shown))


def why_no_masks(bank: ReferenceBank) -> str | None:
    """Why there are no masks, and what to do; None where there are."""
    return (
        None
        if bank.masks
        else "the reference holds no masks. Make it again, with a subject word or a wired mask."
    )


def why_no_heat(bank: ReferenceBank) -> str | None:
    """Why there is no heat map, and what to do; None where there is one."""
    if bank.maps is None:
        return (
            "the reference has no heat map: its mask was wired, so no word was followed. Show the "
            "masks, or make the reference "
            "without a mask and with a subject word."
        )
    return None


def why_no_matches(bank: ReferenceBank) -> str | None:
    """Why there are no correspondences, and what to do; None where there are."""
    if bank.anchors is None:
        return (
            "the reference was read from photos, which have no features to match. Show the masks "
            "or the heat map, or wire a reference "
            "from ConsiStory Anchor Sampler."
        )
    if bank.anchors.features is None:
        return (
            "these anchors were made without feature injection, so they have no features to match. "
            "Make them again with "
            "feature_injection above 0."
        )
    if bank.pictures < 2:
        return (
            f"correspondences need 2 pictures, but the reference has {bank.pictures}. Make 2 or "
            f"more anchors, or show the masks or the "
            "heat map."
        )
    return None


def masks_panel(pictures: Tensor, bank: ReferenceBank) -> Tensor:
    """The finest masks there are: of a photo at the latent's own size, of anchors at their finest
    layer's.
    """
    return draw_masks(pictures, bank.masks[max(bank.masks, key=lambda grid: grid[0] * grid[1])])


def heat_panel(pictures: Tensor, bank: ReferenceBank, percent: float) -> Tensor:
    """The words' map at a share of the steps (maps[0] is the least noisy), or the mean of all."""
    row = round((1 - percent) * (len(bank.maps) - 1))
    return draw_heat(pictures, bank.maps.float().mean(0) if percent < 0 else bank.maps[row])


def matches_panel(pictures: Tensor, bank: ReferenceBank) -> Tensor:
    """Every further picture's subject in the colours of the first one's."""
    features = bank.anchors.features
    r, n = features.shape[:2]
    latent = tuple(bank.trajectory.latents.shape[-2:])
    halved = (grid_of(latent, 2**k) for k in range(6))
    grids = [grid for grid in (*bank.masks, *halved) if math.prod(grid) == n]
    if not grids:
        raise ValueError(
            f"{NODE}: the reference's features have {n} tokens a picture, which fits no grid of a "
            f"{latent[0]}x{latent[1]} "
            "latent. A node that changes the grid (Deep Shrink, token merging) was on the model. "
            "Make the anchors without it."
        )
    if bank.anchors.subject is None:
        subjects = bank.masks[grids[0]].flatten(1)
    else:
        subjects = (
            torch.zeros(r * n, dtype=torch.bool)
            .index_fill_(0, bank.anchors.subject.cpu(), True)
            .view(r, n)
        )
    kept = subjects[0].nonzero().squeeze(1)
    matches = correspond(features[1:], subjects[1:], features[:1], [kept] * (r - 1))
    own = torch.arange(n)[None]
    return draw_matches(
        pictures,
        grids[0],
        subjects,
        torch.cat([own, matches.source]),
        torch.cat([subjects[:1], matches.keep]),
    )


def side_by_side(panels: list[Tensor]) -> Tensor:
    """Panels [b Y X 3] -> [b Y X' 3], a thin white gap between them."""
    b, y, x, _ = panels[0].shape
    gap = panels[0].new_ones(b, y, max(2, x // 64), 3)
    return torch.cat([part for panel in panels for part in (gap, panel)][1:], 2)
