"""What a person's hands do on the page, in either renderer: search, place, point at a socket, drag."""

from __future__ import annotations

from playwright.sync_api import Locator

EMPTY = {
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
    "version": 0.4,
}


def settled(canvas, milliseconds: int = 400) -> None:
    canvas.page.wait_for_timeout(milliseconds)


def search(canvas, words: str, at: tuple[int, int]) -> Locator:
    """Double click and words; gives the search box."""
    box = canvas.page.locator("[role=combobox][aria-controls=results-list]")
    for _ in range(
        20
    ):  # two clicks of a busy machine lie too far apart for the page, as a user's may
        canvas.page.mouse.dblclick(*at)
        settled(canvas, 3000)
        if box.is_visible():
            break
    box.press_sequentially(words, delay=15)
    return box


def found_by(canvas, words: str, title: str, at: tuple[int, int]) -> int:
    """A node by double click, words, Enter once it is the first that is offered, and a click where it shall stand; gives its id."""
    before = ids(canvas)
    box = search(canvas, words, at)
    first = canvas.page.get_by_test_id("result-item").first
    first.filter(has_text=title).wait_for(timeout=120_000)
    box.press("Enter")
    canvas.page.wait_for_function(
        "n => app.graph.nodes.length > n", arg=len(before), timeout=120_000
    )
    canvas.page.mouse.move(at[0] + 5, at[1] + 5)
    settled(canvas, 300)
    canvas.page.mouse.click(*at)
    settled(canvas, 600)
    new = ids(canvas) - before
    assert len(new) == 1
    return new.pop()


def ids(canvas) -> set[int]:
    """Of the nodes that stand on the canvas."""
    return set(canvas.page.evaluate("app.graph.nodes.map(n => Number(n.id))"))


def grip(canvas, node: int) -> tuple[float, float]:
    """A point in the title of a node."""
    box = canvas.box(node)
    return box["x"] + box["width"] / 2, box["y"] + 12


def slot(canvas, node: int, name: str, output: bool) -> tuple[float, float]:
    """Where a socket is on the screen."""
    if canvas.vue:
        side = "lg-slot--output" if output else "lg-slot--input"
        box = (
            canvas.body(node)
            .locator(f".{side}", has_text=name)
            .first.locator("[data-testid=slot-dot]")
            .first.bounding_box()
        )
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    return tuple(
        canvas.page.evaluate(
            """([id, name, output]) => {
        const n = app.graph.getNodeById(id), d = app.canvas.ds, r = app.canvas.canvas.getBoundingClientRect();
        const i = (output ? n.outputs : n.inputs).findIndex(s => s.name === name || s.label === name);
        const p = n.getConnectionPos(!output, i);
        return [r.left + (p[0] + d.offset[0]) * d.scale, r.top + (p[1] + d.offset[1]) * d.scale] }""",
            [node, name, output],
        )
    )


def drag(canvas, start: tuple[float, float], end: tuple[float, float]) -> None:
    mouse = canvas.page.mouse
    mouse.move(*start)
    mouse.down()
    mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=6)
    mouse.move(*end, steps=8)
    mouse.up()
    settled(canvas)


def set_field(canvas, node: int, name: str, value) -> None:
    """What a person types or chooses in a field; its callback runs as it would then."""
    canvas.page.evaluate(
        """([id, name, value]) => { const n = app.graph.getNodeById(id), w = n.widgets.find(w => w.name === name);
            w.value = value; w.callback?.(value, app.canvas, n) }""",
        [node, name, value],
    )
