"""What nodes say of a run: on themselves until they run again, as a toast where they are out of sight or fail in a sampler."""

from __future__ import annotations

import os

from canvas import TOAST
from hands import set_field, settled
from newest_frontend import VARIABLE

from workflows import CANVAS

TEXT = "$$node-text-preview"  # the page's own widget


def says(canvas, node, words):
    """Waits until the node shows the words."""
    if canvas.vue:
        canvas.body(node).get_by_text(words).first.wait_for(timeout=120_000)
    else:
        canvas.page.wait_for_function(
            "([id, words]) => app.graph.getNodeById(id).widgets.some(w => String(w.value).includes(words))",
            arg=[node, words],
            timeout=120_000,
        )


def with_steps(canvas, steps):
    """Those that no run before had: what the host has in its cache does not run, and tells nothing."""
    canvas.page.evaluate(
        """steps => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                            if (w.name === 'steps') w.value = steps }""",
        steps,
    )


def test_a_node_tells_its_result_on_itself(canvas, shots):
    """DDIM Invert says how well the photo comes back, Save Reference where the file is."""
    canvas.load(CANVAS / "invert_and_inspect.json")
    with_steps(canvas, 8 if canvas.vue else 10)
    assert canvas.run(120)["kind"] == "execution_success"
    says(canvas, canvas.node("KindredDDIMInvert"), "round trip")
    says(canvas, canvas.node("KindredSaveReference"), "kindred/subject_")
    canvas.screenshot(shots / f"told_{'vue' if canvas.vue else 'canvas'}.png")


def test_what_a_node_tells_outlives_the_run(canvas):
    """As frontend 1.58 does, the page takes every node's text away when the run has ended; ours comes back, once."""
    canvas.load(CANVAS / "invert_and_inspect.json")
    with_steps(canvas, 12 if canvas.vue else 14)
    canvas.page.evaluate(
        """() => { window.__taken = []; app.api.addEventListener('execution_success', () => {
            for (const node of app.graph.nodes) {
                const at = node.widgets?.findIndex(w => w.name === '$$node-text-preview') ?? -1
                if (at < 0) continue
                node.widgets[at].onRemove?.()
                window.__taken.push(...node.widgets.splice(at, 1).map(() => node.type))
            } }, { once: true }) }"""
    )
    assert canvas.run(120)["kind"] == "execution_success"
    node = canvas.node("KindredDDIMInvert")
    says(canvas, node, "round trip")
    if not os.environ.get(VARIABLE):  # the newest has taken them before
        assert "KindredDDIMInvert" in canvas.page.evaluate("window.__taken")
    assert 1 == canvas.page.evaluate(
        "id => app.graph.getNodeById(id).widgets.filter(w => String(w.value).includes('round trip')).length",
        node,
    )


def test_what_a_node_said_goes_when_it_runs_again(canvas):
    """A sampler of other steps than the reference's is told what that costs, and no more once it has the same."""
    canvas.load(CANVAS / "self_attention_only.json")
    with_steps(canvas, 5 if canvas.vue else 6)
    sampler = canvas.node("KSampler")
    set_field(canvas, sampler, "steps", 7)
    assert canvas.run(120)["kind"] == "execution_success"
    says(canvas, sampler, "the reference is read live")
    set_field(canvas, sampler, "steps", 5 if canvas.vue else 6)
    assert canvas.run(120)["kind"] == "execution_success"
    settled(canvas, 1000)
    assert not canvas.page.evaluate(
        "([id, name]) => app.graph.getNodeById(id).widgets.some(w => w.name === name)",
        [sampler, TEXT],
    )


def test_an_error_of_ours_in_the_hosts_sampler_is_said_at_once_too(canvas):
    """Other steps than the saved subject's: the sampler fails in our code, and the sentence is ours."""
    canvas.load(CANVAS / "story_more_pictures.json")
    sampler = canvas.node("KSampler")
    canvas.page.evaluate(
        """id => { const node = app.graph.getNodeById(id), at = node.inputs.findIndex(i => i.name === 'steps')
                   if (node.inputs[at]?.link != null) node.disconnectInput(at) }""",
        sampler,
    )
    set_field(canvas, sampler, "steps", 9)
    ended = canvas.run(120)
    assert ended["kind"] == "execution_error" and ended["detail"]["node_type"] == "KSampler"
    toast = canvas.page.locator(TOAST).filter(has_text="which the anchors do not have")
    toast.wait_for(timeout=120_000)
    assert "Take the sampler, scheduler and steps of the anchors" in toast.inner_text()


def test_a_warning_inside_of_a_blueprint_is_a_toast(canvas):
    """A word that the miniature never learnt, in the app: its nodes lie out of sight."""
    canvas.load(CANVAS / "New pictures from my photo.app.json")
    with_steps(canvas, 4)
    word = "giraffe" if canvas.vue else "zebra"  # what the host has in its cache does not run
    canvas.page.evaluate(
        """word => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                     if (String(w.value).includes('on the beach')) w.value = `a photo of a ${word} and a cat` }""",
        word,
    )
    canvas.page.evaluate("window.__events = []")
    canvas.listen()
    canvas.page.get_by_test_id("linear-run-button-icon").click()
    assert canvas.wait(300)["kind"] == "execution_success"
    toast = canvas.page.locator(TOAST).filter(has_text=f"never learnt '{word}'")
    toast.wait_for(timeout=120_000)
    assert toast.count() == 1
