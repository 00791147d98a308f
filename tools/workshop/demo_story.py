"""One subject in several pictures, without training: dev.py demo --story, through the API of a real ComfyUI.

Without further arguments it uses the miniature and measures the result. Three stories: four scenes of one class, plain and with
ConsiStory Shared Attention; a subject made by ConsiStory Anchor Sampler, saved, loaded, and asked for in further pictures; a
subject read from two pictures of it. With --checkpoint it tells your own story instead; --more and --reference add the other two.
Runs the graphs of workflows/api/story*.json; writes sheet.png, the pictures, the graphs and report.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from checkout import ROOT
from client import Client
from demo_report import Stopwatch, native_size, report, with_progress
from host_server import HostServer, link
from results import IN_GIT, prepare
from story_figures import PHOTO_SCENES, SCENES, SECOND, SUBJECT, figures_of, photos
from terminal import run_program

if TYPE_CHECKING:  # --help has to come without any package
    from PIL import Image

WORKFLOWS = {
    name: ROOT / "workflows" / "api" / f"{name}.json"
    for name in ("story", "story_more_pictures", "story_from_photo")
}
# node ids of the shipped workflows, by what they do; 1 to 8 are the same in all three
LOADER, PROMPTS, NEGATIVE, SIZE, STORY, SAMPLER, DECODE, PICTURES = (
    "1",
    "2",
    "3",
    "4",
    "5",
    "6",
    "7",
    "8",
)
LOAD = "9"  # story_more_pictures
PHOTO, BATCH, CAPTURE, PREVIEW, WORD = (
    ("9", "10"),
    "13",
    "16",
    "17",
    "18",
)  # story_from_photo
SAVE = "20"  # beside the anchors
Graph = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class StoryRun:
    """What one job of the host gave."""

    graph: Graph
    outputs: Mapping[str, Any]
    pictures: list[Image.Image]
    seconds: Mapping[str, float]  # by node
    unet_calls: int


@dataclass
class Teller:
    """Runs graphs one after another, on a server that counts the UNet's evaluations."""

    client: Client
    runs: dict[str, StoryRun] = field(default_factory=dict)

    def run(self, name: str, graph: Graph, shown: str = PICTURES) -> StoryRun:
        """shown: the node whose pictures count."""
        from PIL import Image

        watch = Stopwatch(
            {
                key: f"{name}: {node.get('_meta', {}).get('title', node['class_type'])}"
                for key, node in graph.items()
            }
        )
        self.client.json("/kindred_calls")
        outputs = with_progress(self.client, graph, watch)
        pictures = [
            Image.open(BytesIO(self.client.view(image))) for image in outputs[shown]["images"]
        ]
        self.runs[name] = StoryRun(
            graph, outputs, pictures, watch.seconds, self.client.json("/kindred_calls")
        )
        return self.runs[name]


def graph_of(workflow: str, args: argparse.Namespace, lines: Sequence[str], subject: str) -> Graph:
    """A shipped workflow with this job's inputs."""
    graph = json.loads(WORKFLOWS[workflow].read_text("utf-8"))
    graph[LOADER]["inputs"]["ckpt_name"] = (
        args.checkpoint.name if args.checkpoint else "kindred_miniature.safetensors"
    )
    graph[PROMPTS]["inputs"] |= {
        "prompts": "\n".join(lines),
        "subject": subject,
        "style": args.style,
    }
    graph[SIZE]["inputs"] |= {"width": args.size, "height": args.size}
    graph[STORY]["inputs"]["strength"] = args.strength
    graph[SAMPLER]["inputs"] |= {
        "seed": args.seed,
        "steps": args.steps,
        "cfg": args.cfg,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
    }
    return graph


def plain(graph: Graph) -> Graph:
    """The same pictures with no node of ours on the model."""
    graph = copy.deepcopy(graph)
    graph[SAMPLER]["inputs"]["model"] = [LOADER, 0]
    del graph[STORY]
    return graph


def anchors(graph: Graph) -> Graph:
    """The same pictures, sampled so that their subject can be saved."""
    graph = copy.deepcopy(graph)
    graph[SAMPLER] |= {
        "class_type": "KindredAnchorSampler",
        "_meta": {"title": "Sample the anchors"},
    }
    graph[SAMPLER]["inputs"]["precision"] = "as computed"
    graph[SAVE] = {
        "class_type": "KindredSaveReference",
        "inputs": {"reference": [SAMPLER, 1], "filename_prefix": "kindred/subject"},
        "_meta": {"title": "Save the subject"},
    }
    return graph


