"""evaluate --task story: how much the pictures of a story show one subject, on sets that no default was chosen on.

A set is a class in four scenes, sampled as one latent batch. Rows: plain, story (ConsiStory Shared Attention as the node comes), and
it without one of its parts each. --variant "name: input=value, ..." takes rows of your own instead, with the node's inputs, mask=none
(masks of ones: backgrounds are shared too), cfg= and seed_offset= (of the noise); a name of the table alone means that row. --sheet
draws the first sets. --raw keeps what each set gave, --merge FILE FILE ... prints the table of several such files, without a run.
"""
from __future__ import annotations

import argparse
import json
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkout import as_kindred
from miniature_host import Studio

if TYPE_CHECKING:
    from kindred.miniature.reader import Reading

PICTURES = 4  # of a set
SHEET_SETS = 3
NODE_INPUTS: dict[str, type] = {
    "strength": float, "anchors": int, "seed": int, "weight": float, "dropout": float, "query_blend": float, "feature_injection": float,
    "query_blend_end": float, "blend_end_percent": float, "injection_start_percent": float, "injection_end_percent": float,
    "blocks": str, "mask_blocks": str, "halves": str, "order": str, "align_keys": bool}
OWN_INPUTS: dict[str, type] = {"mask": str, "cfg": float, "seed_offset": int}
ROWS = {"story": "", "no_sharing": "weight=0", "no_dropout": "dropout=0", "no_blend": "query_blend=0",
        "no_injection": "feature_injection=0", "no_mask": "mask=none"}
KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class StoryVariant:
    """One row of the table; without the node it is plain."""
    name: str
    inputs: tuple[tuple[str, Any], ...] | None = ()  # None: plain
    masked: bool = True
    cfg: float | None = None
    seed_offset: int = 0

    @staticmethod
    def parse(text: str) -> StoryVariant:
        """ "name: input=value, ..."; a value may hold commas ("blocks=output 3-5, middle 0"). SystemExit names a wrong input."""
        name, colon, rest = (part.strip() for part in text.partition(":"))
        refused = f"evaluate: variant {name!r} "
        if not name or name == "plain":
            raise SystemExit(f"{refused}needs a name of its own, as in \"strong: weight=2\".")
        pairs: dict[str, str] = {}
        for piece in (rest if colon else ROWS.get(name, "")).split(","):
            key, equals, value = (part.strip() for part in piece.partition("="))
            if equals:
                pairs[key] = value
            elif pairs:
                pairs[next(reversed(pairs))] += f", {key}"  # the value's own comma
            elif key:
                raise SystemExit(f"{refused}sets {key!r} without a value; write {key}=VALUE.")
        every = NODE_INPUTS | OWN_INPUTS
        if unknown := sorted(pairs.keys() - every.keys()):
            raise SystemExit(f"{refused}sets {', '.join(unknown)}; known are {', '.join(every)}.")
        values = {key: typed(refused, key, value, every[key]) for key, value in pairs.items()}
        if (mask := values.get("mask", "word")) not in ("word", "none"):
            raise SystemExit(f"{refused}sets mask to {mask!r}; it is word (found by the subject's word) or none (the whole picture).")
        return StoryVariant(name, tuple((k, v) for k, v in values.items() if k in NODE_INPUTS), mask == "word", values.get("cfg"),
                            values.get("seed_offset", 0))


