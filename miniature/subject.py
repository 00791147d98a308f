"""Makes the shipped subject of workflows/api/story_more_pictures.json: `python -m miniature.subject --host <ComfyUI>`, from the root.

Two anchors of one class, sampled by ConsiStory Anchor Sampler with the inputs that the workflow's own nodes have, so that its
further pictures find every noise level they ask for. Seeded; float16; few steps keep the file small.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .program import prepare, run_program

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = ROOT / "miniature" / "weights" / "references" / "kindred_story.safetensors"
WORKFLOW = ROOT / "workflows" / "api" / "story_more_pictures.json"
SCENES, SEED = ("beach", "meadow"), 2


def make(host: Path, path: Path) -> float:
    """Samples the anchors and writes them to `path`; returns the file's MiB."""
    sys.path.append(str(ROOT / "tools" / "workshop"))
    import torch
    from miniature_host import Studio

    torch.set_num_threads(1)
    graph = json.loads(WORKFLOW.read_text("utf-8"))
    prompts, story, sampler = (
        next(node["inputs"] for node in graph.values() if node["class_type"] == kind)
        for kind in ("KindredSubjectPrompts", "KindredConsiStory", "KSampler")
    )
    studio = Studio(host, sampler["steps"], sampler["cfg"])
    from kindred.miniature.world import prompt
    from kindred.models.reference.file import save_reference

    settings = {name: value for name, value in story.items() if not isinstance(value, list)}
    model = studio.run("KindredConsiStory", model=studio.model, **settings)[0]
    positive = studio.prompts(
        [prompt(prompts["subject"], scene) for scene in SCENES], prompts["subject"]
    )
    sampling = {name: sampler[name] for name in ("steps", "cfg", "sampler_name", "scheduler")}
    latent = {"samples": torch.zeros(len(SCENES), 4, 16, 16)}
    bank = studio.run(
        "KindredAnchorSampler",
        model=model,
        seed=SEED,
        positive=positive,
        negative=studio.empty(),
        latent_image=latent,
        precision="float16",
        **sampling,
    )[1]
    save_reference(bank, path)
    return path.stat().st_size / 2**20


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m miniature.subject", description=__doc__)
    parser.add_argument("--host", type=Path, required=True, help="a ComfyUI folder")
    parser.add_argument("--out", type=Path, default=SUBJECT)
    args = parser.parse_args(arguments)
    prepare(None, args.out)
    sys.stderr.write(f"{args.out.name}: {make(args.host, args.out):.2f} MiB\n")


if __name__ == "__main__":
    run_program(main)
