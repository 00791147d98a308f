"""Folding part of a workflow into a subgraph loses no wire and no value; what ships in subgraphs/ is such a fold."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("playwright.sync_api")  # the program that draws them imports the browser

from archive import shipped
from blueprints import BLUEPRINTS, IN, OUT, alone, flat, fold, inside, number, with_values

from workflows import api_form, as_graph, blueprint_file, canvas_form

NAMES = list(BLUEPRINTS)


def drawn(graph) -> dict:
    """An API form as the page writes it, flat: a socket for every input, a link for every wire."""
    nodes, links = {}, []
    for key, node in flat(graph).items():
        sockets = [
            {"name": name, "type": name.upper(), "link": None}
            | ({} if isinstance(value, list) else {"widget": {"name": name}})
            for name, value in node["inputs"].items()
        ]
        outputs = [{"name": str(i), "type": f"OUT{i}", "links": []} for i in range(3)]
        nodes[key] = {"id": int(key), "type": node["class_type"], "size": [200, 100]}
        nodes[key] |= {"inputs": sockets, "outputs": outputs}
    for key, node in flat(graph).items():
        for index, value in enumerate(node["inputs"].values()):
            if isinstance(value, list):
                number_ = len(links) + 1
                links.append([number_, int(value[0]), value[1], int(key), index, "ANY"])
    return {"nodes": list(nodes.values()), "links": links, "last_link_id": len(links), "extra": {}}


def wires(workflow) -> set[tuple]:
    """Every wire of a folded workflow as (node, slot, node, input's name), followed through the subgraph's ends."""
    (subgraph,) = workflow["definitions"]["subgraphs"]
    (outer,) = [node for node in workflow["nodes"] if node["type"] == subgraph["id"]]
    nodes = {node["id"]: node for node in (*workflow["nodes"], *subgraph["nodes"])}
    root = [tuple(link[1:5]) for link in workflow["links"]]
    ends = ("origin_id", "origin_slot", "target_id", "target_slot")
    sub = [tuple(link[end] for end in ends) for link in subgraph["links"]]
    into = {slot: (key, out) for key, out, target, slot in root if target == outer["id"]}
    out_of = {slot: (key, out) for key, out, target, slot in sub if target == OUT}
    found = set()
    for key, out, target, slot in [*root, *sub]:
        if target in (outer["id"], OUT) or (key == IN and out not in into):
            continue
        start = into[out] if key == IN else out_of[out] if key == outer["id"] else (key, out)
        found.add((*start, target, nodes[target]["inputs"][slot]["name"]))
    return found


def wanted(graph) -> set[tuple]:
    return {
        (int(value[0]), value[1], int(key), name)
        for key, node in flat(graph).items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }


@pytest.mark.parametrize("name", NAMES)
def test_no_wire_is_lost_and_none_is_made(name):
    graph = api_form(name)
    assert wires(fold(drawn(graph), graph, BLUEPRINTS[name])) == wanted(graph)
    assert wires(canvas_form(name)) == wanted(graph), "run python3 dev.py workflows"


@pytest.mark.parametrize("name", NAMES)
def test_the_sockets_say_what_the_links_say(name):
    """Of what ships, in the root graph and in the subgraph."""
    workflow = canvas_form(name)
    (subgraph,) = workflow["definitions"]["subgraphs"]
    ends = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    told = [tuple(link[end] for end in ends) for link in subgraph["links"]]
    for graph, links in ((workflow, [link[:5] for link in workflow["links"]]), (subgraph, told)):
        for node in graph["nodes"]:
            for index, socket in enumerate(node.get("inputs", ())):
                mine = [link[0] for link in links if tuple(link[3:]) == (node["id"], index)]
                assert [socket["link"]] == (mine or [None])
    for index, end in enumerate(subgraph["inputs"]):
        assert sorted(end["linkIds"]) == sorted(t[0] for t in told if t[1:3] == (IN, index))


@pytest.mark.parametrize("name", NAMES)
def test_steps_schedule_size_and_subject_are_typed_once(name):
    """Of every node inside that has such a field, one is on the outside and the others are wired to it."""
    blueprint, graph = BLUEPRINTS[name], inside(api_form(name))
    fields = {target for given in blueprint.inputs for target in given.targets}
    for field in ("scheduler", "steps", "width", "height", "subject", "sampler_name", "cfg"):
        typed = {
            (number(key), field)
            for key, node in graph.items()
            if not isinstance(node["inputs"].get(field, []), list)
            and not (field in ("steps", "scheduler") and "sigmas" in node["inputs"])
        }
        assert typed <= fields, f"{field} is typed in {typed - fields} and not on the outside"
    assert len({given.name for given in blueprint.inputs}) == len(blueprint.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_the_blueprint_is_the_apps_own_node_with_values_for_peoples_models(name):
    blueprint = BLUEPRINTS[name]
    made = json.loads(blueprint_file(blueprint).read_text("utf-8"))
    (node,), (inner,) = made["nodes"], made["definitions"]["subgraphs"]
    (ours,) = canvas_form(name)["definitions"]["subgraphs"]
    assert node["type"] == inner["id"] and not made["links"]
    assert inner["links"] == ours["links"] and inner["inputs"] == ours["inputs"]
    fields = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    values = dict(zip(fields, node["widgets_values"], strict=True))
    assert {key: values[key] for key in blueprint.values} == dict(blueprint.values)
    typed = with_values(api_form(name), blueprint)
    for given in blueprint.inputs:
        if given.name in values:
            key, field = given.targets[0]
            assert values[given.name] == typed[f"{blueprint.node}:{key}"]["inputs"][field]
    assert made == alone(made | {"nodes": [node]}, blueprint) | {"id": made["id"]}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_ships_under_the_name_that_the_search_box_shows(name):
    file = blueprint_file(BLUEPRINTS[name])
    assert f"subgraphs/{file.name}" in shipped()
    made = json.loads(file.read_text("utf-8"))
    assert made["nodes"][0]["title"] == file.stem
    assert made["extra"]["BlueprintSearchAliases"] == list(BLUEPRINTS[name].aliases)


@pytest.mark.parametrize("name", NAMES)
def test_the_app_asks_for_fields_that_there_are(name):
    """Each is a field of a node of the root graph that nothing is wired into, and the pictures come from a node that keeps them."""
    workflow, blueprint = canvas_form(name), BLUEPRINTS[name]
    nodes = {node["id"]: node for node in workflow["nodes"]}
    asks = workflow["extra"]["linearData"]["inputs"]
    assert workflow["extra"]["linearMode"] and "linearMode" not in as_graph(name)["extra"]
    for key, field in asks:
        (socket,) = [s for s in nodes[key]["inputs"] if s["name"] == field]
        assert "widget" in socket and socket["link"] is None
    assert nodes[blueprint.shows]["type"] == "SaveImage"
