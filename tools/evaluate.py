"""Measures the methods on the miniature, where identity is exactly known.

--task personalize: held-out identities, each in scenes other than its reference's: plain, self-attention injection, the concept
encoder, both; the attribute reader judges. --variant takes rows of your own instead: "name: input=value, ..." with inputs of
Ref-UNet Feature Capture and Masked Self-Attn Inject, concept.INPUT for Cross-Attn Detail Inject, which is on where one is given,
self=off, mask=true or none (the renderer's own mask, no mask), inverted=yes (DDIM Invert first).
--task story: held-out sets of four scenes, each sampled as one batch: plain, ConsiStory Shared Attention, and it without each of its
parts; how much the pictures of a set show one subject. See evaluate_story.py for its rows. Ctrl-C prints the sets done so far.
--task miniature: how good the miniature itself is.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boot import boot
from checkout import version
from evaluate_story import story
from miniature_host import Studio

CAPTURE_INPUTS = {"mask_threshold": str, "mask_value": float, "mask_steps": int, "mask_blocks": str, "precision": str}
INJECT_INPUTS = {"strength": float, "weight": float, "weight_mode": str, "blocks": str, "start_percent": float, "end_percent": float,
                 "halves": str}
CONCEPT_INPUTS = {f"concept.{k}": kind for k, kind in ({"merge": str} | INJECT_INPUTS).items()}
OWN_INPUTS = {"mask": str, "inverted": str, "self": str}
ROWS = ("self", "cross: self=off, concept.weight=1", "full: concept.weight=1")


@dataclass(frozen=True)
class Variant:
    """One row of the table: how the subject is read and how it is injected."""
    name: str
    capture: tuple[tuple[str, Any], ...] = ()
    inject: tuple[tuple[str, Any], ...] | None = ()  # None: no self-attention injection
    concept: tuple[tuple[str, Any], ...] = ()  # nothing: no concept encoder
    mask: str = "word"
    inverted: bool = False

    @staticmethod
    def parse(text: str) -> Variant:
        name, _, rest = text.partition(":")
        pairs = dict((p.partition("=")[0].strip(), p.partition("=")[2].strip()) for p in rest.split(",") if p.strip())
        every = CAPTURE_INPUTS | INJECT_INPUTS | CONCEPT_INPUTS | OWN_INPUTS
        unknown = pairs.keys() - every.keys()
        if unknown:
            raise SystemExit(f"evaluate: variant {name!r} sets {', '.join(sorted(unknown))}; known are {', '.join(every)}.")
        def typed(known: Mapping[str, type]) -> tuple[tuple[str, Any], ...]:
            return tuple((k, known[k](v)) for k, v in sorted(pairs.items()) if k in known)
        concept = tuple((k.removeprefix("concept."), v) for k, v in typed(CONCEPT_INPUTS))
        return Variant(name.strip(), typed(CAPTURE_INPUTS), None if pairs.get("self") == "off" else typed(INJECT_INPUTS), concept,
                       pairs.get("mask", "word"), pairs.get("inverted") == "yes")


@dataclass
class Scores:
    """Readings of one variant's pictures."""
    identity: list[float] = field(default_factory=list)
    scene: list[bool] = field(default_factory=list)
    kind: list[bool] = field(default_factory=list)

    def add(self, reading: Any, identity: Any, scenes: Sequence[str], kind: str) -> None:
        from kindred.miniature.reader import identity_similarity
        self.identity += [identity_similarity(reading, identity, i) for i in range(len(reading))]
        self.scene += [read == asked for read, asked in zip(reading.names("scene"), scenes)]
        self.kind += [read == kind for read in reading.names("class")]


def personalize(given: argparse.Namespace) -> dict[str, float]:
    """Paper A on held-out identities: prints a table, returns the figures."""
    began = time.monotonic()
    studio = Studio(given.host, given.steps, given.cfg)
    from kindred.miniature.reader import floor_and_ceiling, load_reader
    from kindred.miniature.world import CLASSES, SCENES, held_out_identity, prompt, render
    variants = [Variant.parse(text) for text in given.variant or ROWS]
    scores = {name: Scores() for name in ("plain", *(v.name for v in variants))}
    reader, masks = load_reader(), []
    for i in range(given.first, given.first + given.count):
        identity = held_out_identity(i)
        kind, scenes = CLASSES[i % len(CLASSES)], [SCENES[(i + k) % len(SCENES)] for k in (0, 3, 6)]
        rendering = render(identity, kind, scenes[0], 5000 + i)
        lines, coarse = studio.prompts([prompt(kind, s) for s in scenes[1:]], kind), studio.prompts([prompt(kind)], kind)
        latent, banks = studio.encode(rendering.image), {}
        scores["plain"].add(reader.read(studio.sample(studio.model, lines, 2, i)), identity, scenes[1:], kind)
        for v in variants:
            model = studio.model
            if v.inject is not None:
                key = (v.capture, v.mask, v.inverted, dict(v.inject).get("halves") == "both")
                if key not in banks:
                    banks[key] = captured(studio, v, latent, coarse, rendering.mask)
                    if v.mask == "word":
                        masks.append(overlap(banks[key], rendering.mask))
                model = studio.run("KindredMaskedSelfAttnInject", model=model, reference=banks[key], **dict(v.inject))[0]
            if v.concept:
                model = studio.run("KindredCrossAttnDetailInject", model=model, concept_encoder=studio.encoder,
                                   image=studio.picture(rendering.image), **dict(v.concept))[0]
            scores[v.name].add(reader.read(studio.sample(model, lines, 2, i)), identity, scenes[1:], kind)
        sys.stderr.write(f"\r\033[K  identity {i + 1 - given.first} of {given.count}, {time.monotonic() - began:.0f} s")
    sys.stderr.write("\n")
    floor, ceiling = floor_and_ceiling(reader, studio.autoencode, given.count)
    print_table(scores, floor, ceiling)
    figures = {"identity.floor": floor, "identity.ceiling": ceiling, "count.identities": given.count,
               "seconds.total": time.monotonic() - began}
    if masks:
        figures["mask.iou"] = statistics.mean(masks)
    for name, found in scores.items():
        figures |= {f"identity.{name}": statistics.mean(found.identity), f"scene_accuracy.{name}": statistics.mean(found.scene),
                    f"class_accuracy.{name}": statistics.mean(found.kind)}
    return figures


