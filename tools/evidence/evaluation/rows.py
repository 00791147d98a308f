"""Rows of the tables: a name and the nodes' inputs that it sets, as a person writes them on the command line."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Kind = type | tuple[str, ...]  # of a value, or its choices as the nodes name them
HALVES, MODES = (
    ("cond only", "both", "shared"),
    ("logit bias", "post softmax", "key scale", "output blend"),
)
PRESETS = (  # of Masked Self-Attn Inject, and of Cross-Attn Detail Inject
    ("custom", "identity", "beside an encoder", "gentle"),
    ("custom", "identity", "gentle", "strong"),
)
WINDOW: dict[str, Kind] = {"start_percent": float, "end_percent": float}
CAPTURE: dict[str, Kind] = {
    "mask_threshold": ("otsu", "value"),
    "mask_value": float,
    "mask_steps": int,
    "mask_blocks": str,
    "precision": ("as computed", "float16"),
    "keeps": ("automatic", "hidden states", "keys and values"),
    "token_share": float,
}
INJECT: dict[str, Kind] = {
    "strength": float,
    "weight": float,
    "weight_mode": MODES,
    "blocks": str,
    "halves": HALVES,
    "text_share": ("kept", "plain"),
    "preset": PRESETS[0],
} | WINDOW
CONCEPT: dict[str, Kind] = {
    f"concept.{name}": kind
    for name, kind in ({"merge": ("as trained", "concat", "add")} | INJECT).items()
    if name != "text_share"
} | {"concept.preset": PRESETS[1]}
STORY: dict[str, Kind] = {
    "strength": float,
    "anchors": int,
    "seed": int,
    "weight": float,
    "dropout": float,
    "query_blend": float,
    "feature_injection": float,
    "query_blend_end": float,
    "blend_end_percent": float,
    "injection_start_percent": float,
    "injection_end_percent": float,
    "blocks": str,
    "mask_blocks": str,
    "halves": HALVES[:2],
    "order": ("fast", "official"),
    "align_keys": bool,
    "text_share": ("kept", "plain"),
}
RIVALS = (  # what is measured instead of the nodes of the pack
    "none",
    "img2img",
    "reference-only",
    "textual inversion",
    "lora",
    "lora with prior",
)
STORY_RIVALS = ("none", "one seed", "description", "lora", "style aligned")
OWN = {  # what no node has: how a row is made
    "personalize": {
        "self": ("on", "off"),
        "mask": ("word", "true", "none"),
        "photo": ("own", "another"),
        "inverted": ("no", "yes"),
        "method": ("ddim", "fireflow", "forward noise", "edit-friendly ddpm"),
        "cfg": float,
        "rival": RIVALS,
        "denoise": float,
        "train_steps": int,
        "train_rate": float,
    },
    "story": {
        "node": ("on", "off"),
        "mask": ("word", "none"),
        "freeu": ("no", "yes"),
        "cfg": float,
        "rival": STORY_RIVALS,
        "train_steps": int,
        "train_rate": float,
    },
}
INPUTS = {"personalize": CAPTURE | INJECT | CONCEPT, "story": STORY}
KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Row:
    """A name and inputs; two rows of the same inputs are measured once."""

    name: str
    inputs: tuple[tuple[str, Any], ...] = ()  # sorted

    @staticmethod
    def parse(task: str, text: str) -> Row:
        """ "name: input=value, ..."; a value may hold commas ("blocks=output 3-5, middle 0"). SystemExit names a wrong input."""
        name, _, rest = (part.strip() for part in text.partition(":"))
        refused = f"evaluate: row {name!r} "
        if not name:
            raise SystemExit(f'{refused}needs a name, as in "strong: weight=2".')
        pairs: dict[str, str] = {}
        for piece in rest.split(","):
            key, equals, value = (part.strip() for part in piece.partition("="))
            if equals:
                pairs[key] = value
            elif pairs:
                pairs[next(reversed(pairs))] += f", {key}"  # the value's own comma
            elif key:
                raise SystemExit(f"{refused}sets {key!r} without a value; write {key}=VALUE.")
        every = INPUTS[task] | OWN[task]
        if unknown := sorted(pairs.keys() - every.keys()):
            raise SystemExit(f"{refused}sets {', '.join(unknown)}; known are {', '.join(every)}.")
        return Row(
            name,
            tuple(
                sorted(
                    (key, typed(refused, key, value, every[key])) for key, value in pairs.items()
                )
            ),
        )

    def get(self, name: str, default: Any) -> Any:
        return dict(self.inputs).get(name, default)

    def of(self, names: Collection[str], prefix: str = "") -> dict[str, Any]:
        """The inputs that one node has, named as it names them."""
        return {name.removeprefix(prefix): value for name, value in self.inputs if name in names}


def typed(refused: str, name: str, value: str, kind: Kind) -> Any:
    """A value as the node takes it. SystemExit where it is none; names of blocks are the node's to judge."""
    if isinstance(kind, tuple):
        if value not in kind:
            raise SystemExit(f"{refused}sets {name} to {value!r}; it is one of {', '.join(kind)}.")
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise SystemExit(f"{refused}sets {name} to {value!r}, which is not {KIND_NAMES[bool]}.")
        return value.lower() == "true"
    try:
        if kind is not float or math.isfinite(float(value)):
            return kind(value)
        raise ValueError(value)
    except ValueError:
        raise SystemExit(
            f"{refused}sets {name} to {value!r}, which is not {KIND_NAMES[kind]}."
        ) from None


def rows_of(task: str, texts: Mapping[str, str]) -> tuple[Row, ...]:
    return tuple(Row.parse(task, f"{name}: {inputs}") for name, inputs in texts.items())
