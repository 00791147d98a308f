"""The pack inside the real host."""

import re
import sys

import pytest
from checkout import ROOT
from comfy_api.v0_0_2 import io

import nodes


def test_the_host_loads_the_pack(pack, host):
    """The names that tests import are the modules that the host runs, not a second copy."""
    assert sys.modules["kindred"] is pack and pack.__file__ == str(ROOT / "__init__.py")
    offered = {
        name: node for name, node in host.NODE_CLASS_MAPPINGS.items() if name.startswith("Kindred")
    }
    assert all(
        node.RELATIVE_PYTHON_MODULE == f"custom_nodes.{ROOT.name}" for node in offered.values()
    )
    assert all(
        sys.modules[node.__module__].__name__.startswith(pack.__name__) for node in offered.values()
    )


def test_the_pack_leaves_only_its_two_names_at_the_door(pack):
    """V1's NODE_CLASS_MAPPINGS would silently win over comfy_entrypoint."""
    assert (
        not hasattr(pack, "NODE_CLASS_MAPPINGS")
        and callable(pack.comfy_entrypoint)
        and pack.WEB_DIRECTORY == "./web"
    )


# what every node tells of itself, also those of later days ------------------------------------------------------------------

SCHEMAS = {
    name: node.define_schema()
    for name, node in nodes.NODE_CLASS_MAPPINGS.items()
    if name.startswith("Kindred")
}
each_node = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


def widgets(schema, kind):
    return [i for i in schema.inputs if isinstance(i, kind.Input)]


@each_node
def test_a_node_says_what_it_is(schema):
    assert schema.node_id in SCHEMAS and re.fullmatch(r"Kindred[A-Za-z]+", schema.node_id)
    assert schema.category == "Kindred" or schema.category.startswith("Kindred/")
    assert re.fullmatch(r"[A-Z].*\.", schema.description) and len(schema.description) > 40
    assert len({alias.lower() for alias in schema.search_aliases}) >= 3
    assert schema.display_name and schema.display_name.lower() not in {
        alias.lower() for alias in schema.search_aliases
    }


@each_node
def test_every_input_and_output_says_what_it_is(schema):
    for told in (*schema.inputs, *schema.outputs):
        assert len(told.tooltip or "") > 6 and told.tooltip == told.tooltip.strip(), told
    names = [told.display_name for told in schema.outputs]
    assert all(names) and len(set(names)) == len(names)


@each_node
def test_numbers_have_an_honest_range(schema):
    """Both ends, a step that the default lies on, and a default inside; whole numbers step by 1, as the host's own do."""
    for number in (*widgets(schema, io.Int), *widgets(schema, io.Float)):
        assert (
            number.min is not None
            and number.max is not None
            and number.min <= number.default <= number.max
        ), number.id
        step = number.step or (1 if isinstance(number, io.Int.Input) else 0)
        assert 0 < step <= number.max - number.min, number.id
        ticks = (
            (number.default - (0 if number.round is False else number.min)) / step
            if isinstance(number, io.Float.Input)
            else 0
        )
        assert abs(ticks - round(ticks)) < 1e-6, number.id


@each_node
def test_a_seed_that_makes_another_picture_moves_by_itself_and_no_other_does(schema):
    for seed in [i for i in schema.inputs if i.id == "seed"]:
        assert seed.control_after_generate is (schema.node_id == "KindredAnchorSampler")
        assert seed.control_after_generate or seed.advanced


@each_node
def test_the_one_dial_comes_first_and_weights_are_for_experts(schema):
    shown = [
        i
        for i in schema.inputs
        if isinstance(
            i, (io.Int.Input, io.Float.Input, io.Combo.Input, io.String.Input, io.Boolean.Input)
        )
    ]
    ids = [i.id for i in shown]
    assert ("strength" in ids) == ("weight" in ids)
    for dial in (i for i in shown if i.id == "strength"):
        assert ids[0] == "strength" and not dial.advanced
        # past 1 where that was measured to help: docs/evaluation.md, "Presets"
        most = 2.0 if schema.node_id == "KindredCrossAttnDetailInject" else 1.0
        assert (dial.default, dial.min, dial.max, dial.step, dial.display_mode) == (
            1.0,
            0.0,
            most,
            0.05,
            io.NumberDisplay.slider,
        )
    assert all(
        i.advanced
        for i in shown
        if i.id in ("weight", "weight_mode", "blocks", "halves", "precision")
        or i.id.endswith("_percent")
    )
