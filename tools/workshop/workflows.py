"""Makes the canvas form of every shipped workflow from its API form: python3 dev.py workflows [NAME ...]

workflows/api/<name>.json is the source. The real page loads it, this program lays it out (groups from `_meta.group`, in the order of
the file, the note of workflow_notes.py first), the page writes it, and workflows/<name>.json is that, cleaned.
Nodes of a subgraph ("4:10") are folded into one, as blueprints.py says; that one also goes into subgraphs/, and the rest is an app.
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

from blueprints import BLUEPRINTS, Blueprint, alone, app, flat, fold, inside, number, with_values
from checkout import ROOT
from flow_workflow import follow
from host_server import HostServer
from layout import lay_out
from results import prepare
from terminal import run_program
from workflow_models import files_of, models_of
from workflow_notes import NOTES, TABLE

if TYPE_CHECKING:  # --help has to come without any package
    from canvas import Canvas

API, CANVAS = ROOT / "workflows" / "api", ROOT / "workflows"
SUBGRAPHS = ROOT / "subgraphs"
OURS = {
    "color": "#2a363b",
    "bgcolor": "#3f5159",
}  # the host's "pale blue": which nodes come with the pack
# what a picture, a mask or a long text needs, in pixels; the page computes the others, for texts now so and now so
SIZES = {
    "KindredSubjectPrompts": (320, 240),
    "CLIPTextEncode": (300, 160),
    "KindredLoadPhoto": (250, 450),
    "SaveImage": (340, 340),
    "PreviewImage": (320, 250),
    "MaskPreview": (220, 200),
    "KindredReferencePreview": (300, 330),
    "KindredComparisonGrid": (340, 400),
    "KindredConsistencyScore": (300, 400),
    "KindredBlockProbe": (460, 640),
    "KindredConceptEncoderTrain": (344, 800),
    "KindredConceptEncoderLoad": (270, 120),
    "KindredRefUNetCapture": (300, 564),
    "KindredDDIMInvert": (280, 380),
    "KindredSaveReference": (300, 150),
    "KindredLoadReference": (320, 400),
    "KindredConsiStory": (330, 504),
    "KSampler": (270, 270),
}
CLOSED = {"flags": {"collapsed": True}}
PLAIN = (  # no fields, or none that is ever set
    "VAEEncode",
    "VAEDecode",
    "InvertMask",
    "BatchImagesNode",
    "MaskComposite",
    "ConditioningCombine",
    "ConditioningSetMask",
    "ConditioningZeroOut",
    "BasicGuider",
)
WIRED = ("What the photo shows", "What the photos show")  # titles of nodes whose word comes by wire
# what is closed so that the rest can be read: samplers that are set elsewhere, a figure shown elsewhere
FOLDED = {"ablation": (15, 18, 19, 20, 24)}
# in pixels, and how many letters stand in a line
NOTE_WIDTH, WIDE_NOTE = (320, 46), (760, 112)
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


def canvas_file(name: str, end: str = ".json") -> Path:
    """The workflow as people open it, or what lies beside it; the template browser shows the file's
    name and no other words.
    """
    return (
        CANVAS / f"{NOTES[name].title}.app{end}" if name in BLUEPRINTS else CANVAS / f"{name}{end}"
    )


def canvas_form(name: str) -> dict[str, Any]:
    """The content of that file."""
    return json.loads(canvas_file(name).read_text("utf-8"))


def as_graph(name: str) -> dict[str, Any]:
    """The same, of an app too, to be opened as nodes."""
    graph = canvas_form(name)
    graph["extra"].pop("linearMode", None)
    return graph


def blueprint_file(blueprint: Blueprint) -> Path:
    """Where ComfyUI looks for what it offers among the nodes."""
    return SUBGRAPHS / f"{blueprint.name}.json"


def groups_of(graph: Mapping[str, Node], blueprint: Blueprint | None) -> dict[str, list[int]]:
    """Group -> node ids, both in the file's order, which is the order of reading; a subgraph is one
    node in a group of its own.
    """
    groups: dict[str, list[int]] = {}
    for key, node in graph.items():
        if blueprint and ":" in key:
            groups[blueprint.name] = [blueprint.node]
        else:
            groups.setdefault(node["_meta"]["group"], []).append(number(key))
    return groups


def notes(name: str, first: int) -> list[Node]:
    """The workflow's notes as nodes of the canvas from that id on: what it is, and, closed until one
    wants it, what to change.
    """
    content = NOTES[name]
    about = note(first, "What this is", f"## {content.title}\n\n{content.text}", NOTE_WIDTH)
    table = f"\n\n{TABLE}" if on_the_miniature(name) else ""
    yours = note(first + 1, "Your own checkpoint", content.yours + table, WIDE_NOTE)
    return [about, yours | CLOSED]


def note(key: int, title: str, text: str, form: tuple[int, int]) -> Node:
    """A note as high as its text; form: width in pixels, and how many letters stand in a line."""
    width, letters = form
    lines = sum(1 + len(line) // letters for line in text.splitlines())
    return {
        "id": key,
        "type": "MarkdownNote",
        "title": title,
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


def sized(drawn: Mapping[str, Any], folded: Sequence[int] = ()) -> dict[int, Node]:
    """The nodes of a graph by id, in their sizes and colours, these and plain ones closed."""
    nodes = {int(node["id"]): node for node in drawn["nodes"]}
    for key, node in nodes.items():
        width, height = node["size"]
        node["size"] = list(SIZES.get(node["type"], (max(round(width), 260), round(height))))
        node |= OURS if node["type"].startswith("Kindred") else {}
        closed = node["type"] in PLAIN or node.get("title") in WIRED or key in folded
        node |= CLOSED if closed else {}
    return nodes


def arrange(name: str, graph: Mapping[str, Node], drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The page's own graph, folded where it has a subgraph, with places, sizes, colours, groups and
    the notes.
    """
    page = json.loads(json.dumps(drawn))
    nodes, blueprint = sized(page, FOLDED.get(name, ())), BLUEPRINTS.get(name)
    own_notes = {node["id"]: node for node in notes(name, max(map(number, graph)) + 1)}
    nodes |= own_notes
    groups = groups_of(graph, blueprint)
    head = next(iter(groups))
    page["groups"] = lay_out(groups | {head: [*own_notes, *groups[head]]}, nodes)
    page["nodes"] = [nodes[key] for key in sorted(nodes)]
    page["last_node_id"] = max(nodes)
    for subgraph in page.get("definitions", {}).get("subgraphs", []):
        arrange_inside(subgraph, inside(graph))
    return page


