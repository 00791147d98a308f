"""Every shipped workflow on the canvas, in both renderers: opens cleanly, is its API form, lies well, and runs at a press of Run."""

from __future__ import annotations

import json
import os
from itertools import combinations

import pytest

from blueprints import BLUEPRINTS
from layout import READABLE
from newest_frontend import VARIABLE

from workflows import (
    api_form,
    arrange,
    as_graph,
    blueprint_file,
    canvas_form,
    cleaned,
    draw,
    draw_blueprint,
    names,
    transformers,
)

STEPS = 10  # a divisor of 1000: ddim_uniform then has as many steps as asked for
SHOWING = {
    "SaveImage",
    "PreviewImage",
    "MaskPreview",
    "KindredRefUNetCapture",
    "KindredConceptEncoderTrain",
    "KindredReferencePreview",
    "KindredComparisonGrid",
    "KindredConsistencyScore",
    "KindredBlockProbe",
}
AS_THEY_ARE = ("story_more_pictures",)  # its steps are those of its subject
drawn_by_the_pinned_page = pytest.mark.skipif(
    bool(os.environ.get(VARIABLE)), reason="another frontend may write other sizes and fields"
)
OPEN = "key => { const n = app.graph.getNodeById(key); if (n.flags.collapsed) n.collapse() }"
SMALL = {"steps": 3, "width": 128, "height": 128}  # for transformers: their photos are larger


def overlap(a, b) -> bool:
    return (
        min(a["x"] + a["width"], b["x"] + b["width"]) - max(a["x"], b["x"]) > 1
        and min(a["y"] + a["height"], b["y"] + b["height"]) - max(a["y"], b["y"]) > 1
    )


def plain(graph) -> dict:
    return {key: (node["class_type"], node["inputs"]) for key, node in graph.items()}


@pytest.mark.parametrize("name", names())
def test_it_opens_without_a_complaint_and_is_its_api_form(canvas, name, shots):
    canvas.load(as_graph(name), name)
    canvas.screenshot(shots / f"{name}_{'vue' if canvas.vue else 'canvas'}.png")
    assert not canvas.toasts() and not canvas.errors
    assert plain(canvas.prompt()) == plain(api_form(name))
    missing = canvas.page.evaluate(
        "app.graph.nodes.filter(n => n.has_errors || n.type === undefined).map(n => n.type)"
    )
    assert not missing
    boxes = {
        int(key): canvas.box(int(key))
        for key in canvas.page.evaluate("app.graph.nodes.map(n => n.id)")
    }
    lying = [(a, b) for a, b in combinations(sorted(boxes), 2) if overlap(boxes[a], boxes[b])]
    assert not lying, f"nodes of {name} lie on one another: {lying}"


@drawn_by_the_pinned_page
@pytest.mark.parametrize("name", names())
def test_the_file_is_what_the_program_makes_of_the_api_form(server, chromium, name, program):
    """`python3 dev.py workflows` was run after the last change of the API form, a node's widgets, or the notes."""
    assert canvas_form(name) == draw(program, name)


@drawn_by_the_pinned_page
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_blueprint_is_what_the_program_makes_of_the_api_form(program, name):
    file = blueprint_file(BLUEPRINTS[name])
    assert json.loads(file.read_text("utf-8")) == draw_blueprint(program, name)


@pytest.fixture(scope="module")
def program(server, chromium):
    with chromium.page(server.url, vue=False) as page:
        yield page


def test_groups_read_down_or_to_the_right():
    """In the order of the API form each is right of or below all before it, and none lies on another."""
    for name in names():
        boxes = [group["bounding"] for group in canvas_form(name)["groups"]]
        assert len(boxes) >= 3
        for (x, y, width, height), (left, top, _, _) in combinations(boxes, 2):
            assert left >= x + width or top >= y + height, name
        named = [dict(zip(("x", "y", "width", "height"), box)) for box in boxes]
        assert not [pair for pair in combinations(named, 2) if overlap(*pair)]


@pytest.mark.parametrize("name", names())
def test_it_opens_readable_on_a_screen_of_1600_by_900(canvas, name):
    """As ComfyUI opens a template, fitted; the classic renderer draws no letters below 8 pixels of 14."""
    if canvas.vue:
        pytest.skip("the new renderer draws letters at every scale")
    canvas.load(as_graph(name), name)
    opened = canvas.page.evaluate("app.canvas.ds.scale")
    print(f"{name} opens at {opened:.3f}")
    assert opened > READABLE


@pytest.mark.parametrize("name", names())
def test_it_runs_at_a_press_of_run(chromium, server, name, shots):
    """In the new renderer, with few steps; every node that keeps or shows pictures shows one."""
    with chromium.page(server.url, vue=True) as canvas:
        canvas.load(as_graph(name), name)
        if name not in AS_THEY_ARE:
            canvas.page.evaluate(
                """wanted => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                                    if (w.name in wanted) w.value = wanted[w.name] }""",
                SMALL if name in transformers() else {"steps": STEPS},
            )
            canvas.page.evaluate(
                """steps => { for (const n of app.graph.nodes.filter(n => n.title === 'Steps of all'))
                                  n.widgets[0].value = steps }""",
                STEPS,
            )
        ended = canvas.run(300)
        assert ended["kind"] == "execution_success", ended
        outputs = canvas.outputs(ended)
        assert all(output.get("images") or "text" in output for output in outputs.values())
        for key, node in api_form(name).items():
            if node["class_type"] in SHOWING and ":" not in key:
                canvas.page.evaluate(OPEN, int(key))
                canvas.wait_for_pictures(int(key))
        canvas.screenshot(shots / f"ran_{name}.png")
        assert not canvas.toasts() and not canvas.errors


def test_laying_out_keeps_every_node_and_link():
    name = "personalize"
    drawn = canvas_form(name)
    bare = drawn | {"nodes": [node for node in drawn["nodes"] if node["type"] != "MarkdownNote"]}
    made = arrange(name, api_form(name), bare)
    assert made["links"] == drawn["links"] and {n["id"] for n in made["nodes"]} == {
        n["id"] for n in drawn["nodes"]
    }
    assert all(
        node["properties"].get("cnr_id") in ("kindred", "comfy-core")
        for node in cleaned(name, made)["nodes"]
        if node["type"] != "MarkdownNote"
    )
