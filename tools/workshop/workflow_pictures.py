"""Runs the shipped workflows in the page and keeps their pictures: thumbnails of the template browser, pictures of the help pages.

tools/workshop/workflows.py --run calls this. A help page shows the node as the canvas draws it, over what a workflow made with it.
A workflow for people's own files does not run here: its thumbnail is the canvas.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from blueprints import number
from canvas import Browser, Canvas
from checkout import ROOT
from host_server import HostServer
from PIL import Image

from workflows import api_form, as_graph, canvas_file, canvas_form, on_the_miniature

THUMBNAIL, HELP_WIDTH, GAP = 480, 640, 8
IMAGES = ROOT / "web" / "docs" / "images"
# node id -> (a workflow, the node in it to draw, nodes whose pictures stand under it)
HELP: dict[str, tuple[str, int, tuple[int, ...]]] = {
    "KindredLoadPhoto": ("personalize", 2, ()),
    "KindredSubjectPrompts": ("personalize", 8, (13,)),
    "KindredDDIMInvert": ("invert_and_inspect", 6, (10,)),
    "KindredRefUNetCapture": ("invert_and_inspect", 11, (12,)),
    "KindredMaskedSelfAttnInject": ("self_attention_only", 7, (13,)),
    "KindredConceptEncoderLoad": ("concept_only", 15, (13,)),
    "KindredCrossAttnDetailInject": ("concept_only", 16, (13,)),
    "KindredConceptEncoderTrain": ("train_concept_encoder", 7, (21,)),
    "KindredConsiStory": ("story_ablation", 5, (14,)),
    "KindredAnchorSampler": ("story_save_subject", 6, (8,)),
    "KindredSaveReference": ("story_save_subject", 20, (21,)),
    "KindredLoadReference": ("story_more_pictures", 9, (8,)),
    "KindredReferencePreview": ("story_save_subject", 21, ()),
    "KindredConsistencyScore": ("ablation", 26, ()),
    "KindredComparisonGrid": ("ablation", 24, ()),
    "KindredBlockProbe": ("measure_blocks", 6, ()),
}
ALONE = (
    "KindredReferencePreview",
    "KindredConsistencyScore",
    "KindredComparisonGrid",
    "KindredBlockProbe",
)  # what they make says enough
Pictures = Mapping[int, list[Image.Image]]
Box = tuple[float, float, float, float]  # left, top, right, bottom on the canvas
DRAW = """([left, top, right, bottom]) => { const c = app.canvas, e = c.canvas, d = c.ds;
    const scale = Math.min(e.clientWidth / (right - left), e.clientHeight / (bottom - top)); d.scale = scale;
    d.offset = [(e.clientWidth / scale - left - right) / 2, (e.clientHeight / scale - top - bottom) / 2];
    c.draw(true, true); return e.toDataURL('image/png').split(',')[1] }"""


def make_pictures(
    server: HostServer, chromium: Browser, names: Iterable[str], shots: Path | None = None
) -> None:
    """Thumbnails of the workflows, and the pictures of every help page that one of them is for."""
    for name in names:
        if not on_the_miniature(name):
            with chromium.page(server.url, vue=False, size=(1600, 800)) as canvas:
                canvas.load(as_graph(name))
                plan(canvas, name).save(canvas_file(name, ".jpg"), quality=86, optimize=True)
            print(f"{name}: its plan kept", flush=True)
            continue
        with chromium.page(server.url, vue=True, size=(1600, 1000)) as canvas:
            canvas.load(as_graph(name))
            pictures = run(canvas, name)
            if shots:
                canvas.fit()
                canvas.screenshot(shots / f"{name}.png")
            thumbnail(name, pictures).save(canvas_file(name, ".jpg"), quality=86, optimize=True)
            for kind, (workflow, node, beside) in HELP.items():
                if workflow == name:
                    drawn = None if kind in ALONE else shot(canvas, node)
                    written = [
                        picture
                        for key in ((node,) if kind in ALONE else beside)
                        for picture in pictures[key]
                    ]
                    IMAGES.mkdir(parents=True, exist_ok=True)
                    help_picture(drawn, written).save(
                        IMAGES / f"{kind}.jpg", quality=88, optimize=True
                    )
        print(f"{name}: ran, pictures kept", flush=True)


def run(canvas: Canvas, name: str) -> Pictures:
    """Press Run; every node's pictures. RuntimeError names what went wrong."""
    ended = canvas.run()
    if ended["kind"] != "execution_success" or canvas.errors or canvas.toasts():
        raise RuntimeError(f"{name}: {ended}, {canvas.errors}, {canvas.toasts()}")
    outputs = canvas.outputs(ended)
    return {
        number(key): [
            Image.open(BytesIO(canvas.client.view(image))).convert("RGB")
            for image in output["images"]
        ]
        for key, output in outputs.items()
        if output.get("images")
    }


