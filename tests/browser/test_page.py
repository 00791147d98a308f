"""What a person does on the page, in both renderers: finds a node, drags, wires and runs it, reads its help and its errors."""

from __future__ import annotations

import pytest
from canvas import CLOSE_TOAST, TOAST
from client import Client
from hands import EMPTY, drag, found_by, grip, set_field, settled, slot

from workflows import CANVAS, canvas_file, names


def test_the_template_browser_lists_every_workflow_and_opens_one(canvas, shots):
    canvas.command("Comfy.BrowseTemplates")
    for name in names():
        canvas.page.wait_for_selector(
            f'[data-testid="template-workflow-{canvas_file(name).stem}"]',
            state="attached",
            timeout=120_000,
        )
    canvas.page.get_by_text("kindred", exact=True).first.click()
    settled(canvas, 1500)
    canvas.page.wait_for_function(
        """() => [...document.querySelectorAll('[data-testid^="template-workflow-"] img')]
        .filter(i => i.naturalWidth === 480).length >= 4""",
        timeout=120_000,
    )  # our thumbnails; the page's own stand-in has 224
    canvas.screenshot(shots / f"templates_{'vue' if canvas.vue else 'canvas'}.png")
    canvas.page.locator('[data-testid="template-workflow-story"]').click()
    canvas.page.wait_for_function(
        "() => app.graph.nodes.some(n => n.type === 'KindredConsiStory')", timeout=120_000
    )
    settled(canvas)
    assert not canvas.toasts() and not canvas.errors


def test_a_node_is_found_by_its_alias_dragged_wired_and_run(canvas, shots):
    """Load Photo by a word of its aliases, Preview Image by its name; the picture appears."""
    canvas.load(EMPTY, "empty")
    photo = found_by(canvas, "reference photo", "Load Photo", (500, 420))
    assert canvas.page.evaluate("id => app.graph.getNodeById(id).type", photo) == "KindredLoadPhoto"
    preview = found_by(canvas, "preview image", "Preview Image", (1000, 420))
    assert canvas.page.evaluate("id => app.graph.getNodeById(id).type", preview) == "PreviewImage"
    before = canvas.page.evaluate("id => [...app.graph.getNodeById(id).pos]", preview)
    x, y = grip(canvas, preview)
    drag(canvas, (x, y), (x + 120, y + 80))
    after = canvas.page.evaluate("id => [...app.graph.getNodeById(id).pos]", preview)
    scale = canvas.page.evaluate("app.canvas.ds.scale")
    assert [round((b - a) * scale) for a, b in zip(before, after)] == pytest.approx(
        [120, 80], abs=12
    )  # snapping is the page's
    drag(canvas, slot(canvas, photo, "image", True), slot(canvas, preview, "images", False))
    assert canvas.prompt()[str(preview)]["inputs"]["images"] == [str(photo), 0]
    assert canvas.run(60)["kind"] == "execution_success"
    canvas.wait_for_pictures(preview)
    canvas.screenshot(shots / f"wired_{'vue' if canvas.vue else 'canvas'}.png")
    assert not canvas.toasts() and not canvas.errors


def test_the_help_panel_opens_with_the_nodes_picture(canvas, shots):
    canvas.load(CANVAS / "story.json")
    node = canvas.node("KindredConsiStory")
    canvas.page.evaluate(
        "id => { app.canvas.deselectAll?.(); app.canvas.select(app.graph.getNodeById(id)) }", node
    )
    canvas.page.mouse.click(*grip(canvas, node))
    settled(canvas, 600)
    canvas.page.get_by_test_id("info-button").first.click()
    canvas.page.get_by_text("Makes the pictures of one batch show the same subject").first.wait_for(
        timeout=120_000
    )
    canvas.page.wait_for_function(
        """() => [...document.querySelectorAll('img')]
        .some(i => i.src.includes('/docs/images/KindredConsiStory.jpg') && i.naturalWidth > 100)""",
        timeout=120_000,
    )
    canvas.screenshot(shots / f"help_{'vue' if canvas.vue else 'canvas'}.png")