def captured(studio: Studio, variant: Variant, latent: Any, coarse: Any, mask: Any) -> Any:
    """The reference as this variant reads it."""
    inputs: dict[str, Any] = {"model": studio.model, "positive": coarse, "steps": studio.steps,
                              "scheduler": "ddim_uniform"}
    if dict(variant.inject).get("halves") == "both":
        inputs["negative"] = studio.empty()
    if variant.inverted:
        inputs["inversion"] = studio.run("KindredDDIMInvert", model=studio.model, latent=latent, positive=coarse, steps=studio.steps,
                                         scheduler="ddim_uniform", check=False)[0]
    else:
        inputs["latent"] = latent
    if variant.mask != "word":
        inputs["mask"] = studio.torch.from_numpy(mask if variant.mask == "true" else mask | True).float()[None]
    return studio.run("KindredRefUNetCapture", **inputs, **dict(variant.capture))[0]


def overlap(bank: Any, mask: Any) -> float:
    """IoU of the found mask with the renderer's, at the latent's grid."""
    import torch
    from kindred.models.masks import iou, resize_user_mask
    grid = tuple(bank.trajectory.latents.shape[-2:])
    return float(iou(bank.masks[grid], resize_user_mask(torch.from_numpy(mask).float()[None], grid)))


def print_table(scores: Mapping[str, Scores], floor: float, ceiling: float) -> None:
    plain = statistics.mean(scores["plain"].identity)
    print(f"| variant | identity | s.e. | of the way | scene right | class right |   floor {floor:.3f}, ceiling {ceiling:.3f}")
    print("|---|---|---|---|---|---|")
    for name, s in scores.items():
        mean = statistics.mean(s.identity)
        error = statistics.stdev(s.identity) / len(s.identity) ** 0.5
        print(f"| {name} | {mean:.3f} | {error:.3f} | {(mean - plain) / (ceiling - plain):.2f} | {statistics.mean(s.scene):.2f} | "
              f"{statistics.mean(s.kind):.2f} |")


def miniature(given: argparse.Namespace) -> dict[str, float]:
    """The miniature's own figures."""
    boot(given.host)
    from kindred.miniature.measure import measure
    return measure(given.host, given.count)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("personalize", "story", "miniature"), default="personalize")
    parser.add_argument("--count", type=int, help="identities (default 40), story sets (30), or pictures per class and scene (20)")
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out identity or set (choose defaults on others than "
                                                             "the report's)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cfg", type=float, default=4.0)
    parser.add_argument("--variant", action="append", help='"name: input=value, ..."; repeat for more rows')
    parser.add_argument("--sheet", type=Path, help="story: draw the first sets into this .png")
    parser.add_argument("--raw", type=Path, help="story: write what each set gave into this file")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="story: the table of several --raw files, without a run")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    parser.add_argument("--host", type=Path, default=os.environ.get("KINDRED_HOST"), help="ComfyUI's folder (dev.py gives it)")
    given = parser.parse_args(argv)
    given.count = given.count or {"personalize": 40, "story": 30, "miniature": 20}[given.task]
    if given.count < 2:
        parser.error(f"--count is {given.count}, but the floor compares every identity with another one: at least 2")
    for option in ("sheet", "raw", "merge"):
        if getattr(given, option) and given.task != "story":
            parser.error(f"--{option} belongs to --task story")
    given.stopped = False
    given.host = Path(given.host or parser.error("--host is missing; run it as: python3 dev.py evaluate"))
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    figures = {"personalize": personalize, "story": story, "miniature": miniature}[given.task](given)
    for name, value in sorted(figures.items()):
        print(f"  {name:28} {value:.3f}")
    if given.json:
        report = {"command": f"evaluate --task {given.task}", "version": version(), "seed": 0, "figures": figures}
        given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 130 if given.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