def arrange_inside(subgraph: dict[str, Any], graph: Mapping[str, Node]) -> None:
    """The same for the nodes of a subgraph, between its inputs and its outputs."""
    nodes = sized(subgraph)
    subgraph["groups"] = lay_out(groups_of(graph, None), nodes)
    x, _, width, _ = subgraph["groups"][-1]["bounding"]
    subgraph["outputNode"]["bounding"][0] = x + width + 80
    subgraph["state"] |= {
        "lastNodeId": max(nodes),
        "lastGroupId": len(subgraph["groups"]),
        "lastLinkId": max(link["id"] for link in subgraph["links"]),
    }


def cleaned(name: str, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What goes into the file: no nulls but those of sockets, an id that stays, and who brings each node."""
    page, graph, blueprint = without_nulls(drawn), flat(api_form(name)), BLUEPRINTS.get(name)
    for part in (page, *page.get("definitions", {}).get("subgraphs", [])):
        for node in part["nodes"]:
            node["properties"] = properties(node, graph)
        part["nodes"].sort(key=lambda node: int(node["id"]))
    extra = {"ds": {"scale": 0.7, "offset": [60, 120]}} | (app(blueprint) if blueprint else {})
    return (
        {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"kindred/{name}")), "revision": 0}
        | {key: value for key, value in page.items() if key not in ("id", "revision", "extra")}
        | {"extra": extra}
    )


def properties(node: Mapping[str, Any], graph: Mapping[str, Node]) -> dict[str, Any]:
    """Who brings a node, in which version, and where its files come from; graph: the flat API form."""
    if node["type"] == "MarkdownNote":
        return {}
    if str(node["id"]) not in graph:  # a subgraph
        return {"cnr_id": "kindred", "ver": version()}
    pack = "kindred" if node["type"].startswith("Kindred") else "comfy-core"
    origin = {
        "Node name for S&R": node["type"],
        "cnr_id": pack,
        "ver": version() if pack == "kindred" else host_version(),
    }
    models = models_of(graph[str(node["id"])])
    return origin | ({"models": models} if models else {})


def host_version() -> str:
    """ComfyUI's, that the workflows are made with."""
    pin = ROOT / "tools" / "workshop" / "pins" / "host.json"
    return json.loads(pin.read_text("utf-8"))["comfyui"]


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


def draw(canvas: Canvas, name: str, graph: Mapping[str, Node] | None = None) -> dict[str, Any]:
    """The canvas form of a workflow, through the page twice: what it loads is what it writes.
    graph: instead of its API form.
    """
    graph, blueprint = graph or api_form(name), BLUEPRINTS.get(name)
    # a node shows, and grows for, the picture that its number had in the workflow before
    canvas.page.evaluate(
        "() => { for (const key of Object.keys(app.nodeOutputs)) delete app.nodeOutputs[key] }"
    )
    canvas.load_api(flat(graph), name)
    # further runs are this one again, as the thumbnail shows it; an app is there for more
    canvas.page.evaluate(
        """mode => { for (const n of app.graph.nodes) for (const w of n.widgets ?? [])
                            if (w.name === 'control_after_generate') w.value = mode }""",
        "randomize" if blueprint else "fixed",
    )
    # what the page shows of a text, a choice or a number that is wired in hangs on what it drew before
    canvas.page.evaluate("""() => { for (const n of app.graph.nodes) for (const w of n.widgets ?? []) {
                            if (!n.inputs?.some(i => i.link != null && i.widget?.name === w.name)) continue;
                            if (['customtext', 'text', 'string'].includes(w.type)) w.value = '';
                            const spec = n.constructor.nodeData.inputs[w.name];
                            if (w.type === 'combo') w.value = spec.default ?? spec.options[0];
                            if (typeof w.value === 'number') w.value = spec.default ?? w.value } }""")
    drawn = canvas.serialize()
    drawn = fold(drawn, graph, blueprint) if blueprint else drawn
    canvas.load(arrange(name, graph, drawn), name)
    return cleaned(name, canvas.serialize())


def draw_blueprint(canvas: Canvas, name: str) -> dict[str, Any]:
    """What subgraphs/ has of a workflow: its subgraph, with values for people's own checkpoints."""
    blueprint = BLUEPRINTS[name]
    drawn = draw(canvas, name, with_values(api_form(name), blueprint))
    return alone(drawn, blueprint)


def write(path: Path, workflow: Mapping[str, Any]) -> bool:
    """True where the file changed."""
    text = json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text("utf-8") == text:
        return False
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, "utf-8")
    return True


def write_all(canvas: Canvas, names: Sequence[str], shots: Path | None) -> None:
    """Draw the workflows, and the blueprints of those that have one."""
    for name in names:
        files = {canvas_file(name): draw(canvas, name)}
        if shots:
            canvas.screenshot(shots / f"{name}.png")
        if name in BLUEPRINTS:
            files[blueprint_file(BLUEPRINTS[name])] = draw_blueprint(canvas, name)
        for path, workflow in files.items():
            said = "written" if write(path, workflow) else "as it was"
            print(f"{path.relative_to(ROOT)}: {said}", flush=True)


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
            write_all(canvas, args.name or names(), args.shots)
        if args.run:
            from workflow_pictures import make_pictures

            make_pictures(server, chromium, args.name or names(), args.shots)
    return 0


if __name__ == "__main__":
    run_program(main)
