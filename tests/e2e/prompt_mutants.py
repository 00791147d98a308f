"""Prompts as no canvas would send them: mutants of the shipped workflows and of every node alone, by the types the host tells."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

from workflows import api_form, names, on_the_miniature

HEAVY = {
    "steps",
    "batch",
    "accumulate",
    "save_every",
    "size",
    "width",
    "height",
    "batch_size",
    "cell",
    "end_at_step",
    "upscale_method",
}
FLOATS = (
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    -1,
    -1e-9,
    1e-320,
    2.0**63,
    "nan",
    "inf",
    "0.5",
    "x",
    "",
    None,
    True,
    [],
    {},
    [1.0],
)
INTS = (
    -1,
    -(2**63),
    2**63,
    2**64,
    10**40,
    1.5,
    math.nan,
    math.inf,
    "7",
    "x",
    "",
    None,
    True,
    [],
    {},
    {"__value__": [1, 2]},
)
TEXTS = (
    "",
    " ",
    "\n\n",
    "\0",
    "\ud800",
    "x" * 3000,
    "(" * 500,
    "cat",
    "((cat:1e9)",
    "(cat:nan)",
    "../../x",
    "%date:yyyy%",
    "output 99",
    "\u202ecat",
    5,
    None,
    True,
    [],
    {},
    {"__value__": ["a"]},
    ["a"],
    "all, " * 300,
    "input 1-99999999999999999999",
)
COMBOS = ("", "nonsense", None, 5, True, [], {}, {"__value__": []}, "../x", "\0", ["a", "b", "c"])
WIRES = (
    "x",
    5,
    0.5,
    True,
    None,
    {},
    [],
    {"__value__": [1, 2]},
    {"__value__": [[1, {}]]},
    {"samples": 1},
    "cat",
)
# what the host takes and costs no time: of the inputs that can be large, and of the others beside the ends of their range
TAKEN = {
    "steps": (1, 2),
    "batch": (1, 2),
    "accumulate": (1, 2),
    "save_every": (0, 1),
    "size": (64,),
    "width": (8, 16, 24, 56, 72),
    "height": (8, 16, 24, 40, 72),
    "batch_size": (1, 2, 3),
    "noise_levels": (1, 2),
    "cell": (64, 65),
    "end_at_step": (0, 1, 3, 10000),
}
TOO_SLOW = {"dpm_adaptive", "dpm_fast"}  # take as many steps as they like
DEAR = {"ablation", "story_ablation"}  # several samplers: of these only what comes behind
BEHIND = {"KindredComparisonGrid", "KindredConsistencyScore"}
TOO_DEAR = {
    "personalize_hires",
    "personalize_controlnet",
    "two_subjects",
}  # no other nodes of ours than the others have
VALID = 0.15  # of the mutants
LIGHT = {"self_attention_only", "concept_only", "story"}
WIRED = {
    "MODEL",
    "CLIP",
    "VAE",
    "CONDITIONING",
    "LATENT",
    "IMAGE",
    "MASK",
    "SIGMAS",
    "CLIP_VISION",
    "KINDRED_REFERENCE",
    "KINDRED_INVERSION",
    "KINDRED_CONCEPT_ENCODER",
}
Prompt = dict[str, Any]


def small(name: str) -> Prompt:
    """A shipped workflow at 64 pixels, 2 steps and two pictures, without what the canvas alone reads."""
    graph = {
        key: {"class_type": node["class_type"], "inputs": dict(node["inputs"])}
        for key, node in api_form(name).items()
    }
    for node in graph.values():
        inputs = node["inputs"]
        for key, value in inputs.items():
            if key in ("steps", "width", "height", "end_at_step") and isinstance(value, int):
                inputs[key] = {"steps": 2, "end_at_step": 2}.get(key, 64 if value < 200 else 96)
            if key in ("prompts", "prompt") and isinstance(value, str):
                inputs[key] = "\n".join(value.splitlines()[:2])
        if (
            node["class_type"] == "KindredLoadReference"
        ):  # shipped at 50 steps: the sampler asks for none of its levels
            inputs["file"] = "kindred_story.safetensors"
        if node["class_type"] == "KindredConceptEncoderTrain":
            inputs |= {"steps": 1, "size": 64, "save_name": "hostile", "resume": False}
    return graph


def behind(graph: Prompt, key: str) -> set[str]:
    """The node and everything that hangs on it."""
    after = {key}
    while more := {
        k
        for k, node in graph.items()
        if k not in after
        and any(isinstance(v, list) and v[:1] and v[0] in after for v in node["inputs"].values())
    }:
        after |= more
    return after


def others(graph: Prompt, key: str, info: dict[str, Any]) -> list[str]:
    """Outputs that nothing reads and that do not hang on the node."""
    after = behind(graph, key)
    read = {v[0] for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)}
    return [
        k
        for k, node in graph.items()
        if k not in after and k not in read and info[node["class_type"]]["output_node"]
    ]


class Mutator:
    """Mutants of prompts, by the types the host itself tells of each input."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.kindred = sorted(name for name in info if name.startswith("Kindred"))
        # the others name files that no server here has, and no node of ours more
        self.graphs = {name: small(name) for name in names() if on_the_miniature(name)}

    def kinds(self, class_type: str) -> dict[str, tuple[Any, dict]]:
        """Input -> type and options."""
        told = self.info[class_type]["input"]
        return {
            name: (spec[0], spec[1] if len(spec) > 1 else {})
            for part in ("required", "optional")
            for name, spec in told.get(part, {}).items()
        }

    def value(self, rng: random.Random, kind: Any, options: dict, name: str) -> Any:
        if isinstance(kind, list) or kind == "COMBO":
            return rng.choice(COMBOS)
        if kind == "FLOAT":
            return rng.choice((*FLOATS, options.get("min", 0), options.get("max", 1)))
        if kind == "INT":
            return rng.choice(
                (*INTS, options.get("min", 0)) + (() if name in HEAVY else (options.get("max", 1),))
            )
        if kind == "STRING":
            return rng.choice(TEXTS)
        if kind == "BOOLEAN":
            return rng.choice(("x", "", None, 5, [], {}, math.nan))
        return rng.choice(WIRES)

    def broken_link(self, rng: random.Random, graph: Prompt, key: str) -> Any:
        other = rng.choice(list(graph))
        return rng.choice(
            (
                [key, 0],
                ["999", 0],
                [other, 99],
                [other, -1],
                [other, rng.randrange(3)],
                [other],
                [other, 0, 0],
                [[other], 0],
                [other, "0"],
                [other, None],
                [None, 0],
                [other, 0.5],
                [int(other) if other.isdigit() else 1, 0],
                ["", 0],
            )
        )

    def of_workflow(self, rng: random.Random, name: str, may_run: bool) -> tuple[Prompt, str]:
        """Mostly an input of a node of ours, with only the outputs that hang on it; may_run: else something that cannot be taken."""
        graph: Prompt = json.loads(json.dumps(self.graphs[name]))
        own = [key for key, node in graph.items() if node["class_type"].startswith("Kindred")]
        words, first = [], rng.choice(own if rng.random() < 0.85 else list(graph))
        if (
            graph[first]["class_type"] != "KindredConceptEncoderTrain"
        ):  # an output before others: it would run
            first = next(
                (key for key in own if graph[key]["class_type"] == "KindredConceptEncoderTrain"),
                first,
            )
        for key in others(graph, first, self.info):
            del graph[key]
        for _ in range(rng.choice((1, 1, 2))):
            key = (
                first
                if not words
                else rng.choice([key for key in graph if key in self.graphs[name]])
            )
            if key not in graph:
                break
            node = graph[key]
            if (
                not isinstance(node, dict)
                or not isinstance(node.get("inputs"), dict)
                or not isinstance(node.get("class_type"), str)
            ):
                continue
            words.append(self.changed(rng, graph, key, may_run))
        return graph, f"{name}: {'; '.join(words)}"

    def changed(self, rng: random.Random, graph: Prompt, key: str, may_run: bool) -> str:
        """Change one input of a node, or the node itself: -> what was done."""
        node = graph[key]
        inputs = node["inputs"]
        kinds = self.kinds(node["class_type"]) if node["class_type"] in self.info else {}
        at = rng.choice(sorted(inputs) or ["x"])
        kind, options = kinds.get(at, ("*", {}))
        # the host takes anything there
        free = isinstance(kind, str) and kind in (*WIRED, "STRING", "BOOLEAN")
        which = rng.choice(
            (1, 3, 6, 7, 8, 9, 10, 11)
            if may_run
            else (0, 2, 2, 4, 5)
            if free
            else (0, 2, 2, 4, 5, 7, 7, 7)
        )
        if which < 6:
            self.broken(rng, graph, key, at, which)
        elif kind in ("MODEL", "IMAGE", "LATENT") and which == 6:
            inputs[at] = [key, 0]
        else:
            inputs[at] = self.another(rng, node, at, may_run)
        return f"{which} {node.get('class_type')!s:.30} {at} = {str(inputs.get(at, 'none'))[:50]!r}"

    def broken(self, rng: random.Random, graph: Prompt, key: str, at: str, which: int) -> None:
        """Take an input or a node away, add one, or make it what none can be."""
        node = graph[key]
        inputs = node["inputs"]
        if which == 0:
            inputs.pop(at, None)
        elif which == 1:
            names = ("extra", "", "__class__", "self", "cls", "kwargs", "image9999")
            extra = rng.choice((*names, "images.image7"))
            inputs[extra] = rng.choice((5, "x", None, [key, 0]))
        elif which == 2:
            inputs[at] = rng.choice(([key, 0], ["999", 0], [key, 99], [key], ["", 0]))
        elif which == 3:
            inputs[at] = self.broken_link(rng, graph, key)
        elif which == 4:
            node["class_type"] = rng.choice(
                (None, 5, "", "Nope", "KindredNope", rng.choice(self.kindred), [], "__class__")
            )
        else:
            # a node without inputs that nothing reads is taken, and ends the host's own worker (execution.py)
            graph.pop(key)

    def another(self, rng: random.Random, node: dict, at: str, may_run: bool) -> Any:
        """A value of another kind, or out of its bounds."""
        known = node["class_type"] in self.info
        kind, options = (self.kinds(node["class_type"]) if known else {}).get(at, ("*", {}))
        ours = node["class_type"].startswith("Kindred")
        if not (ours or isinstance(kind, list) or kind in ("COMBO", "STRING")):
            # the host's own nodes may take hours over large numbers
            return rng.choice(("x", None, [], -1))
        if may_run:
            return self.value(rng, kind, options, at)
        return rng.choice((None, [], {}, ["a"]) if kind in ("INT", "FLOAT") else COMBOS)

    def taken(self, rng: random.Random, kind: Any, options: dict, name: str, own: Any) -> Any:
        """Another value that the host takes; `own` where there is none."""
        choices = (
            kind
            if isinstance(kind, list)
            else options.get("options", [])
            if kind == "COMBO"
            else ()
        )
        if kind == "FLOAT":
            low, high = options.get("min", 0.0), options.get("max", 1.0)
            choices = (
                low,
                high,
                (low + high) / 2,
                math.nan,
                math.nextafter(low, high),
                math.nextafter(high, low),
                str(low),
                True,
            )
        elif kind == "INT":
            low, high = options.get("min", 0), options.get("max", 1)
            choices = TAKEN.get(name, (low, high, str(high), low + 0.5, True))
        elif kind == "STRING":
            choices = [text for text in TEXTS if not isinstance(text, (list, dict))]
        elif kind == "BOOLEAN":
            choices = (not own, "x", "", None, 5)
        if kind == "INT" and name in TAKEN:
            choices = [
                one for one in choices if options.get("min", 0) <= one <= options.get("max", one)
            ]
        ways = [
            one for one in choices if one != own and not (isinstance(one, str) and one in TOO_SLOW)
        ]
        return rng.choice(ways) if ways else own

    def wires(self, graph: Prompt, key: str, kind: str) -> list[list[Any]]:
        """Everything of that type in the graph that does not come from the node itself."""
        after = behind(graph, key)
        return [
            [k, i]
            for k, node in graph.items()
            if k not in after and node["class_type"] != "KindredConceptEncoderTrain"
            for i, one in enumerate(self.info[node["class_type"]]["output"])
            if one == kind
        ]

    def valid(self, rng: random.Random, name: str) -> tuple[Prompt, str]:
        """One to three inputs of one node, with values the host takes; only the outputs that hang on it stay."""
        graph: Prompt = json.loads(json.dumps(self.graphs[name]))
        own = [
            key
            for key, node in graph.items()
            if node["class_type"].startswith("Kindred")
            and (name not in DEAR or node["class_type"] in BEHIND)
        ]
        key = rng.choice(own if rng.random() < 0.8 or name in DEAR else list(graph))
        for other in others(graph, key, self.info):
            del graph[other]
        node, words = graph[key], []
        kinds = self.kinds(node["class_type"])
        optional = self.info[node["class_type"]]["input"].get("optional", {})
        inputs = sorted(set(node["inputs"]) & set(kinds))
        for at in rng.sample(inputs, min(rng.choice((1, 1, 2, 3)), len(inputs))):
            kind, options = kinds[at]
            wire = isinstance(node["inputs"][at], list)
            ways = (
                [one for one in self.wires(graph, key, kind) if one != node["inputs"][at]]
                if wire
                else []
            )
            if wire and at in optional and (not ways or rng.random() < 0.5):
                del node["inputs"][at]
            elif wire:
                node["inputs"][at] = rng.choice(ways or [node["inputs"][at]])
            elif not (at == "ckpt_name" or node["class_type"] == "LoadImage"):
                node["inputs"][at] = self.taken(rng, kind, options, at, node["inputs"][at])
            words.append(
                f"{node['class_type']} {at} = {str(node['inputs'].get(at, 'none'))[:50]!r}"
            )
        return graph, f"valid, {name}: {'; '.join(words)}"

    def of_node(self, rng: random.Random, class_type: str) -> tuple[Prompt, str]:
        """One node alone, its wires filled with what is no wire, in front of a node that shows anything."""
        inputs = {}
        for name, (kind, options) in self.kinds(class_type).items():
            plain = isinstance(kind, list) or kind in ("COMBO", "FLOAT", "INT", "STRING", "BOOLEAN")
            if plain and rng.random() < 0.9:
                choices = kind if isinstance(kind, list) else options.get("options", [])
                inputs[name] = options.get("default", choices[0] if choices else 1)
                if name in HEAVY:
                    inputs[name] = max(options.get("min", 1), 2)
            elif plain or rng.random() < 0.7:
                inputs[name] = self.value(rng, kind, options, name)
        if class_type == "KindredComparisonGrid":
            inputs |= {"images.image0": rng.choice(WIRES)}
        return (
            {
                "1": {"class_type": class_type, "inputs": inputs},
                "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}},
            },
            f"{class_type} {str(inputs)[:200]}",
        )

    def mutants(self, count: int) -> Iterator[tuple[Prompt, str]]:
        """First those the host refuses for the most part, then those it takes: in a row, so that its cache helps."""
        flows, light = list(self.graphs), [name for name in self.graphs if name not in TOO_DEAR]
        valid, whole = round(VALID * count), count
        count -= valid
        for number in range(whole):
            rng = random.Random(f"prompt {number}")
            if number >= count:
                yield self.valid(rng, light[(number - count) * len(light) // valid])
            elif number % 5 < 2:
                yield self.of_node(rng, self.kindred[number // 5 % len(self.kindred)])
            else:
                name = flows[
                    number * len(flows) // count
                ]  # one after the other: the host's cache helps
                yield self.of_workflow(rng, name, name in LIGHT and number % 10 == 2)
