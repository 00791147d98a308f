"""Makes the canvas form of every shipped workflow from its API form: python3 dev.py workflows [NAME ...]

workflows/api/<name>.json is the source. The real page loads it, this program lays it out (groups from `_meta.group`, in the order of
the file, left to right; the note of workflow_notes.py first), the page writes it, and workflows/<name>.json is that, cleaned.
With --run it also presses Run and keeps the thumbnail, and the pictures of the help pages (web/docs/images) come from the same runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from checkout import ROOT
from flow_workflow import follow
from host_server import HostServer
from results import prepare
from terminal import run_program
from workflow_models import files_of, models_of
from workflow_notes import NOTES

if TYPE_CHECKING:  # --help has to come without any package
    from canvas import Canvas

API, CANVAS = ROOT / "workflows" / "api", ROOT / "workflows"
COLUMN_HEIGHT, GAP, PADDING, TITLE, GROUP_TITLE = 1000, 40, 24, 30, 56
COLOURS = (
    "#3f789e",
    "#88A",
    "#8A8",
    "#b58b2a",
    "#a1309b",
    "#b06634",
)  # the host's own group colours, in turn
OURS = {
    "color": "#2a363b",
    "bgcolor": "#3f5159",
}  # the host's "pale blue": which nodes come with the pack
# what a picture, a mask or a long text needs, in pixels; the page computes the others, for texts now so and now so
SIZES = {
    "KindredSubjectPrompts": (400, 240),
    "CLIPTextEncode": (400, 160),
    "KindredLoadPhoto": (300, 440),
    "SaveImage": (420, 420),
    "PreviewImage": (420, 300),
    "MaskPreview": (260, 300),
    "KindredReferencePreview": (420, 330),
    "KindredComparisonGrid": (460, 560),
    "KindredConsistencyScore": (460, 620),
    "KindredBlockProbe": (460, 640),
    "KindredConceptEncoderTrain": (360, 640),
    "KindredRefUNetCapture": (340, 600),
    "KindredDDIMInvert": (320, 380),
    "KindredSaveReference": (320, 150),
    "KindredLoadReference": (320, 400),
    "KindredConsiStory": (330, 504),
    "KSampler": (300, 270),
}
# in pixels, and how many letters stand in a line; the families' notes are longer
NOTE_WIDTH, WIDE_NOTE = (420, 62), (640, 96)
Node = dict[str, Any]


def version() -> str:
    """The pack's, from pyproject.toml."""
    return re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)[1]


def names() -> list[str]:
    """Every workflow with an API form, by name."""
    return sorted(path.stem for path in API.glob("*.json"))


def api_form(name: str) -> dict[str, Node]:
    return json.loads((API / f"{name}.json").read_text("utf-8"))


def on_the_miniature(name: str) -> bool:
    """Whether it runs on what the pack ships; the others name files that people have."""
    return "kindred_miniature.safetensors" in (
        file for node in api_form(name).values() for file in files_of(node)
    )


def transformers() -> list[str]:
    """The workflows for people's own transformer files, by name."""
    return [name for name in names() if not on_the_miniature(name)]


def groups_of(graph: Mapping[str, Node]) -> dict[str, list[int]]:
    """Group -> node ids, both in the file's order, which is the order of reading."""
    groups: dict[str, list[int]] = {}
    for key, node in graph.items():
        groups.setdefault(node["_meta"]["group"], []).append(int(key))
    return groups


