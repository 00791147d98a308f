"""What the laws of stories on transformers share: tiny networks, their plain pictures and their stories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from kindred.models.reference.bank import ReferenceBank
from kindred.models.subject.words import SubjectTokens
from kindred.nodes.anchors import AnchorSampler
from kindred.nodes.consistory import ConsiStory
from tiny_networks import READ, latent, prompt, tiny
from torch import Tensor

WORD = 3  # the row of the CONDITIONING that the subject's word is
STEPS = 5
# two plain passes, features injected at two steps, and matched at the fourth
WINDOWS = {
    "blend_end_percent": 0.5,
    "injection_start_percent": 0.15,
    "injection_end_percent": 0.5,
}
SHARING = {"feature_injection": 0.0, "query_blend": 0.0}  # one stage, one pass a step
HALF = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], 2)  # the left is the subject
WHITE, BLACK = torch.ones(1, 32, 32), torch.zeros(1, 32, 32)


@torch.inference_mode()
def story(name: str, model: Any = None, **inputs: Any) -> Any:
    """ConsiStory Shared Attention of 2 anchors under one half mask, unless told otherwise -> MODEL."""
    given = {"anchors": 2, "halves": "both", "dropout": 0.0, "masks": HALF} | WINDOWS | inputs
    return ConsiStory.execute(tiny(name) if model is None else model, **given).result[0]


def prompts_of(name: str, who: Sequence[int], *places: int) -> list:
    """Subject Prompts' CONDITIONING: picture i has the same row in every batch; places: of each subject."""
    rows = [prompt(name, seed=50 + i)[0][0] for i in who]
    places = places or (WORD,)
    by_word = tuple(((place,),) * len(who) for place in places)
    union = (tuple(sorted({*places})),) * len(who)
    words = ("cat", "dog", "bird")[: len(places)]
    subject = SubjectTokens(words, union, by_word if len(places) > 1 else ())
    text = torch.cat(rows)
    lines = "\n".join(f"a cat in scene {i}" for i in who)
    more = {"kindred_subject": subject, "kindred_text": lines}
    return [[text, READ[name].extras(text) | more]]


@torch.inference_mode()
def pictures(model: Any, name: str, who: Sequence[int] = (0, 1, 2), **how: Any) -> Tensor:
    """The pictures `who` of an endless story, whose noise and prompt are the same in every batch."""
    import nodes

    start = {"samples": torch.zeros_like(latent(name, pictures=len(who))), "batch_index": list(who)}
    positive = how.pop("positive", None) or prompts_of(name, who)
    given = {"seed": 1, "steps": STEPS, "cfg": 3.0, "sampler": "euler", "scheduler": "simple"} | how
    order = [given.pop(key) for key in ("seed", "steps", "cfg", "sampler", "scheduler")]
    negative = prompt(name, seed=3)
    return nodes.common_ksampler(model, *order, positive, negative, start, **given)[0]["samples"]


@torch.inference_mode()
def anchors(
    name: str, model: Any, who: Sequence[int] = (0, 1), cfg: float = 3.0, **more: Any
) -> tuple[Tensor, ReferenceBank]:
    """ConsiStory Anchor Sampler -> [b c (1) y x], bank."""
    start = {"samples": torch.zeros_like(latent(name, pictures=len(who))), "batch_index": list(who)}
    negative = prompt(name, seed=3)
    schedule = (1, STEPS, cfg, "euler", "simple")
    positive = prompts_of(name, who)
    out, bank = AnchorSampler.execute(model, *schedule, positive, negative, start, **more).result
    return out["samples"], bank


@cache
def plain(name: str, who: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    return pictures(tiny(name), name, who)