def test_an_error_in_a_node_is_said_at_once_in_our_sentence(canvas, shots):
    """A subject of marks alone, which only the tokenizer knows: a toast says it in the node's words, and goes when the next run begins."""
    canvas.load(CANVAS / "story.json")
    set_field(canvas, canvas.node("KindredSubjectPrompts"), "subject", "()")
    ended = canvas.run(60)
    assert (
        ended["kind"] == "execution_error"
        and ended["detail"]["node_type"] == "KindredSubjectPrompts"
    )
    toast = canvas.page.locator(TOAST).filter(has_text="contain the subject")
    toast.wait_for(timeout=120_000)
    canvas.screenshot(shots / f"error_{'vue' if canvas.vue else 'canvas'}.png")
    said = toast.inner_text()
    assert "Subject Prompts" in said and said.count("Subject Prompts") == 1 and "()" in said
    canvas.run(60)
    settled(canvas, 1500)
    assert toast.count() == 1, "of two runs with one mistake one sentence stands"
    toast.locator(CLOSE_TOAST).click()
    canvas.page.get_by_test_id("error-overlay-see-errors").click()
    canvas.page.get_by_text("contain the subject").first.wait_for(timeout=120_000)


def test_what_is_refused_before_anything_runs_is_said_at_once_too(canvas):
    """A subject that no line contains: the host repeats the sentence for every input, and the toast says it once."""
    canvas.load(CANVAS / "story.json")
    set_field(canvas, canvas.node("KindredSubjectPrompts"), "subject", "zebra")
    canvas.press_run()
    toast = canvas.page.locator(TOAST).filter(has_text="'zebra'")
    toast.wait_for(timeout=120_000)
    said = toast.inner_text()
    assert said.count("contain the subject 'zebra'") == 1 and "prompts - " not in said
    assert said.count("Subject Prompts") == 1


def test_an_error_of_another_packs_node_is_left_to_the_page(canvas):
    """A picture that is none: Load Image fails where it runs, and Kindred says nothing."""
    canvas.client.upload_image(b"no picture", "broken.png")
    canvas.load_api(
        {
            "1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}},
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        },
        "broken",
    )
    assert canvas.run(60)["kind"] == "execution_error"
    settled(canvas, 1500)
    assert not canvas.toasts()


def test_experts_inputs_are_folded(canvas):
    """The new renderer shows strength, and what it stands for only when asked; the old one has no folding and shows all."""
    canvas.load(CANVAS / "self_attention_only.json")
    node = canvas.node("KindredMaskedSelfAttnInject")
    advanced = canvas.page.evaluate(
        "id => app.graph.getNodeById(id).widgets.filter(w => w.options?.advanced).map(w => w.name)",
        node,
    )
    assert "weight" in advanced and "strength" not in advanced
    if canvas.vue:
        assert canvas.body(node).get_by_text("strength", exact=True).count() == 1
        assert canvas.body(node).get_by_text("full strength", exact=True).count() == 0
        canvas.body(node).get_by_text("Show advanced inputs").click()
        canvas.body(node).get_by_text("full strength", exact=True).wait_for(timeout=120_000)


def test_a_chinese_user_reads_chinese(server, chromium, shots):
    with chromium.page(server.url, vue=True, Comfy__Locale="zh") as page:
        page.load(CANVAS / "story.json")
        nodes = Client(server.url).json("/i18n")["zh"]["nodeDefs"]
        page.load({**EMPTY}, "empty")
        found_by(page, "ConsiStory", nodes["KindredConsiStory"]["display_name"], (700, 300))
        title = page.page.evaluate("app.graph.nodes[0].title")
        assert any("\u4e00" <= letter <= "\u9fff" for letter in title), title
        page.screenshot(shots / "chinese.png")
