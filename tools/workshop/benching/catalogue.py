"""The cases that are timed beside the plain sampler, what each should cost, and how they are chosen on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PLAIN = "plain"
Key = tuple[str, int]  # a case, or plain, and its pictures
UNETS = ("sd15", "sd21", "sdxl", "tiny")
FLOWS = ("flux", "sd35", "tiny_flux")  # transformers


@dataclass(frozen=True)
class Case:
    """One row of the table. calls: UNet calls of each timed part at 50 steps, by which few steps stand for fifty."""

    name: str
    group: str
    what: str
    calls: tuple[int, ...] = (50,)
    usual: tuple[int, ...] = (1, 4)  # pictures, where none are asked for
    least: int = 1  # pictures
    steps: int = 2  # the fewest it makes sense with
    flow_calls: tuple[int, ...] = ()  # the same on transformers, where they are others

    def calls_on(self, family: str) -> tuple[int, ...]:
        return self.flow_calls if family in FLOWS and self.flow_calls else self.calls


# calls of the stories: tests/host/test_story_cost.py counts them
CASES = {
    case.name: case
    for case in (
        Case(
            "pass_through",
            "hooks",
            "every attention replaced by a call of the host's own: what a hook of anybody costs",
        ),
        Case("extra", "hooks", "Kindred's hooks with nothing injected"),
        Case(
            "cached",
            "references",
            "Masked Self-Attn Inject, features from the bank, W = 1, cond only",
        ),
        Case("cached_both", "references", "the same in both halves of CFG"),
        Case("weighted", "references", "the same in the cond half with W = 2"),
        Case(
            "live",
            "references",
            "the Ref-UNet runs beside every step, since the bank holds other noise levels",
            (100,),
        ),
        Case(
            "live_half",
            "references",
            "the same, but the first half of the blocks alone reads",
            (100,),
        ),
        Case(
            "cold",
            "references",
            "inversion and capture in one pass, then the cached sampling",
            (51, 50),
            flow_calls=(52, 100),
        ),
        Case(
            "concept",
            "concepts",
            "Cross-Attn Detail Inject, 257 tokens in every layer and step, both halves with tokens of their own",
        ),
        Case("concept_cond", "concepts", "the same in the cond half"),
        Case("cached_concept", "concepts", "cached and concept_cond on one model"),
        Case(
            "shared",
            "stories",
            "ConsiStory's shared attention alone: 2 anchors, dropout 0.5, cond half, drawn masks",
            usual=(4,),
            least=2,
        ),
        Case(
            "shared_all",
            "stories",
            "the same at its dearest: all pictures read all, no dropout, both halves",
            usual=(4,),
            least=2,
        ),
        Case(
            "shared_words",
            "stories",
            "shared, the subject found by its word: what the maps cost; its share is what random weights say",
            usual=(4,),
            least=2,
        ),
        Case(
            "blended",
            "stories",
            "shared, with query blending in the first steps",
            (55,),
            (4,),
            2,
            4,
            flow_calls=(57,),
        ),
        Case(
            "story",
            "stories",
            "ConsiStory whole, both stages in one sampler run",
            (88,),
            (4,),
            2,
            4,
            flow_calls=(100,),
        ),
        Case(
            "story_official",
            "stories",
            "the same in the official order",
            (101,),
            (4,),
            2,
            4,
            flow_calls=(104,),
        ),
        Case(
            "more",
            "stories",
            "one more picture from kept anchors, without feature injection",
            (55,),
            (1,),
            1,
            4,
            flow_calls=(57,),
        ),
        Case(
            "more_story",
            "stories",
            "one more picture from kept anchors, whole",
            (88,),
            (1,),
            1,
            4,
            flow_calls=(100,),
        ),
    )
}
GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))
DEFAULT = (
    "pass_through_b1",
    "extra_b1",
    "cached_b1",
    "cached_b4",
    "live_b1",
    "live_b4",
    "cold_b1",
    "concept_b1",
    "shared_b4",
)

# at full size and fifty steps; the gates of the tests
TARGETS: dict[str, dict[tuple[str, Key], float]] = {
    "cpu": {
        ("sd", ("cached", 1)): 1.15,
        ("sd", ("cached", 4)): 1.12,
        ("sd", ("live", 1)): 1.65,
        ("sd", ("live", 4)): 1.25,
        ("sd", ("cold", 1)): 1.70,
        ("sdxl", ("cached", 1)): 1.10,
        ("flow", ("cached", 4)): 1.10,
        ("flow", ("live_half", 1)): 1.45,
        ("*", ("concept", 1)): 1.04,
        ("*", ("shared", 4)): 1.15,
        ("*", ("shared_all", 4)): 1.15,
        ("*", ("blended", 4)): 1.30,
        ("*", ("story", 4)): 1.95,
        ("*", ("story_official", 4)): 2.2,
    },
    "cuda": {
        ("sd", ("cached", 1)): 1.15,
        ("sd", ("cached", 4)): 1.08,
        ("sd", ("live", 1)): 1.60,
        ("sd", ("live", 4)): 1.20,
        ("sd", ("cold", 1)): 1.65,
        ("sdxl", ("cached", 1)): 1.08,
        ("*", ("concept", 1)): 1.04,
        ("*", ("shared", 4)): 1.12,
        ("*", ("shared_all", 4)): 1.12,
        ("*", ("blended", 4)): 1.25,
        ("*", ("story", 4)): 1.90,
        ("*", ("story_official", 4)): 2.15,
        ("*", ("more", 1)): 1.15,
        ("*", ("more_story", 1)): 1.90,
    },
}
MEMORY_TARGET = 1.2  # of the peak, times plain's
ONE_ROW = frozenset({"flux", "tiny_flux"})  # drawn at CFG 1
UNETS_ALONE = frozenset({"pass_through"})
FLOW_DEFAULT = tuple(name for name in DEFAULT if name != "pass_through_b1") + ("live_half_b1",)
BLEND, FIRST, INJECT = (
    0.12,
    0.1,
    0.22,
)  # shares of ConsiStory's fifty steps: blending, before injection, injecting
ENOUGH = 25  # steps in which the node's own windows hold the same shares


def windows(times: Sequence[float]) -> dict[str, float]:
    """Inputs of ConsiStory Shared Attention for so few steps that its own windows would miss them; times: their timesteps, falling.

    The windows hold the shares that they have of fifty steps, and one step at least.
    """
    n = len(times)
    if n >= ENOUGH:
        return {}

    def before(i: int) -> float:  # percent of the schedule between two steps
        return 1 - (times[i - 1] + times[i]) / 2 / 999

    blend, first, inject = (max(1, round(share * n)) for share in (BLEND, FIRST, INJECT))
    return {
        "blend_end_percent": before(blend),
        "injection_start_percent": before(first),
        "injection_end_percent": before(min(first + inject, n - 1)),
    }


def refuse_missing(family: str, keys: Sequence[Key]) -> None:
    """ValueError where a transformer lacks what a case needs."""
    lacking = [name_of(key) for key in keys if key[0] in UNETS_ALONE]
    if family in FLOWS and lacking:
        raise ValueError(
            f"--family {family} has no attn1 and attn2 that a hook of anybody could replace, so {' and '.join(lacking)} cannot be "
            "measured on it. Name the cases that you want, such as --case references --case concepts."
        )


def target(device: str, family: str, key: Key) -> float | None:
    """What a case should cost at most, times plain; None where nobody said."""
    kind = {"sd15": "sd", "sd21": "sd", "sdxl": "sdxl", "flux": "flow", "sd35": "flow"}.get(family)
    return (
        None if kind is None else TARGETS[device].get((kind, key), TARGETS[device].get(("*", key)))
    )


def name_of(key: Key) -> str:
    return f"{key[0]}_b{key[1]}"


def chosen(
    wanted: Sequence[str], pictures: Sequence[int], steps: int, usual: Sequence[str] = DEFAULT
) -> list[Key]:
    """What --case and --pictures name, in the catalogue's order; ValueError says what does not fit and what would.

    wanted: cases, cases with their pictures (cached_b4), groups, or "all"; none: the usual ones.
    """
    keys: set[Key] = set()
    for word in wanted or (
        usual if not pictures else sorted({name.rpartition("_b")[0] for name in usual})
    ):
        exact = re.fullmatch(r"(.+)_b(\d+)", word)
        name, why = (
            (exact[1], (int(exact[2]),)) if exact and exact[1] in CASES else (word, tuple(pictures))
        )
        cases = [c for c in CASES.values() if word == "all" or name in (c.name, c.group)]
        if not cases:
            raise ValueError(
                f"--case {word}: there is no such case. Take all, a group ({', '.join(GROUPS)}) or one of "
                f"{', '.join(CASES)}; cached_b4 is cached with four pictures."
            )
        by_name = bool(wanted) and name in CASES
        for case in cases:
            fitting = [n for n in why or case.usual if n >= case.least]
            if by_name and not fitting:
                raise ValueError(
                    f"--case {word} with {' and '.join(map(str, why))} pictures: it needs {case.least} or more. "
                    f"Add --pictures {max(case.least, *case.usual)}."
                )
            if fitting and by_name and steps < case.steps:
                raise ValueError(
                    f"--case {word} with --steps {steps}: it has {case.steps} or more. Give --steps {case.steps}, or 50 for "
                    "what users run."
                )
            keys |= {(case.name, n) for n in fitting if steps >= case.steps}
    if not keys:
        raise ValueError(
            f"--case {' '.join(wanted)} --pictures {' '.join(map(str, pictures))} --steps {steps} leave nothing to measure. "
            "Take 4 pictures and 4 steps."
        )
    order = list(CASES)
    return sorted(keys, key=lambda key: (key[1], order.index(key[0])))


def left_out(wanted: Sequence[str], steps: int) -> list[str]:
    """Cases of the wanted groups that so few steps cannot show."""
    return [
        c.name for c in CASES.values() if steps < c.steps and ("all" in wanted or c.group in wanted)
    ]
