"""The columns of the matrix: the inject nodes of the pack on one tiny model, each under any setting of matrix.py.

What a column reads (a photo's reference, kept anchors) is made under the setting it will be read in, once, and shared.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import comfy.samplers
import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.nodes.host import SUBJECT
from kindred.models.subject.words import SubjectTokens
from kindred.nodes.anchors import AnchorSampler
from kindred.nodes.consistory import ConsiStory
from matrix import (
    FIRST,
    NOTHING,
    ROWS,
    Setting,
    conditioning,
    first_pass,
    larger,
    latent,
    seeded,
    split_calls,
)
from networks import random_model
from studio import (
    SIZE,
    WINDOWS,
    capture,
    coarse,
    concept,
    fingerprint,
    inject,
    negative,
    of_model,
    photo,
    subject,
)
from torch import Tensor

MODEL = random_model("tiny")
UNTOUCHED = of_model(MODEL)
PACK = sys.modules["kindred"].__name__  # the host's own name for it
ELSEWHERE = (
    13.1,
    5.3,
    1.17,
    0.31,
)  # noise levels that no schedule of the matrix holds: what is read of them is read live
CACHED, LIVE, CROSS, SHARED, STORY, FURTHER, ALL = COLUMNS = (
    "Masked Self-Attn Inject, cached",
    "Masked Self-Attn Inject, live",
    "Cross-Attn Detail Inject",
    "ConsiStory Shared Attention, sharing alone",
    "ConsiStory Shared Attention, both stages",
    "ConsiStory Shared Attention, further pictures",
    "all on one model",
)
STORIES = (SHARED, STORY, FURTHER)


def mark(pictures: int) -> dict[str, Any]:
    """What Subject Prompts leaves: the subject's word at the sixth token of every line."""
    each = ((5,),) * pictures
    return {
        "kindred_text": "\n".join(f"a cat in scene {i}" for i in range(pictures)),
        SUBJECT: SubjectTokens(("cat",), each, (each,)),
    }


# references --------------------------------------------------------------------------------------------------------------------


def sigmas_of(s: Setting, denoise: float) -> set[float]:
    sampler = comfy.samplers.KSampler(
        MODEL, s.steps, torch.device("cpu"), s.sampler, s.scheduler, denoise
    )
    return {x for x in sampler.sigmas.tolist() if x > 0}


def levels(s: Setting) -> tuple[float, ...]:
    """The noise levels of the setting's schedule, of both passes where there are two."""
    return tuple(
        sorted(
            sigmas_of(s, s.denoise) | (sigmas_of(s, 0.5) if s.begins == "hires" else set()),
            reverse=True,
        )
    )


@cache
def photo_bank(sigmas: tuple[float, ...], size: tuple[int, int], seed: int = 3) -> ReferenceBank:
    return capture(
        MODEL,
        photo(size, 1, seed),
        coarse(),
        sigmas=torch.tensor([*sigmas, 0.0]),
        negative=negative(),
    )[0]


@cache
def anchors(s: Setting) -> ReferenceBank:
    """Pictures 0 and 1 of the endless story as ConsiStory Anchor Sampler keeps them, sampled as the setting says."""
    who = tuple(range(FIRST))
    with torch.inference_mode(), split_calls() if s.split else nullcontext():
        return kept(story(query_blend=0.0, **said(s)), s, latent(s, who), s.denoise)


def kept(model: Any, s: Setting, given: dict[str, Any], denoise: float) -> ReferenceBank:
    prompts = conditioning(s, tuple(range(FIRST)), mark)
    return AnchorSampler.execute(
        model, s.seed, s.steps, s.cfg, s.sampler, s.scheduler, *prompts, given, denoise
    ).result[1]


def anchors_again(s: Setting) -> Any:
    """A MODEL that reads anchors made for the second pass of the setting: pictures 0 and 1 drawn over their own first pass."""
    who = tuple(range(FIRST))
    with torch.inference_mode():
        given = larger(
            first_pass(story(query_blend=0.0), replace(s, begins="noise", batch=FIRST), who, mark)
        )
        return story(reference=kept(story(query_blend=0.0), s, given, 0.5), query_blend=0.0)


def kept_under(s: Setting) -> Setting:
    """What of a setting anchors are sampled under: they need whole pictures and KSampler."""
    sampler = "euler" if s.sampler == "dpm_adaptive" else s.sampler
    prompts = "one" if s.prompts == "area alone" else s.prompts
    return replace(
        s,
        batch=FIRST,
        way="KSampler",
        graph="one sampler",
        sampler=sampler,
        prompts=prompts,
        begins="noise" if s.begins == "hires" else s.begins,
    )


# columns -----------------------------------------------------------------------------------------------------------------------


def said(s: Setting) -> dict[str, str]:
    return {"halves": s.halves} if s.halves else {}


