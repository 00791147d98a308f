"""What reaches a node, before the node sees it: the host checks no value that stands where a wire
belongs, and lets NaN through.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from comfy_api.v0_0_2 import io
from torch import Tensor

WIRES = {
    "LATENT": "VAE Encode or Empty Latent Image",
    "CONDITIONING": "Subject Prompts or CLIP Text Encode",
    "MODEL": "Load Checkpoint",
    "CLIP": "Load Checkpoint",
    "VAE": "Load Checkpoint",
    "IMAGE": "Load Image or VAE Decode",
    "MASK": "Load Image (as Mask)",
    "SIGMAS": "a scheduler",
    "CLIP_VISION": "Load CLIP Vision",
    "KINDRED_INVERSION": "DDIM Invert",
    "KINDRED_REFERENCE": "Ref-UNet Feature Capture or Load Reference",
    "KINDRED_CONCEPT_ENCODER": "Concept Encoder Load",
}
SAID = (
    "strength",
    "weight",
    "dropout",
    "query_blend",
    "query_blend_end",
    "feature_injection",
    "filename_prefix",
    "save_name",
)  # of which their nodes say more
TENSORS = ("IMAGE", "MASK", "SIGMAS")
WRITTEN = (str, int, float, bool, list, tuple, dict)  # what JSON holds


def guarded(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """The node, whose `execute` now refuses what no wire carries, and numbers that are none:
    ValueError names input and remedy.
    """
    schema = node.define_schema()
    execute = node.execute.__func__
    signature = inspect.signature(execute)
    inputs = {i.id: i for i in schema.inputs}
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    known = inputs if open_ended else signature.parameters

    @functools.wraps(execute)
    def checked(cls: type, *args: Any, **kwargs: Any) -> Any:
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:  # the host drops values of other names, but not wires
            raise ValueError(
                f"{schema.display_name}: there is no input {unknown!r:.40}. Remove it; there are "
                f"{', '.join(inputs)}."
            )
        for name, value in bound_inputs(signature.bind_partial(cls, *args, **kwargs)):
            if name in inputs:
                check_input(schema, inputs[name], value)
        return execute(cls, *args, **kwargs)

    node.execute = classmethod(checked)
    return node


def check_input(schema: io.Schema, socket: io.Input, value: Any) -> None:
    """ValueError where one of the values of an input is none of its type: some grow, some nodes
    take lists.
    """
    grows = isinstance(socket, io.Autogrow.Input)
    kind = socket.template.input if grows else socket
    several = grows and isinstance(value, Mapping)
    for one in (v for v in value.values() if v is not None) if several else (value,):
        for single in one if schema.is_input_list and isinstance(one, list) else (one,):
            refuse(schema.display_name, socket.id, kind, single)


def bound_inputs(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    """Every input by its name, also those that a node takes together."""
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def refuse(node: str, name: str, socket: Any, value: Any) -> None:
    """ValueError where the value of one input is none of its type."""
    kind = socket.get_io_type()
    if kind in WIRES:
        if value is None and socket.optional or fits(kind, value):
            return
        raise ValueError(
            f"{node}: {name} is {type(value).__name__} {str(value)!r:.40}, where a wire of {kind} "
            f"belongs. Wire "
            f"{WIRES[kind]} into it."
        )
    if (
        kind in ("FLOAT", "INT")
        and name not in SAID
        and isinstance(value, float)
        and not math.isfinite(value)
    ):
        raise ValueError(
            f"{node}: {name} is {value}. Give a number from {socket.min} to {socket.max}."
        )
    if (
        kind == "STRING" and name not in SAID and any("\ud800" <= c <= "\udfff" for c in str(value))
    ):  # tokenizers take no such text
        raise ValueError(
            f"{node}: {name} is {value!r:.60}, which holds half a character. Write it again."
        )


def fits(kind: str, value: Any) -> bool:
    """Whether a value can be of a wire's kind, as far as it tells without looking into it."""
    if kind in TENSORS:
        return isinstance(value, Tensor)
    if kind == "LATENT":
        return isinstance(value, Mapping) and isinstance(value.get("samples"), Tensor)
    if kind == "CONDITIONING":
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(is_prompt, value))
    return value is not None and not isinstance(value, WRITTEN)


def is_prompt(one: Any) -> bool:
    """One entry of a CONDITIONING."""
    return (
        isinstance(one, (list, tuple))
        and len(one) == 2
        and isinstance(one[0], Tensor)
        and isinstance(one[1], Mapping)
    )
