"""A node that shows how far it is shows its result alone once it is done, in both renderers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hands import settled

from workflows import api_form

COUNT = """() => { window.__previews = 0;
    app.api.addEventListener('b_preview_with_metadata', () => window.__previews++) }"""


def leading_to(key: str, name: str, **changes: Any) -> dict[str, Any]:
    """A node of a workflow and what it hangs on; changes: inputs of that node."""
    graph = api_form(name)
    wanted = [key]
    for one in wanted:
        links = [v for v in graph[one]["inputs"].values() if isinstance(v, list)]
        wanted += [link[0] for link in links if link[0] not in wanted]
    kept = json.loads(json.dumps({one: graph[one] for one in wanted}))
    kept[key]["inputs"] |= changes
    return kept


def shown(canvas, graph: dict[str, Any], key: str) -> list[str]:
    """The addresses of the pictures on the node after a run in which previews came."""
    canvas.load_api(graph, "previews")
    canvas.page.evaluate(COUNT)
    assert canvas.run(300)["kind"] == "execution_success"
    canvas.wait_for_pictures(int(key))
    settled(canvas, 1500)
    assert canvas.page.evaluate("window.__previews") > 0
    return canvas.pictures(int(key))


def test_the_loss_curve_stands_once_on_the_node_that_trains(canvas, shots):
    name = f"once_{'vue' if canvas.vue else 'canvas'}"  # what the host has in its cache sends none
    graph = leading_to("7", "train_concept_encoder", steps=2, save_name=name)
    [address] = shown(canvas, graph, "7")
    canvas.fit()
    canvas.screenshot(shots / f"curve_{name}.png")
    assert "kindred_loss" in address and "type=temp" in address
    assert not canvas.toasts() and not canvas.errors


@pytest.mark.parametrize("vue", [False, True], ids=["canvas", "vue"])
def test_a_photo_that_is_read_shows_its_mask_where_previews_are_on(server, chromium, vue):
    steps = 4 if vue else 5  # what the host has in its cache sends none
    graph = leading_to("6", "self_attention_only", steps=steps)
    graph["20"] = {"class_type": "MaskPreview", "inputs": {"mask": ["6", 1]}}
    try:
        with chromium.page(server.url, vue, Comfy__Execution__PreviewMethod="latent2rgb") as canvas:
            [address] = shown(canvas, graph, "6")
            assert "/view?" in address and "type=temp" in address
            assert not canvas.toasts() and not canvas.errors
    finally:
        server.client.json("/api/settings/Comfy.Execution.PreviewMethod", "default")
