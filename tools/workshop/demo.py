"""One photo, a few prompts, one command: personalized pictures through the API of a real ComfyUI.

Without arguments it uses the miniature and a rendered subject that the miniature never saw, and measures the result.
With --miniature flow it uses the flow miniature, a transformer, and self-attention injection alone.
With --checkpoint and --reference the same job runs on your own SD1.5, SD2.x or SDXL checkpoint and photo.
Writes sheet.png, report.json and the pictures; runs workflows/api/personalize.json with self-attention injection, with the concept
encoder, with both, and with both strengths 0. A checkpoint of your own has a concept encoder only if you give one.
With --story the pictures share a subject of their own instead: tools/workshop/demo.py --story --help.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

import flow_workflow
from checkout import ROOT, as_kindred
from client import Client, HostError
from demo_report import Stopwatch, native_size, report, with_progress
from host_server import HostServer
from results import IN_GIT, prepare
from terminal import run_program

if TYPE_CHECKING:  # --help has to come without any package
    from PIL import Image

WORKFLOW = ROOT / "workflows" / "api" / "personalize.json"
# node ids of the shipped workflow, by what they do
LOADER, PHOTO, COARSE, CAPTURE, INJECT, PROMPTS, SIZE, SAMPLER, PICTURES = (
    "1",
    "2",
    "5",
    "6",
    "7",
    "8",
    "10",
    "11",
    "13",
)
ENCODER, CONCEPT, WORD = "15", "16", "18"
WAYS = {  # the columns of the sheet, in words
    "plain": "without Kindred",
    "self": "looks at the photo",
    "cross": "reads the photo",
    "full": "looks and reads",
}
HELD_OUT, SCENE, CLASS, REST = 6, "meadow", "cat", ("beach", "snow", "forest")


def prepared(
    arguments: argparse.Namespace, photo: str, checkpoint: str, size: int
) -> dict[str, Any]:
    """The shipped workflow with this job's inputs."""
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    graph = flow_workflow.flow_form(graph) if flow(arguments) else graph
    graph[LOADER]["inputs"]["ckpt_name"] = checkpoint
    graph[PHOTO]["inputs"]["image"] = photo
    for node in (PHOTO, SIZE):
        graph[node]["inputs"] |= {"width": size, "height": size}
    graph[WORD]["inputs"]["value"] = arguments.subject
    graph[PROMPTS]["inputs"]["prompts"] = "\n".join(arguments.prompt)
    for node in (CAPTURE, SAMPLER):
        graph[node]["inputs"]["steps"] = arguments.steps
    graph[SAMPLER]["inputs"] |= {"seed": arguments.seed, "cfg": arguments.cfg}
    for node, weight in ((INJECT, arguments.weight), (CONCEPT, arguments.concept_weight)):
        if node in graph:
            graph[node]["inputs"] |= {"strength": arguments.strength} | (
                {} if weight is None else {"weight": weight}
            )
    if arguments.concept_encoder:
        graph[ENCODER]["inputs"]["file"] = arguments.concept_encoder.name
    elif arguments.checkpoint:
        del graph[ENCODER], graph[CONCEPT]
        graph[SAMPLER]["inputs"]["model"] = [INJECT, 0]
    if arguments.clip_vision:
        graph["17"] = {
            "class_type": "CLIPVisionLoader",
            "inputs": {"clip_name": arguments.clip_vision.name},
        }
        graph[ENCODER]["inputs"]["clip_vision"] = ["17", 0]
    return graph