def from_photos(graph: Graph, names: Sequence[str], args: argparse.Namespace) -> Graph:
    """The photo story of any number of uploaded photos."""
    graph = copy.deepcopy(graph)
    load = graph[PHOTO[0]]
    for key in PHOTO:
        del graph[key]
    fitted = load["inputs"] | {"width": args.size, "height": args.size}
    for i, name in enumerate(names):
        graph[f"photo {i + 1}"] = load | {"inputs": fitted | {"image": name}}
    graph[BATCH]["inputs"] = {f"images.image{i}": [f"photo {i + 1}", 0] for i in range(len(names))}
    graph[WORD]["inputs"]["value"] = args.subject
    graph[CAPTURE]["inputs"]["steps"] = args.steps
    return graph


def only_read(graph: Graph) -> Graph:
    """A photo story as far as its reference; the host keeps it for the pictures."""
    return {
        key: node
        for key, node in graph.items()
        if key not in (PROMPTS, NEGATIVE, SIZE, STORY, SAMPLER, DECODE, PICTURES)
    }


def saved_name(one: StoryRun) -> str:
    """The name under which Load Reference lists what Save Reference wrote: "kindred/subject_00001_.safetensors, 2.9 MB"."""
    return one.outputs[SAVE]["text"][0].partition(",")[0].removeprefix("kindred/")


@contextmanager
def counting_server(args: argparse.Namespace) -> Iterator[HostServer]:
    """A host with the pack and tools/workshop/count_calls.py."""
    with tempfile.TemporaryDirectory(prefix="kindred-", ignore_cleanup_errors=True) as base:
        (Path(base) / "custom_nodes").mkdir()
        link(
            ROOT / "tools" / "workshop" / "count_calls.py",
            Path(base) / "custom_nodes" / "count_calls.py",
        )
        models = {"checkpoints": [args.checkpoint]} if args.checkpoint else None
        with HostServer(args.host, base=Path(base), models=models) as server:
            yield server


def tell(args: argparse.Namespace, client: Client) -> dict[str, StoryRun]:
    """Every story asked for, by name; `anchors` and `reading` are the first halves of two of them."""
    teller = Teller(client)
    graph = graph_of("story", args, args.prompt, args.subject)
    teller.run("plain", plain(graph))
    teller.run("story", graph)
    if args.more:
        anchored = teller.run(
            "anchors", anchors(graph_of("story", args, args.anchors, args.second))
        )
        graph = graph_of("story_more_pictures", args, args.more, args.second)
        graph[LOAD]["inputs"]["file"] = saved_name(anchored)
        graph[SAMPLER]["inputs"]["seed"] = args.seed + 1
        teller.run("more_pictures", graph)
    if args.reference:
        names = [
            client.upload_image(photo, f"kindred_photo_{i}.png")
            for i, photo in enumerate(args.reference, 1)
        ]
        graph = from_photos(
            graph_of("story_from_photo", args, args.prompt, args.subject), names, args
        )
        teller.run("reading", only_read(graph), PREVIEW)
        teller.run("photo_story", graph)
    return teller.runs


Row = tuple[str, Sequence[tuple["Image.Image", str]]]


def rows(args: argparse.Namespace, runs: Mapping[str, StoryRun]) -> list[Row]:
    """The sheet's rows: a title, and pictures with what was asked for."""
    from PIL import Image

    def captioned(name: str, lines: Sequence[str]) -> list[tuple[Image.Image, str]]:
        return list(zip(runs[name].pictures, lines, strict=True))

    table: list[Row] = [
        ("plain: the prompts by themselves", captioned("plain", args.prompt)),
        (
            "story: the same noise, with ConsiStory Shared Attention",
            captioned("story", args.prompt),
        ),
    ]
    if "more_pictures" in runs:
        table.append(
            (
                "more pictures of a saved subject: its two anchors, then what was made from the file",
                captioned("anchors", [f"anchor: {line}" for line in args.anchors])
                + captioned("more_pictures", args.more),
            )
        )
    if "photo_story" in runs:
        photos = [
            (Image.open(BytesIO(photo)), f"photo {i}") for i, photo in enumerate(args.reference, 1)
        ]
        table.append(
            (
                "from photos: what was inverted, then the first row's noise",
                photos + captioned("photo_story", args.prompt),
            )
        )
    return table


def sheet(rows: Sequence[Row], cell: int = 192) -> Image.Image:
    """A row per story: its title, its pictures, the prompt under each."""
    from PIL import Image, ImageDraw, ImageFont

    head, foot, gap = 30, 26, 8
    tall = head + cell + foot + gap
    page = Image.new(
        "RGB",
        (gap + max(len(pictures) for _, pictures in rows) * (cell + gap), len(rows) * tall),
        "white",
    )
    draw, title_font, font = (
        ImageDraw.Draw(page),
        ImageFont.load_default(16),
        ImageFont.load_default(13),
    )
    for row, (title, pictures) in enumerate(rows):
        draw.text((gap, row * tall + 7), title, "black", title_font)
        for i, (picture, prompt) in enumerate(pictures):
            left, top = gap + i * (cell + gap), row * tall + head
            page.paste(square(picture).resize((cell, cell), Image.LANCZOS), (left, top))
            while draw.textlength(prompt, font) > cell:
                prompt = prompt[:-2] + "…"
            draw.text((left, top + cell + 4), prompt, "black", font)
    return page


