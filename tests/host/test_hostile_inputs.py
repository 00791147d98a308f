"""What only the API can send: a value where a wire belongs, an input that is none, NaN. Every node says so before it does anything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfy_api.v0_0_2 import io

import nodes

OURS = {
    name: kind for name, kind in nodes.NODE_CLASS_MAPPINGS.items() if name.startswith("Kindred")
}
WRONG = (
    "x",
    "",
    5,
    0.5,
    True,
    {},
    {"samples": 1},
    {"samples": None},
    [],
    ["a"],
    [[1, {}]],
    [[torch.ones(1), {}, 1]],
    [[torch.ones(1)]],
    (1, 2),
)
NUMBERS = ("FLOAT", "INT", "STRING", "BOOLEAN", "COMBO")
OF_THEIR_OWN = (
    "strength",
    "weight",
    "dropout",
    "query_blend",
    "query_blend_end",
    "feature_injection",
)  # refused by the node, elsewhere
NAMES_OF_FILES = ("filename_prefix", "save_name")  # test_hostile_names.py


def inputs(kind: type) -> list[tuple[str, str, Any]]:
    """Name, type and the input of a node; of one that grows, its socket's."""
    schema = kind.define_schema()
    return [
        (
            i.id,
            (one := i.template.input if isinstance(i, io.Autogrow.Input) else i).get_io_type(),
            one,
        )
        for i in schema.inputs
    ]


def given(kind: type, name: str, value: Any) -> dict[str, Any]:
    schema = kind.define_schema()
    asked = next(i for i in schema.inputs if i.id == name)
    return {
        name: {"image0": value}
        if isinstance(asked, io.Autogrow.Input)
        else [value]
        if schema.is_input_list
        else value
    }


@pytest.mark.parametrize("name", OURS)
def test_a_value_where_a_wire_belongs_is_refused(name):
    kind, seen = OURS[name], 0
    for key, told, asked in inputs(kind):
        if told in NUMBERS:
            continue
        for value in (
            WRONG
            if asked.optional or isinstance(given(kind, key, None)[key], dict)
            else (*WRONG, None)
        ):
            with pytest.raises(ValueError) as refused:
                kind.execute(**given(kind, key, value))
            said = str(refused.value)
            assert (
                said.startswith(f"{kind.define_schema().display_name}: {key} is ")
                and f"a wire of {told} belongs. Wire " in said
            )
            seen += 1
    assert seen or name in ("KindredLoadPhoto", "KindredLoadReference")


@pytest.mark.parametrize("name", OURS)
def test_a_number_that_is_none_is_refused(name):
    kind = OURS[name]
    for key, told, asked in inputs(kind):
        if told == "FLOAT" and key not in OF_THEIR_OWN:
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(
                    ValueError,
                    match=f"{key} is {value}. Give a number from {asked.min} to {asked.max}",
                ):
                    kind.execute(**given(kind, key, value))


@pytest.mark.parametrize("name", OURS)
def test_half_a_character_is_refused(name):
    """JSON may hold one; tokenizers raise a TypeError of their own."""
    kind = OURS[name]
    for key, told, _ in inputs(kind):
        if told == "STRING" and key not in NAMES_OF_FILES:
            with pytest.raises(
                ValueError, match=f"{key} is .*which holds half a character. Write it again"
            ):
                kind.execute(**given(kind, key, "a\ud800cat"))


@pytest.mark.parametrize("name", OURS)
def test_an_input_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="there is no input 'extra'. Remove it; there are "):
        OURS[name].execute(extra=5)
