"""Personalize and Story as one node of the search box, and as apps: from an empty canvas to pictures of the subject, in both renderers."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
import torch
from blueprints import BLUEPRINTS, inside
from hands import EMPTY, drag, found_by, search, set_field, settled, slot
from kindred.miniature.reader import Reading, consistency, load_reader, pairwise_similarity
from PIL import Image

from workflows import api_form, blueprint_file, canvas_file

PERSONALIZE, STORY = BLUEPRINTS["personalize_app"], BLUEPRINTS["story_app"]
MINIATURE = {"width": 128, "height": 128, "cfg": 4.0}
WORDS = ("consistent character", "my photo", "same face", "likeness", "cref", "personalize")


def read(pictures) -> Reading:
    """What the miniature's reader sees in pictures of files or of the host."""
    arrays = [np.asarray(Image.open(picture).convert("RGB")) for picture in pictures]
    return load_reader().read(torch.tensor(np.stack(arrays)).float() / 255)


def saved(canvas, ended) -> Reading:
    """What the pictures show that a run saved."""
    assert ended["kind"] == "execution_success", ended
    images = [
        image
        for output in canvas.outputs(ended).values()
        for image in output.get("images", ())
        if image["type"] == "output"
    ]
    return read([BytesIO(canvas.client.view(image)) for image in images])


@pytest.mark.parametrize("words", WORDS)
def test_personalize_is_found_by_what_people_call_it(canvas, words):
    canvas.load(EMPTY, "empty")
    box = search(canvas, words, (700, 400))
    canvas.page.get_by_test_id("result-item").filter(has_text=PERSONALIZE.name).first.wait_for(
        timeout=120_000
    )
    box.press("Escape")
    settled(canvas)


def test_personalize_from_an_empty_canvas(canvas, root, shots):
    """Two nodes and five wires besides nothing but the loader and the saver; the photo's subject is in the pictures."""
    canvas.load(EMPTY, "empty")
    loader = found_by(canvas, "load checkpoint", "Load Checkpoint", (260, 160))
    photo = found_by(canvas, "reference photo", "Load Photo", (260, 400))
    whole = found_by(canvas, "personalize", PERSONALIZE.name, (640, 160))
    saver = found_by(canvas, "save image", "Save Image", (1160, 160))
    for name, output in (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")):
        drag(canvas, slot(canvas, loader, output, True), slot(canvas, whole, name, False))
    drag(canvas, slot(canvas, photo, "image", True), slot(canvas, whole, "photo", False))
    drag(canvas, slot(canvas, whole, "pictures", True), slot(canvas, saver, "images", False))
    assert canvas.page.evaluate("[app.graph.nodes.length, app.graph.links.size]") == [4, 5]
    for name, value in MINIATURE.items():
        set_field(canvas, whole, name, value)
    alike = pairwise_similarity(saved(canvas, canvas.run(300)), photo_of(root)).mean()
    canvas.screenshot(shots / f"personalize_{'vue' if canvas.vue else 'canvas'}.png")
    set_field(canvas, whole, "strength", 0.0)
    set_field(canvas, whole, "seed", 1)  # it moved on after the run
    plain = pairwise_similarity(saved(canvas, canvas.run(300)), photo_of(root)).mean()
    print(f"personalize: {alike:.2f} like the photo, plain {plain:.2f}")
    assert alike > 0.5 and alike > plain + 0.3
    assert not canvas.toasts() and not canvas.errors


def photo_of(root) -> Reading:
    """The example that Load Photo offers first."""
    return read([root / "miniature" / "reference.png"])


def test_story_from_an_empty_canvas(canvas, shots):
    """One node and four wires besides nothing but the loader and the saver; the pictures show one subject."""
    canvas.load(EMPTY, "empty")
    loader = found_by(canvas, "load checkpoint", "Load Checkpoint", (260, 160))
    whole = found_by(canvas, "story of one", STORY.name, (640, 160))
    saver = found_by(canvas, "save image", "Save Image", (1160, 160))
    for name, output in (("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")):
        drag(canvas, slot(canvas, loader, output, True), slot(canvas, whole, name, False))
    drag(canvas, slot(canvas, whole, "pictures", True), slot(canvas, saver, "images", False))
    assert canvas.page.evaluate("[app.graph.nodes.length, app.graph.links.size]") == [3, 4]
    for name, value in MINIATURE.items():
        set_field(canvas, whole, name, value)
    alike = consistency(saved(canvas, canvas.run(300)))
    canvas.screenshot(shots / f"story_{'vue' if canvas.vue else 'canvas'}.png")
    set_field(canvas, whole, "strength", 0.0)
    set_field(canvas, whole, "seed", 1)  # it moved on after the run
    plain = consistency(saved(canvas, canvas.run(300)))
    print(f"story: {alike:.2f} alike, plain {plain:.2f}")
    assert alike > plain + 0.15
    assert not canvas.toasts() and not canvas.errors


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_it_opens_into_the_full_graph(canvas, name, shots):
    blueprint = BLUEPRINTS[name]
    canvas.load(json.loads(blueprint_file(blueprint).read_text("utf-8")), name)
    canvas.page.evaluate(
        "id => { const n = app.graph.getNodeById(id); app.canvas.openSubgraph(n.subgraph, n) }",
        blueprint.node,
    )
    settled(canvas, 1500)
    shown = canvas.page.evaluate("app.canvas.graph.nodes.map(n => n.type)")
    assert sorted(shown) == sorted(node["class_type"] for node in inside(api_form(name)).values())
    canvas.fit()
    canvas.screenshot(shots / f"inside_{name}_{'vue' if canvas.vue else 'canvas'}.png")
    assert not canvas.toasts() and not canvas.errors


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
@pytest.mark.parametrize("name", BLUEPRINTS)
def test_the_app_asks_runs_and_shows(server, chromium, name, vue, shots):
    """From the template browser: the fields under their names, Run, the pictures large beside them."""
    blueprint = BLUEPRINTS[name]
    with chromium.page(server.url, vue=vue) as canvas:
        canvas.command("Comfy.BrowseTemplates")
        canvas.page.locator(f'[data-testid="template-workflow-{canvas_file(name).stem}"]').click(
            timeout=120_000
        )
        fields = canvas.page.get_by_test_id("builder-widget-label")
        fields.first.wait_for(timeout=120_000)
        labels = {given.name: given.label or given.name for given in blueprint.inputs}
        asked = [blueprint.labels.get(ask, labels.get(ask[1])) for ask in blueprint.asks]
        assert [text.strip() for text in fields.all_inner_texts()] == asked
        canvas.page.evaluate("window.__events = []")
        settled(canvas, 1000)
        canvas.screenshot(shots / f"app_{name}_{'vue' if vue else 'canvas'}.png")
        canvas.listen()
        canvas.page.get_by_test_id("linear-run-button-icon").click()
        ended = canvas.wait(300)
        pictures = len(saved(canvas, ended))
        canvas.page.wait_for_function(
            "n => [...document.querySelectorAll('img')].filter(i => i.src.includes('type=output')).length >= n",
            arg=1,
            timeout=120_000,
        )
        settled(canvas, 1000)
        canvas.screenshot(shots / f"app_ran_{name}_{'vue' if vue else 'canvas'}.png")
        lines = next(
            node["inputs"]["prompts"]
            for node in api_form(name).values()
            if "New pictures" in node["_meta"]["title"] or "story, one" in node["_meta"]["title"]
        )
        assert pictures == len(lines.splitlines())
        assert not canvas.toasts() and not canvas.errors