def square(picture: Image.Image) -> Image.Image:
    """The middle of a picture, as the workflow crops a photo."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.convert("RGB").crop((left, top, left + side, top + side))


def costs(runs: Mapping[str, StoryRun]) -> dict[str, float]:
    """Evaluations of the UNet and seconds of the sampler (of the capture, for `reading`), by story."""
    figures: dict[str, float] = {f"unet_calls.{name}": job.unet_calls for name, job in runs.items()}
    timed = {name: CAPTURE if name == "reading" else SAMPLER for name in runs}
    return figures | {
        f"seconds.{name}": runs[name].seconds[node]
        for name, node in timed.items()
        if node in runs[name].seconds
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py demo --story",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kindred-story"),
        help=f"folder for the pictures (default: %(default)s{IN_GIT})",
    )
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="your own SD1.5, SD2.x or SDXL checkpoint instead of the miniature",
    )
    parser.add_argument(
        "--subject",
        help="the word for the subject, which every prompt contains, such as cat or woman",
    )
    parser.add_argument("--style", help="put before every prompt, such as: a watercolour of a")
    parser.add_argument(
        "--prompt", action="append", help="a picture of the story; repeat it, twice at least"
    )
    parser.add_argument(
        "--more",
        action="append",
        help="a further picture of the first two prompts' subject, once it is saved and loaded",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        action="append",
        help="a photo of the subject; repeat it: the paper takes two",
    )
    parser.add_argument(
        "--size", type=int, help="pixels of a side (default: what the checkpoint was trained at)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--cfg", type=float, help="guidance (default 4 for the miniature, 5 for a checkpoint)"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how alike the subjects become, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--host", type=Path, help="ComfyUI's folder (dev.py gives it)")
    args = parser.parse_args(argv)
    own = ("subject", "style", "prompt", "more", "reference")
    for path in filter(None, (args.checkpoint, *(args.reference or ()))):
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if args.checkpoint is None and any(getattr(args, name) for name in own):
        parser.error(
            f"--{', --'.join(own)} tell a story of your own and need --checkpoint; the miniature tells one that it can measure"
        )
    if args.checkpoint and (not args.subject or len(args.prompt or ()) < 2):
        parser.error("--checkpoint also needs --subject, and --prompt twice at least")
    args.measured = args.checkpoint is None
    if args.measured:
        from_world(args)
    else:
        args.style, args.second, args.anchors = (
            args.style or "",
            args.subject,
            args.prompt[:2],
        )
        args.reference = [path.read_bytes() for path in args.reference or ()]
    args.size = args.size or (native_size(args.checkpoint) if args.checkpoint else 128)
    args.cfg = args.cfg if args.cfg is not None else 5.0 if args.checkpoint else 4.0
    return args


def from_world(args: argparse.Namespace) -> None:
    """The miniature's own stories."""
    from checkout import as_kindred

    as_kindred()
    from kindred.miniature.world import PLACES

    args.style, args.subject, args.second = "a photo of a", SUBJECT, SECOND
    args.prompt = [f"{SUBJECT} {PLACES[scene]}" for scene in SCENES["story"]]
    args.anchors, args.more = (
        [f"{SECOND} {PLACES[scene]}" for scene in SCENES[name]]
        for name in ("anchors", "more_pictures")
    )
    args.reference = photos(PHOTO_SCENES)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    prepare(args.out, args.json)
    with counting_server(args) as server:
        runs = tell(args, server.client)
    figures = costs(runs)
    if args.measured:
        figures |= figures_of(
            {name: job.pictures for name, job in runs.items() if name != "reading"}
        )
    figures["seconds.total"] = time.monotonic() - began
    write(args, runs, figures)
    return 0


def write(
    args: argparse.Namespace, runs: Mapping[str, StoryRun], figures: dict[str, float]
) -> None:
    """sheet.png, the single pictures, the graphs that were run, report.json."""
    sheet(rows(args, runs)).save(args.out / "sheet.png")
    for name, job in runs.items():
        for i, picture in enumerate(job.pictures, 1):
            picture.save(args.out / f"{name}_{i}.png")
        (args.out / f"{name}_api.json").write_text(json.dumps(job.graph, indent=2), "utf-8")
    prompts = {"prompts": args.prompt, "more": args.more or []}
    look = "the first row is without Kindred, each row below it shares one subject"
    report(args, "demo --story", prompts, figures, look)


if __name__ == "__main__":
    run_program(main)