def typed(refused: str, key: str, value: str, kind: type) -> Any:
    """The text of an input as what the node takes."""
    try:
        return {"true": True, "yes": True, "false": False, "no": False}[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise SystemExit(f"{refused}sets {key} to {value!r}, which is not {KIND_NAMES[kind]}.") from None


@dataclass(frozen=True)
class RowResult:
    """What one set gave in one row."""
    consistency: float
    scene: float  # share of the pictures whose scene is read as asked
    kind: float  # the same of the class
    spread: float  # layout; NaN where fewer than two pictures show a subject
    seconds: float
    unet_calls: int


@dataclass(frozen=True)
class SetResult:
    """One set: plain JSON, so that a table can be made of several files."""
    number: int
    ceiling: float  # one held-out identity rendered in the set's scenes, through the autoencoder
    rows: dict[str, RowResult]
    plain: dict[str, dict[str, list[Any]]]  # what is read from the plain pictures, for the floor

    @staticmethod
    def parse(found: Mapping[str, Any]) -> SetResult:
        return SetResult(**{**found, "rows": {name: RowResult(**row) for name, row in found["rows"].items()}})


def story_set(number: int) -> tuple[str, list[str]]:
    """Class and scenes of a set."""
    import numpy as np
    from kindred.miniature.world import CLASSES, SCENES
    drawn = np.random.default_rng([number, 5]).permutation(len(SCENES))[:PICTURES]  # the world's own seeds are [seed, 1..4]
    return CLASSES[number % len(CLASSES)], [SCENES[i] for i in drawn]


def sample(studio: Studio, variant: StoryVariant, lines: Any, number: int) -> Any:
    """The pictures of a set in one row: IMAGE [b y x 3]."""
    model = studio.model
    if variant.inputs is not None:
        masks = {} if variant.masked else {"masks": studio.torch.ones(PICTURES, 128, 128)}
        model = studio.run("KindredConsiStory", model=model, **{"seed": number} | dict(variant.inputs) | masks)[0]
    return studio.sample(model, lines, PICTURES, number + variant.seed_offset, variant.cfg)


def judge(reading: Reading, kind: str, scenes: Sequence[str], seconds: float, calls: int) -> RowResult:
    """A row's numbers from what is read in its pictures."""
    from kindred.miniature.reader import consistency, layout_spread, subject_boxes
    right = [read == asked for read, asked in zip(reading.names("scene"), scenes, strict=True)]
    return RowResult(consistency(reading), statistics.mean(right), statistics.mean(read == kind for read in reading.names("class")),
                     layout_spread(subject_boxes(reading)), seconds, calls)


def measure(given: argparse.Namespace, variants: Sequence[StoryVariant], done: list[SetResult],
            sheet: list[tuple[str, list[str], dict[str, Any]]]) -> None:
    """Runs the sets and appends what each gives to `done`, and the pictures of the first ones to `sheet`."""
    began, studio = time.monotonic(), Studio(given.host, given.steps, given.cfg)
    from kindred.miniature.reader import consistency, load_reader
    from kindred.miniature.world import held_out_identity, prompt, render
    reader = load_reader()
    for number in range(given.first, given.first + given.count):
        kind, scenes = story_set(number)
        lines = studio.prompts([prompt(kind, scene) for scene in scenes], kind)
        rows, drawn, readings = {}, {}, {}
        for variant in variants:
            sys.stderr.write(f"\r\033[K  set {number + 1 - given.first} of {given.count}, {variant.name}, {time.monotonic() - began:.0f} s")
            start = time.monotonic()
            with studio.counted() as calls:
                drawn[variant.name] = sample(studio, variant, lines, number)
            seconds, readings[variant.name] = time.monotonic() - start, reader.read(drawn[variant.name])
            rows[variant.name] = judge(readings[variant.name], kind, scenes, seconds, len(calls))
        rendered = [render(held_out_identity(number), kind, scene, 6000 + PICTURES * number + i) for i, scene in enumerate(scenes)]
        same = reader.read(studio.autoencode(studio.torch.cat([studio.picture(r.image) for r in rendered])))
        done.append(SetResult(number, consistency(same), rows, listed(readings["plain"])))
        if len(sheet) < SHEET_SETS and given.sheet:
            sheet.append((f"set {number}: {kind}", scenes, drawn))
            draw_sheet(sheet).save(given.sheet)
        if given.raw:
            write_raw(given.raw, given.steps, given.cfg, variants, done)


def listed(reading: Reading) -> dict[str, dict[str, list[Any]]]:
    """The parts of a reading that tell an identity, as lists."""
    return {"probabilities": {kind: reading.probabilities[kind].tolist() for kind in ("pattern", "hat")},
            "colours": {name: values.tolist() for name, values in reading.colours.items()}}


def floor_of(sets: Sequence[SetResult]) -> float:
    """Mean similarity of plain pictures of different sets; NaN for one set alone."""
    import torch
    from kindred.miniature.reader import Reading, pairwise_similarity
    readings = [Reading(*({name: torch.tensor(v) for name, v in s.plain[part].items()} for part in ("probabilities", "colours")),
                        mask=torch.zeros(PICTURES, 1, 1)) for s in sets]
    return mean([float(pairwise_similarity(a, b).mean()) for a, b in combinations(readings, 2)])


def mean(values: Sequence[float]) -> float:
    """Of the numbers among them; NaN where there are none."""
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else math.nan


def figures_of(sets: Sequence[SetResult]) -> dict[str, float]:
    """Flat names and numbers; what could not be measured is absent."""
    figures: dict[str, float] = {"count.sets": len(sets), "consistency.floor": floor_of(sets),
                                 "consistency.ceiling": mean([s.ceiling for s in sets])}
    for name in sets[0].rows:
        rows = [s.rows[name] for s in sets]
        for title, part in (("consistency", "consistency"), ("scene_accuracy", "scene"), ("class_accuracy", "kind"),
                            ("layout_spread", "spread")):
            figures[f"{title}.{name}"] = mean([getattr(row, part) for row in rows])
        if name in ("plain", "story"):
            figures[f"seconds.{name}"] = statistics.median(row.seconds for row in rows)
        if name == "story":
            figures["unet_calls.story"] = max(row.unet_calls for row in rows)
    return {name: value for name, value in figures.items() if not math.isnan(value)}


def table(sets: Sequence[SetResult]) -> list[str]:
    """The table's lines."""
    figures = figures_of(sets)
    plain, ceiling, floor = (figures.get(f"consistency.{name}", math.nan) for name in ("plain", "ceiling", "floor"))
    lines = [f"| variant | consistency | s.e. | of the way | scene right | class right | layout spread | UNet calls | seconds |   "
             f"floor {floor:.3f}, ceiling {ceiling:.3f}, {len(sets)} sets", "|---|---|---|---|---|---|---|---|---|"]
    for name in sets[0].rows:
        rows = [s.rows[name] for s in sets]
        found = [row.consistency for row in rows]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else math.nan
        spread = figures.get(f"layout_spread.{name}", math.nan) / (figures.get("layout_spread.plain") or math.nan)
        way = (mean(found) - plain) / ((ceiling - plain) or math.nan)
        lines.append(f"| {name} | {mean(found):.3f} | {error:.3f} | {way:.2f} | {figures[f'scene_accuracy.{name}']:.2f} | "
                     f"{figures[f'class_accuracy.{name}']:.2f} | {spread:.2f} | {max(row.unet_calls for row in rows)} | "
                     f"{statistics.median(row.seconds for row in rows):.1f} |")
    return lines


def draw_sheet(sets: Sequence[tuple[str, Sequence[str], Mapping[str, Any]]], cell: int = 128) -> Any:
    """A contact sheet: below the title of each set a row per variant and a column per scene."""
    from PIL import Image, ImageDraw, ImageFont
    head, side, gap = 22, 110, 4
    tall = [head + len(rows) * (cell + gap) + gap for _, _, rows in sets]
    page = Image.new("RGB", (side + PICTURES * (cell + gap), sum(tall)), "white")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(13), 0
    for (title, scenes, rows), height in zip(sets, tall):
        draw.text((gap, top + 3), title, "black", font)
        for i, scene in enumerate(scenes):
            draw.text((side + i * (cell + gap), top + 3), scene, "black", font)
        for j, (name, images) in enumerate(rows.items()):
            y = top + head + j * (cell + gap)
            draw.text((gap, y + cell // 2 - 8), name[:15], "black", font)
            for i, image in enumerate((images * 255).round().byte().cpu().numpy()):
                page.paste(Image.fromarray(image).resize((cell, cell)), (side + i * (cell + gap), y))
        top += height
    return page


def write_raw(path: Path, steps: int, cfg: float, variants: Sequence[StoryVariant], sets: Sequence[SetResult]) -> None:
    """What the sets gave, and under which settings."""
    from kindred.models.files import whole
    content = {"steps": steps, "cfg": cfg, "variants": [asdict(v) for v in variants], "sets": [asdict(s) for s in sets]}
    with whole(path) as partial:
        partial.write_text(json.dumps(content), "utf-8")


def read_raw(paths: Sequence[Path]) -> list[SetResult]:
    """The sets of several files in their order. SystemExit where they do not belong into one table."""
    sets: dict[int, SetResult] = {}
    settings: dict[str, Any] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text("utf-8"))
            found = [SetResult.parse(s) for s in content.pop("sets")]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise SystemExit(f"evaluate: {path} is no file of --raw: {problem}") from None
        settings = settings or content
        for name in settings:
            if content.get(name) != settings[name]:
                raise SystemExit(f"evaluate: {path} has {name} {content.get(name)}, but {paths[0]} has {settings[name]}. "
                                 "Run both with the same settings.")
        if twice := sorted(s.number for s in found if s.number in sets):
            raise SystemExit(f"evaluate: {path} holds sets {twice} once more. Give each run its own --first.")
        sets |= {s.number: s for s in found}
    if not sets:
        raise SystemExit("evaluate: --merge found no set.")
    return [sets[number] for number in sorted(sets)]


@contextmanager
def stoppable() -> Iterator[None]:
    """KeyboardInterrupt for Ctrl-C and for a request to end, once: dev.py follows a Ctrl-C with a SIGTERM of its own."""
    last = -math.inf

    def stop(*_: object) -> None:
        nonlocal last
        since, last = time.monotonic() - last, time.monotonic()
        if since > 2:
            raise KeyboardInterrupt
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if math.isinf(last):  # while a stopped run reports, the handler stays
            for number, handler in before.items():
                signal.signal(number, handler)


def story(given: argparse.Namespace) -> dict[str, float]:
    """ConsiStory on held-out sets: prints a table, returns the figures; given.stopped tells whether Ctrl-C ended it."""
    if given.merge:
        as_kindred()
        sets = read_raw(given.merge)
        print("\n".join(table(sets)))
        return figures_of(sets)
    variants = [StoryVariant("plain", None), *(StoryVariant.parse(text) for text in given.variant or ROWS)]
    if twice := {a.name for a, b in combinations(variants, 2) if a.name == b.name}:
        raise SystemExit(f"evaluate: two variants are called {', '.join(sorted(twice))}. Give each a name of its own.")
    began, sets = time.monotonic(), []
    try:
        with stoppable():
            measure(given, variants, sets, [])
    except KeyboardInterrupt:
        given.stopped = True
        if not sets:
            sys.stderr.write("\nevaluate: stopped before the first set was done\n")
            raise SystemExit(130) from None
    sys.stderr.write("\n")
    print("\n".join(table(sets)))
    return figures_of(sets) | {"seconds.total": time.monotonic() - began}