def shot(canvas: Canvas, node: int) -> Image.Image:
    """The node alone, under its own name, at the size it has on a screen."""
    canvas.page.evaluate(
        """id => { const n = app.graph.getNodeById(id), d = app.canvas.ds; d.scale = 1;
        n.title = n.constructor.nodeData.display_name;
        d.offset = [260 - n.pos[0], 140 - n.pos[1]]; app.canvas.deselectAll?.(); app.canvas.setDirty(true, true) }""",
        node,
    )
    canvas.page.wait_for_timeout(700)
    box = canvas.box(node)
    margin = 10
    clip = {
        "x": box["x"] - margin,
        "y": box["y"] - margin,
        "width": box["width"] + 2 * margin,
        "height": box["height"] + 2 * margin,
    }
    return Image.open(BytesIO(canvas.page.screenshot(clip=clip))).convert("RGB")


def help_picture(node: Image.Image | None, pictures: Sequence[Image.Image]) -> Image.Image:
    """The node over a row of what it made, as wide as a help panel likes it."""
    share = sum(picture.width / picture.height for picture in pictures)
    height = (
        min(round((HELP_WIDTH - GAP * (len(pictures) - 1)) / share), HELP_WIDTH) if pictures else 0
    )
    row = [
        picture.resize(
            (max(int(picture.width * height / picture.height), 1), height), Image.LANCZOS
        )
        for picture in pictures
    ]
    rows = [[node]] * (node is not None) + [row] * bool(row)
    page = Image.new(
        "RGB",
        (
            max(sum(p.width + GAP for p in line) - GAP for line in rows),
            sum(line[0].height + GAP for line in rows) - GAP,
        ),
        "white",
    )
    top = 0
    for line in rows:
        left = 0
        for picture in line:
            page.paste(picture, (left, top))
            left += picture.width + GAP
        top += line[0].height + GAP
    return page


def halves(name: str) -> tuple[Box, Box]:
    """What a photo is read with, and what draws new pictures of it: the second group, and the two behind it."""
    groups = [group["bounding"] for group in canvas_form(name)["groups"]]
    _, subject, looking, pictures, *_ = ((x, y, x + w, y + h) for x, y, w, h in groups)
    return subject, around(looking, pictures)


def around(one: Box, other: Box) -> Box:
    """The least box that holds both."""
    left, top = min(one[0], other[0]), min(one[1], other[1])
    return left, top, max(one[2], other[2]), max(one[3], other[3])


def plan(canvas: Canvas, name: str) -> Image.Image:
    """A square of the canvas itself, in two rows."""
    page = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    for row, box in enumerate(halves(name)):
        drawn = base64.b64decode(canvas.page.evaluate(DRAW, list(box)))
        picture = Image.open(BytesIO(drawn)).convert("RGB")
        page.paste(
            picture.resize((THUMBNAIL, THUMBNAIL // 2), Image.LANCZOS), (0, row * THUMBNAIL // 2)
        )
    return page


def thumbnail(name: str, pictures: Pictures) -> Image.Image:
    """A square: the figure of a figure's workflow, else the photo and the new pictures as tiles."""
    graph = api_form(name)
    saved = [
        picture
        for key, node in graph.items()
        if node["class_type"] == "SaveImage"
        for picture in pictures[number(key)]
    ]
    photos = [
        Image.open(
            ROOT
            / "miniature"
            / node["inputs"]["image"].removeprefix("kindred_").removesuffix(" [temp]")
        )
        for node in graph.values()
        if node["class_type"] == "KindredLoadPhoto"
    ]
    figure = any(node["class_type"] == "KindredComparisonGrid" for node in graph.values())
    tiles = saved if figure or len(saved) > 3 else (photos[: 4 - len(saved)] + saved)[:4]
    across = 1 if len(tiles) == 1 else 2
    lines = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    side = THUMBNAIL // across
    page = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    for row, line in enumerate(lines):
        width, top = THUMBNAIL // len(line), (THUMBNAIL - len(lines) * side) // 2 + row * side
        for i, tile in enumerate(line):
            scale = min(width / tile.width, side / tile.height)
            small = tile.convert("RGB").resize(
                (round(tile.width * scale), round(tile.height * scale)), Image.LANCZOS
            )
            page.paste(
                small, (i * width + (width - small.width) // 2, top + (side - small.height) // 2)
            )
    return page
