"""The blocks of a network whose attention is read: their names, and how a user chooses
among them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# ("output", 4, 0): stage, index in the stage, depth inside the block
BlockId = tuple[str, int, int]
Grid = tuple[int, int]  # (y, x) tokens
UNET_STAGES = ("input", "middle", "output")


def block_name(block: BlockId) -> str:
    """("output", 4, 0) -> "output 4"; depth is named only where a block has several:
    "output 4.1".
    """
    return f"{block[0]} {block[1]}" + (f".{block[2]}" if block[2] else "")


def presets_of(available: Sequence[BlockId]) -> dict[str, list[BlockId]]:
    """What each preset means among these blocks, given in the order in which the network runs; of
    some presets nothing.

    "masactrl" is attention layers 10 and later (arXiv 2304.08465). Of a transformer, encoder and
    decoder are its first and second half, and its kinds of blocks are presets.
    """
    of_stage: dict[str, list[BlockId]] = {}
    for block in available:
        of_stage.setdefault(block[0], []).append(block)
    if not available or available[0][0] in UNET_STAGES:
        return {
            "all": [*available],
            "encoder": of_stage.get("input", []),
            "middle": of_stage.get("middle", []),
            "decoder": of_stage.get("output", []),
            "masactrl": [*available[10:]],
        }
    half = len(available) // 2
    halves = {"all": available, "encoder": available[:half], "decoder": available[half:]}
    return {name: [*blocks] for name, blocks in halves.items()} | of_stage


def terms_of(wanted: str) -> list[str]:
    """The presets and blocks that an input `blocks` asks for."""
    return [term for t in wanted.split(",") if (term := " ".join(t.lower().split()))]


def select_blocks(
    wanted: str,
    available: Sequence[BlockId],
    node: str,
    more: Mapping[str, Sequence[BlockId]] | None = None,
) -> tuple[BlockId, ...]:
    """Resolve "all", "encoder", "middle", "decoder", "masactrl" or a list such as "input 4, output
    3-5, middle 0".

    Order is that of `available` (the order in which the network runs); presets_of says what presets
    mean, `more` are further ones.
    Raises ValueError naming the unknown word and the blocks that exist.
    """
    if not available:
        raise ValueError(
            f"{node}: this model has no block with self-attention, so there is nothing to read. "
            f"Load an SD1.5, SD2.x or SDXL "
            "checkpoint."
        )
    presets = presets_of(available) | {name: [*blocks] for name, blocks in (more or {}).items()}
    there = ", ".join(name for name, blocks in presets.items() if blocks)
    chosen: set[BlockId] = set()
    for term in terms_of(wanted):
        blocks = presets[term] if term in presets else _listed(term, available)
        if not blocks:
            raise ValueError(
                f"{node}: no attention block matches {term!r:.200}. Choose from this model's "
                f"{', '.join(dict.fromkeys(f'{b[0]} {b[1]}' for b in available))}, or write a "
                f"preset: {there}."
            )
        chosen.update(blocks)
    if not chosen:
        raise ValueError(
            f"{node}: blocks is empty. Write {there.replace(', ', ' or ')}, or a list such as "
            f"'output 3-5, middle 0'."
        )
    return tuple(b for b in available if b in chosen)


def _listed(term: str, available: Sequence[BlockId]) -> list[BlockId]:
    """The blocks of a term such as "output 3-5" or "middle 0.1"; none where it is no such term."""
    match = re.fullmatch(r"([a-z]+)\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?(?:\.(\d+))?", term)
    if match is None:
        return []
    stage, depth = match[1], match[4]
    first, last = int(match[2]), int(match[3] or match[2])
    return [
        b
        for b in available
        if b[0] == stage and first <= b[1] <= last and depth in (None, str(b[2]))
    ]
