"""The blocks of a network whose attention is read: their names, and how a user chooses among them."""

from __future__ import annotations

import re
from collections.abc import Sequence

BlockId = tuple[
    str, int, int
]  # ("output", 4, 0): stage, index in the stage, depth inside the block
Grid = tuple[int, int]  # (y, x) tokens
UNET_STAGES = ("input", "middle", "output")


def block_name(block: BlockId) -> str:
    """("output", 4, 0) -> "output 4"; depth is named only where a block has several: "output 4.1"."""
    return f"{block[0]} {block[1]}" + (f".{block[2]}" if block[2] else "")


def select_blocks(wanted: str, available: Sequence[BlockId], node: str) -> tuple[BlockId, ...]:
    """Resolve "all", "encoder", "middle", "decoder", "masactrl" or a list such as "input 4, output 3-5, middle 0".

    Order is that of `available` (the order in which the network runs). "masactrl" is attention layers 10 and later
    (arXiv 2304.08465). Of a transformer, encoder and decoder are its first and second half, and its kinds of blocks are presets.
    Raises ValueError naming the unknown word and the blocks that exist.
    """
    presets = {
        "all": lambda i, b: True,
        "encoder": lambda i, b: b[0] == "input",
        "middle": lambda i, b: b[0] == "middle",
        "decoder": lambda i, b: b[0] == "output",
        "masactrl": lambda i, b: i >= 10,
    }
    if (
        available and available[0][0] not in UNET_STAGES
    ):  # of a transformer: its first and second half
        half = len(available) // 2
        presets = {
            "all": presets["all"],
            "encoder": lambda i, b: i < half,
            "decoder": lambda i, b: i >= half,
        } | {
            kind: lambda i, b, kind=kind: b[0] == kind
            for kind in dict.fromkeys(b[0] for b in available)
        }
    if not available:
        raise ValueError(
            f"{node}: this model has no block with self-attention, so there is nothing to read. Load an SD1.5, SD2.x or SDXL "
            "checkpoint."
        )
    there = ", ".join(
        name for name, fits in presets.items() if any(fits(i, b) for i, b in enumerate(available))
    )
    chosen: set[BlockId] = set()
    for term in filter(None, (t.strip().lower() for t in wanted.split(","))):
        if term in presets:
            found = {b for i, b in enumerate(available) if presets[term](i, b)}
        elif match := re.fullmatch(r"([a-z]+)\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?(?:\.(\d+))?", term):
            stage, first, last, depth = match[1], int(match[2]), int(match[3] or match[2]), match[4]
            found = {
                b
                for b in available
                if b[0] == stage and first <= b[1] <= last and depth in (None, str(b[2]))
            }
        else:
            found = set()
        if not found:
            raise ValueError(
                f"{node}: no attention block matches {term!r:.200}. Choose from this model's "
                f"{', '.join(dict.fromkeys(f'{b[0]} {b[1]}' for b in available))}, or write a preset: {there}."
            )
        chosen |= found
    if not chosen:
        raise ValueError(
            f"{node}: blocks is empty. Write {there.replace(', ', ' or ')}, or a list such as 'output 3-5, middle 0'."
        )
    return tuple(b for b in available if b in chosen)