@torch.inference_mode()
def story(model: Any = MODEL, **inputs: Any) -> Any:
    """ConsiStory Shared Attention of 2 anchors, its windows wide enough for a few steps."""
    return ConsiStory.execute(model, **{"anchors": 2} | WINDOWS | inputs).result[0]


def with_photo(model: Any, s: Setting, seed: int = 3, weight: float = 2.0) -> Any:
    return inject(model, photo_bank(levels(s), s.size, seed), weight, **said(s))


def with_photo_live(model: Any, s: Setting, seed: int = 3, weight: float = 2.0) -> Any:
    return inject(model, photo_bank(ELSEWHERE, SIZE, seed), weight, **said(s))


def with_concept(model: Any, s: Setting, seed: int = 7, weight: float = 2.0) -> Any:
    return concept(model, weight, subject(seed=seed), halves=s.halves or "both")


def with_sharing(model: Any, s: Setting) -> Any:
    return story(model, feature_injection=0.0, **said(s))


def with_story(model: Any, s: Setting) -> Any:
    return story(model, **said(s))


def with_anchors(model: Any, s: Setting) -> Any:
    return story(model, reference=anchors(kept_under(s)), query_blend=0.0, **said(s))


def with_all(model: Any, s: Setting) -> Any:
    its = said(s) if s.halves == "both" else {}
    return with_concept(with_photo(story(model, query_blend=0.0, **its), s), s)


NODES: dict[str, Callable[[Any, Setting], Any]] = dict(
    zip(
        COLUMNS,
        (
            with_photo,
            with_photo_live,
            with_concept,
            with_sharing,
            with_story,
            with_anchors,
            with_all,
        ),
    )
)


# what is left ------------------------------------------------------------------------------------------------------------------


def ours() -> list[str]:
    """The objects of the pack's classes that came to life since the last `gc.freeze()`."""
    gc.collect()
    return sorted(
        type(o).__name__
        for o in gc.get_objects()
        if str(getattr(type(o), "__module__", "")).startswith(PACK)
    )


def of_options(model: Any) -> Any:
    """What a clone has of its own."""
    return fingerprint(
        [
            model.model_options,
            model.wrappers,
            model.callbacks,
            model.patches,
            model.object_patches,
            model.attachments,
        ]
    )


@contextmanager
def leaving_nothing(plain: Mapping[str, tuple[Tensor, str]]) -> Iterator[None]:
    """Afterwards: no object of the pack that was not there before, the MODEL as it was, and the quickest of the plain pictures
    as it was before."""
    gc.collect()
    gc.freeze()
    yield
    assert not ours()
    assert of_model(MODEL) == UNTOUCHED
    again, state = seeded(MODEL, NOTHING)
    assert torch.equal(again, plain["nothing"][0]) and state == plain["nothing"][1]


# what is expected --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What docs/compatibility.md says of a cell. plain: the very plain pictures; refused: the sentence has these words."""

    text: str = "yes"
    plain: bool = False
    refused: tuple[str, ...] = ()
    absent: bool = False  # the node has no such setting


ONE_STORY = Entry(
    "refused: use one node, and more words",
    refused=(
        "the model already comes from ConsiStory Shared Attention. Use one",
        "separated by commas",
    ),
)
ASKS = (
    "this sampler asks for noise level",
    "which the anchors do not have: they were made with",
    "Take the sampler, scheduler and steps of the",
)
BETWEEN = tuple(
    f"sampler {name}" for name in ("dpm_2", "dpmpp_sde", "dpm_adaptive")
)  # they ask between the schedule's noise levels
ENTRIES: dict[tuple[str, str], Entry] = {
    **{(row, CACHED): Entry("yes; live between two steps") for row in BETWEEN},
    **{
        ("batch of 1", c): Entry("plain: nobody to share with", plain=True) for c in (SHARED, STORY)
    },
    **{
        ("area prompts alone", c): Entry("plain: no whole picture to share", plain=True)
        for c in STORIES
    },
    **{
        ("KSamplerAdvanced in two segments", c): Entry("yes; each segment is a story of its own")
        for c in (*STORIES, ALL)
    },
    **{("the same node twice", c): ONE_STORY for c in STORIES},
    **{("two different references", c): ONE_STORY for c in STORIES},
    **{
        ("cond's features in both halves", c): Entry("no such setting", absent=True)
        for c in STORIES
    },
    ("sampler dpm_adaptive", FURTHER): Entry(
        "refused: it asks at noise levels of its own", refused=ASKS
    ),
    ("hires second pass", FURTHER): Entry(
        "refused: the second pass needs anchors of its own", refused=ASKS
    ),
}
CELLS = tuple((row, column) for row in ROWS for column in COLUMNS)


def entry(row: str, column: str) -> Entry:
    return ENTRIES.get((row, column), Entry())


def table() -> str:
    """The matrix for docs/compatibility.md."""
    lines = [
        ["", *COLUMNS],
        ["---"] * (len(COLUMNS) + 1),
        *([row, *(entry(row, c).text for c in COLUMNS)] for row in ROWS),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