def note(name: str, key: int) -> Node:
    """The workflow's note as a node of the canvas."""
    sentences = NOTES[name]
    text = f"## {sentences.title}\n\n{sentences.text}\n\n---\n\n{sentences.yours}"
    width, letters = NOTE_WIDTH if on_the_miniature(name) else WIDE_NOTE
    lines = sum(1 + len(line) // letters for line in text.splitlines())
    return {
        "id": key,
        "type": "MarkdownNote",
        "title": "What this is",
        "size": [width, 60 + 19 * lines],
        "flags": {},
        "mode": 0,
        "order": 0,
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def columns(ids: Sequence[int], nodes: Mapping[int, Node]) -> list[list[int]]:
    """A group's nodes in columns of limited height."""
    made: list[list[int]] = [[]]
    height = 0
    for key in ids:
        needed = nodes[key]["size"][1] + TITLE + GAP
        if made[-1] and height + needed > COLUMN_HEIGHT:
            made.append([])
            height = 0
        made[-1].append(key)
        height += needed
    return made


def arrange(name: str, graph: Mapping[str, Node], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The page's own graph, with places, sizes, colours, groups and the note."""
    arranged = json.loads(json.dumps(drawn))
    nodes = {int(node["id"]): node for node in arranged["nodes"]}
    for node in nodes.values():
        width, height = node["size"]
        node["size"] = list(SIZES.get(node["type"], (max(round(width), 280), round(height))))
        node |= OURS if node["type"].startswith("Kindred") else {}
    first = max(nodes) + 1
    nodes[first] = note(name, first)
    groups = groups_of(graph)
    head = next(iter(groups))
    left, arranged["groups"] = 0, []
    for number, (title, ids) in enumerate(groups.items()):
        start, bottom = left, 0
        left += PADDING
        for column in columns([first, *ids] if title == head else ids, nodes):
            top = GROUP_TITLE + TITLE
            for key in column:
                nodes[key]["pos"] = [left, top]
                top += nodes[key]["size"][1] + TITLE + GAP
            left += max(nodes[key]["size"][0] for key in column) + GAP
            bottom = max(bottom, top - TITLE - GAP)
        left += PADDING - GAP
        arranged["groups"].append(
            {
                "id": number + 1,
                "title": title,
                "bounding": [start, 0, left - start, bottom + PADDING],
                "color": COLOURS[number % len(COLOURS)],
                "font_size": 24,
                "flags": {},
            }
        )
        left += GAP
    arranged["nodes"] = [nodes[key] for key in sorted(nodes)]
    arranged["last_node_id"] = first
    return arranged


def cleaned(name: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the file: no nulls but those of sockets, an id that stays, and who brings each node."""
    clean, graph = without_nulls(drawn), api_form(name)
    versions = {
        "kindred": version(),
        "comfy-core": json.loads(
            (ROOT / "tools" / "workshop" / "pins" / "host.json").read_text("utf-8")
        )["comfyui"],
    }
    for node in clean["nodes"]:
        if node["type"] == "MarkdownNote":
            node["properties"] = {}
            continue
        pack = "kindred" if node["type"].startswith("Kindred") else "comfy-core"
        node["properties"] = {
            "Node name for S&R": node["type"],
            "cnr_id": pack,
            "ver": versions[pack],
        }
        if models := models_of(graph[str(node["id"])]):
            node["properties"]["models"] = models
    clean["nodes"].sort(key=lambda node: int(node["id"]))
    extra = {"ds": {"scale": 0.7, "offset": [60, 120]}}
    return (
        {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"kindred/{name}")), "revision": 0}
        | {key: value for key, value in clean.items() if key not in ("id", "revision", "extra")}
        | {"extra": extra}
    )


def without_nulls(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {
            k: without_nulls(v, k)
            for k, v in value.items()
            if v is not None or k in ("link", "links")
        }
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def draw(canvas: Canvas, name: str) -> dict[str, Any]:
    """The canvas form of a workflow, through the page twice: what it loads is what it writes."""
    graph = api_form(name)
    # a node shows, and grows for, the picture that its number had in the workflow before
    canvas.page.evaluate(
        "() => { for (const key of Object.keys(app.nodeOutputs)) delete app.nodeOutputs[key] }"
    )
    canvas.load_api(graph, name)
    # further runs are this one again, as the thumbnail shows it, until somebody wishes otherwise
    canvas.page.evaluate("""() => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                            if (w.name === 'control_after_generate') w.value = 'fixed' }""")
    # the page shows a text that is wired in as empty or as its example, whichever comes first
    canvas.page.evaluate("""() => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                            if (w.type === 'customtext' && n.inputs?.some(i =>
                                i.link != null && i.widget?.name === w.name)) w.value = '' }""")
    canvas.load(arrange(name, graph, canvas.serialize()), name)
    return cleaned(name, canvas.serialize())


def write(name: str, workflow: Mapping[str, Any]) -> bool:
    """True where the file changed."""
    path = CANVAS / f"{name}.json"
    text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text("utf-8") == text:
        return False
    path.write_text(text, "utf-8")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dev.py workflows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="*", help="only these (default: all)")
    parser.add_argument(
        "--run", action="store_true", help="also run them: thumbnails and the help pages' pictures"
    )
    parser.add_argument("--shots", type=Path, help="keep a screenshot of each in this folder")
    parser.add_argument("--host", type=Path, help="ComfyUI's folder (dev.py gives it)")
    args = parser.parse_args(argv)
    prepare(args.shots)
    follow(API)
    unknown = sorted(set(args.name) - set(names()))
    if unknown:
        parser.error(f"there is no workflows/api/{unknown[0]}.json; there are {', '.join(names())}")
    from canvas import browser

    small = [ROOT / "tests" / "small_models"]  # else the page complains of missing files
    with HostServer(args.host, cpu=True, threads=1, packs=small) as server, browser() as chromium:
        with chromium.page(server.url, vue=False) as canvas:
            for name in args.name or names():
                print(
                    f"{name}: {'written' if write(name, draw(canvas, name)) else 'as it was'}",
                    flush=True,
                )
                if args.shots:
                    canvas.screenshot(args.shots / f"{name}.png")
        if args.run:
            from workflow_pictures import make_pictures

            make_pictures(server, chromium, args.name or names(), args.shots)
    return 0


if __name__ == "__main__":
    run_program(main)
