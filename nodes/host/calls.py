"""What the host says of a call of the model and of the prompts in it, as the values of
models/run.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID, uuid4

from ...models.network.call import Part, Role
from ...models.run import Said
from .model import REPEATS, SUBJECT, TEXT


def said_in(options: Mapping[str, Any]) -> Said:
    """Of transformer_options, or of a UNet's extra_options with the attention's block."""
    block, shape = options.get("block"), options.get("original_shape")
    return Said(
        tuple(options.get("uuids") or ()),
        shape[0] if shape is not None else 0,
        tuple(shape[2:]) if shape is not None else None,
        (*block, options.get("block_index")) if isinstance(block, tuple) else None,
        tuple(options.get("activations_shape", ())[2:]),
    )


def named_parts(conds: Mapping[str, list[dict[str, Any]]]) -> dict[UUID, Part]:
    """Give every processed cond a uuid of its own, since the host shares one between area twins,
    and tell what each is: -> by uuid.
    """
    parts = {}
    for kind, entries in conds.items():
        role = Role.UNCOND if "negative" in kind else Role.COND
        for entry in entries:
            entry["uuid"] = uuid4()
            parts[entry["uuid"]] = _part(role, entry)
    return parts


def require_room(conds: Mapping[str, list[dict[str, Any]]], pictures: int) -> None:
    """ValueError where Subject Prompts wrote more lines than the batch has pictures: the host would
    drop the others without a word.
    """
    for entry in (entry for entries in conds.values() for entry in entries):
        rows, text = entry.get("cross_attn"), entry.get(TEXT)
        if rows is None or text is None or rows.shape[0] <= pictures:
            continue
        dropped = "; ".join(str(text).splitlines()[pictures:])
        raise ValueError(
            f"Subject Prompts: {rows.shape[0]} lines are wired into a sampler whose latent has "
            f"{pictures} picture{'s' * (pictures > 1)}, so {rows.shape[0] - pictures} would never "
            f"be drawn ({dropped:.200}). Wire count into the batch_size of Empty Latent Image, or "
            "write one line per picture."
        )


def _part(role: Role, entry: Mapping[str, Any]) -> Part:
    text = getattr(entry.get("model_conds", {}).get("c_crossattn"), "cond", None)
    rows = entry.get("cross_attn")
    return Part(
        role,
        tuple(entry["area"]) if entry.get("area") else None,
        None if text is None else text.shape[1],
        entry.get(REPEATS, (1,)),
        entry.get(SUBJECT),
        None if rows is None else rows.shape[1],
    )