def columns(graph: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The jobs of the sheet: both injections and neither, and each alone where there is a concept encoder."""
    quiet = (
        {"full": (), "self": (CONCEPT,), "cross": (INJECT,), "plain": (INJECT, CONCEPT)}
        if CONCEPT in graph
        else {"self": (), "plain": (INJECT,)}
    )
    jobs = {name: copy.deepcopy(graph) for name in quiet}
    for name, nodes in quiet.items():
        for node in nodes:
            jobs[name][node]["inputs"]["strength"] = 0.0
        if name == "self":  # nothing is beside it
            jobs[name][INJECT]["inputs"]["preset"] = "identity"
    return jobs


def round_trip(graph: Mapping[str, Any]) -> dict[str, Any]:
    """The photo inverted, sampled back at CFG 1 and decoded, beside the same latent only decoded."""
    steps, model, vae = graph[CAPTURE]["inputs"]["steps"], [LOADER, 0], [LOADER, 2]
    kept = {k: copy.deepcopy(graph[k]) for k in (LOADER, PHOTO, "4", WORD, COARSE)}
    return kept | {
        "20": {
            "class_type": "KindredDDIMInvert",
            "inputs": {
                "model": model,
                "latent": ["4", 0],
                "positive": [COARSE, 0],
                "steps": steps,
                "scheduler": "ddim_uniform",
                "method": "ddim",
                "seed": 0,
                "check": False,
            },
        },
        "21": {
            "class_type": "KSamplerAdvanced",
            "inputs": {
                "model": model,
                "add_noise": "disable",
                "noise_seed": 0,
                "steps": steps,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "ddim_uniform",
                "positive": [COARSE, 0],
                "negative": [COARSE, 0],
                "latent_image": ["20", 1],
                "start_at_step": 0,
                "end_at_step": 10000,
                "return_with_leftover_noise": "disable",
            },
        },
        "22": {"class_type": "VAEDecode", "inputs": {"samples": ["21", 0], "vae": vae}},
        "23": {
            "class_type": "SaveImage",
            "inputs": {"images": ["22", 0], "filename_prefix": "kindred_back"},
        },
        "24": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": vae}},
        "25": {
            "class_type": "SaveImage",
            "inputs": {"images": ["24", 0], "filename_prefix": "kindred_vae"},
        },
    }


def sheet(
    reference: Image.Image,
    columns: Mapping[str, Sequence[Image.Image]],
    prompts: Sequence[str],
    cell: int = 256,
) -> Image.Image:
    """The photo and a column for each of WAYS, a row per prompt, with the prompt under its row."""
    from PIL import Image, ImageDraw, ImageFont

    head, foot, gap = 26, 24, 8
    width = (1 + len(columns)) * (cell + gap) + gap
    page = Image.new("RGB", (width, head + len(prompts) * (cell + foot + gap) + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (title, pictures) in enumerate(
        {"your photo": [reference] * len(prompts), **columns}.items()
    ):
        left = gap + i * (cell + gap)
        draw.text((left, 5), WAYS.get(title, title), "black", font)
        for row, picture in enumerate(pictures):
            page.paste(
                picture.convert("RGB").resize((cell, cell), Image.LANCZOS),
                (left, head + row * (cell + foot + gap)),
            )
    for row, prompt in enumerate(prompts):
        draw.text((gap, head + row * (cell + foot + gap) + cell + 3), prompt[:100], "black", font)
    return page


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """PSNR of two 8-bit pictures in dB."""
    as_kindred()
    import numpy as np
    import torch
    from kindred.models.metrics import psnr

    return psnr(
        *(torch.from_numpy(np.array(p.convert("RGB"), dtype=np.float64)) for p in (a, b)), peak=255
    )


def flow(args: argparse.Namespace) -> bool:
    return args.miniature == "flow"


def measured(by_title: Mapping[str, Sequence[Image.Image]], file: Path | None) -> dict[str, float]:
    """Identity and scene figures of a miniature's demo, by the attribute reader; file: None for the UNet miniature's own."""
    as_kindred()
    import numpy as np
    import torch
    from kindred.miniature.pack import load_autoencoder
    from kindred.miniature.reader import floor_and_ceiling, identity_similarity, load_reader
    from kindred.miniature.world import held_out_identity

    torch.set_num_threads(1)
    reader, identity = load_reader(), held_out_identity(HELD_OUT)
    autoencoder = load_autoencoder(file) if file else load_autoencoder()
    floor, ceiling = floor_and_ceiling(
        reader,
        lambda images: autoencoder.decode(autoencoder.encode(images.movedim(-1, 1))).movedim(1, -1),
    )
    figures = {"identity.floor": floor, "identity.ceiling": ceiling}
    for name, pictures in by_title.items():
        reading = reader.read(
            torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).float()
            / 255
        )
        count = len(reading)
        figures[f"identity.{name}"] = (
            sum(identity_similarity(reading, identity, i) for i in range(count)) / count
        )
        figures[f"scene_accuracy.{name}"] = (
            sum(a == b for a, b in zip(reading.names("scene"), REST)) / count
        )
        figures[f"class_accuracy.{name}"] = sum(a == CLASS for a in reading.names("class")) / count
        figures[f"whole_subject.{name}"] = float((reading.whole > 0.5).float().mean())
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dev.py demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kindred-demo"),
        help=f"folder for the pictures (default: %(default)s, of the flow miniature %(default)s-flow{IN_GIT})",
    )
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    parser.add_argument(
        "--miniature", choices=("unet", "flow"), help="which of the two draws (default: unet)"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="your own SD1.5, SD2.x or SDXL checkpoint instead of the miniature",
    )
    parser.add_argument("--reference", type=Path, help="a photo of the subject")
    parser.add_argument("--subject", help="the word for the subject, such as cat or woman")
    parser.add_argument(
        "--concept-encoder",
        type=Path,
        help="a concept encoder for your checkpoint; none: self-attention injection alone",
    )
    parser.add_argument(
        "--clip-vision", type=Path, help="the CLIP Vision that IP-Adapter full-face weights need"
    )
    parser.add_argument(
        "--prompt",
        action="append",
        help="a prompt that contains the subject's word; repeat it for several pictures",
    )
    parser.add_argument(
        "--size", type=int, help="pixels of a side (default: what the checkpoint was trained at)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help=f"default: 50, with the flow miniature {flow_workflow.STEPS}"
    )
    parser.add_argument(
        "--cfg", type=float, help="guidance (default 4 for the miniature, 7.5 for a checkpoint)"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how much of the subject comes through, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--weight", type=float, help="W_S at full strength (default: the workflow's)"
    )
    parser.add_argument(
        "--concept-weight", type=float, help="W_C at full strength (default: the workflow's)"
    )
    parser.add_argument(
        "--story",
        action="store_true",
        help="a story instead; tools/workshop/demo.py --story --help tells its options",
    )
    parser.add_argument("--host", type=Path, help="ComfyUI's folder (dev.py gives it)")
    args = parser.parse_args(argv)
    own = args.checkpoint is not None
    settle_miniature(args, parser)
    if args.concept_encoder and not own:
        parser.error("--concept-encoder needs the --checkpoint that it was trained for")
    if args.clip_vision and not args.concept_encoder:
        parser.error("--clip-vision needs --concept-encoder")
    for name in ("reference", "subject", "prompt"):
        if own and not getattr(args, name):
            parser.error(f"--checkpoint also needs --{name}")
    for path in filter(
        None, (args.checkpoint, args.reference, args.concept_encoder, args.clip_vision)
    ):
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if not own:
        from_world(args)
    args.cfg = args.cfg if args.cfg is not None else 7.5 if own else 4.0
    return args


def settle_miniature(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """What is the flow miniature's own; words that would do nothing end the program."""
    if args.checkpoint and args.miniature:
        parser.error("--miniature does nothing here: --checkpoint draws")
    if flow(args) and args.concept_weight is not None:
        parser.error(
            "--concept-weight does nothing here: the flow miniature has no concept encoder"
        )
    if flow(args) and args.out == parser.get_default("out"):
        args.out = Path("kindred-demo-flow")
    args.steps = args.steps or (flow_workflow.STEPS if flow(args) else 50)


def from_world(args: argparse.Namespace) -> None:
    """The miniature's own job: a held-out identity in one scene, asked for in three others."""
    as_kindred()
    from kindred.miniature.world import held_out_identity, prompt, render

    args.rendered = not (
        args.reference or args.prompt or args.subject
    )  # else there is no truth to measure against
    args.subject = args.subject or CLASS
    args.prompt = args.prompt or [prompt(CLASS, scene) for scene in REST]
    args.photo = (
        args.reference.read_bytes()
        if args.reference
        else png(render(held_out_identity(HELD_OUT), CLASS, SCENE, 11).image)
    )


def png(array: Any) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--story" in argv:
        from demo_story import main as story

        return story([word for word in argv if word != "--story"])
    args = parse(argv)
    from PIL import Image

    own = args.checkpoint is not None
    began = time.monotonic()
    photo = args.reference.read_bytes() if own else args.photo
    size = args.size or (native_size(args.checkpoint) if own else 128)
    prepare(args.out, args.json)
    models = {
        "checkpoints": flow_workflow.checkpoint() if flow(args) else args.checkpoint,
        "concept_encoders": args.concept_encoder,
        "clip_vision": args.clip_vision,
    }
    with HostServer(
        args.host, models={kind: [path] for kind, path in models.items() if path} or None
    ) as server:
        graph, pictures, figures = drawn(server.client, args, photo, size)
    if not own and args.rendered:
        file = flow_workflow.checkpoint() if flow(args) else None
        figures |= measured(pictures, file) | {"count.identities": 1}
    figures["seconds.total"] = time.monotonic() - began
    write(args, pictures, Image.open(BytesIO(photo)), figures, graph)
    return 0


def drawn(
    client: Client, args: argparse.Namespace, photo: bytes, size: int
) -> tuple[dict[str, Any], dict[str, list[Image.Image]], dict[str, float]]:
    """The workflow, the pictures of each column, and what they and the photo's inversion took."""
    from PIL import Image

    own = args.checkpoint is not None
    own_file = flow_workflow.CHECKPOINT if flow(args) else "kindred_miniature.safetensors"
    checkpoint = args.checkpoint.name if own else own_file
    name = client.upload_image(photo, "kindred_reference.png")
    graph = prepared(args, name, checkpoint, size)
    titles = {
        key: node.get("_meta", {}).get("title", node["class_type"]) for key, node in graph.items()
    }
    watch, pictures, figures = Stopwatch(titles), {}, {}
    for title, job in columns(graph).items():
        outputs = with_progress(client, job, watch)
        pictures[title] = [
            Image.open(BytesIO(client.view(image))) for image in outputs[PICTURES]["images"]
        ]
        if not figures:  # the first one reads the reference
            figures = {
                "unet_calls.reference": watch.steps[CAPTURE],
                "seconds.inversion": watch.seconds[CAPTURE],
                "seconds.sampling": watch.seconds[SAMPLER],
            }
    if flow(args):  # KSampler Advanced cannot begin at a straight flow's noise
        return graph, pictures, figures
    back = with_progress(client, round_trip(graph), watch)
    decoded = [Image.open(BytesIO(client.view(back[key]["images"][0]))) for key in ("23", "25")]
    return graph, pictures, figures | {"inversion.psnr_db": psnr_db(*decoded)}


def write(
    args: argparse.Namespace,
    pictures: Mapping[str, Sequence[Image.Image]],
    photo: Image.Image,
    figures: dict[str, float],
    graph: Mapping[str, Any],
) -> None:
    """sheet.png, the single pictures, the workflow that was run, report.json."""
    from PIL import ImageOps

    photo = ImageOps.exif_transpose(photo)
    side = min(photo.size)
    square = photo.crop(
        (
            (photo.width - side) // 2,
            (photo.height - side) // 2,
            (photo.width + side) // 2,
            (photo.height + side) // 2,
        )
    )
    shown = {title: pictures[title] for title in WAYS if title in pictures}
    sheet(square, shown, args.prompt).save(args.out / "sheet.png")
    for title, images in pictures.items():
        for i, picture in enumerate(images, 1):
            picture.save(args.out / f"{title}_{i}.png")
    (args.out / "workflow_api.json").write_text(json.dumps(graph, indent=2), "utf-8")
    ways = ", ".join(f"{WAYS[title]} ({title})" for title in shown)
    look = f"on the left your photo, then each prompt drawn {len(shown)} ways: {ways}"
    report(args, "demo", {"prompts": args.prompt}, figures, look)


if __name__ == "__main__":
    try:
        run_program(main)
    except HostError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: stopped")
