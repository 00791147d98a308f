"""The rows of the matrix: what the host offers, each as one setting, drawn with the host's own nodes.

Nothing of the pack is imported here, so that a process that never saw the pack can draw every row too:
`python tests/host/matrix.py HOST FILE` writes their plain pictures and the random states they leave.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STEPS = 3  # of ddim_uniform: timesteps 667, 334 and 1; a story blends and injects at the first and matches at the second
FIRST = 2  # pictures 0 and 1 of the endless story are the anchors of "further picture"; every cell draws those from here on
Marks = Callable[
    [int], dict[str, Any]
]  # so many pictures -> what Subject Prompts leaves in their CONDITIONING


@dataclass(frozen=True)
class Setting:
    """One way of sampling."""

    cfg: float = 4.0
    batch: int = 2
    size: tuple[int, int] = (8, 8)  # y, x in latent cells
    tokens: tuple[int, int] = (77, 77)  # of the prompt, of the negative
    sampler: str = "euler"
    scheduler: str = "ddim_uniform"
    way: str = "KSampler"
    split: bool = False  # cond and uncond in calls of their own
    prompts: str = "one"
    begins: str = "noise"
    graph: str = "one sampler"  # what else is in the workflow; the columns of test_matrix.py know
    halves: str = ""  # of CFG, if the node is to be told
    steps: int = STEPS
    seed: int = 1

    @property
    def denoise(self) -> float:
        return 0.5 if self.begins == "picture" else 1.0

    @property
    def who(self) -> tuple[int, ...]:
        return tuple(range(FIRST, FIRST + self.batch))


BASE = "KSampler: euler, ddim_uniform, one call"
ROWS: dict[str, dict[str, Any]] = {
    BASE: {},
    "CFG 1": {"cfg": 1.0},
    "CFG 7": {"cfg": 7.0},
    "batch of 1": {"batch": 1},
    "batch of 3": {"batch": 3},
    "192x128 pixels": {"size": (16, 24)},
    "136x120 pixels": {"size": (15, 17)},
    "512x64 pixels": {"size": (8, 64)},
    "prompts over 77 tokens": {"tokens": (154, 154)},
    "prompts over 154 tokens": {"tokens": (231, 231)},
    "prompt longer than negative": {"tokens": (231, 77)},
    "negative longer than prompt": {"tokens": (77, 154)},
    "lengths that fit no common call": {"tokens": (77, 462)},
    **{
        f"sampler {name}": {"sampler": name}
        for name in (
            "euler_ancestral",
            "heun",
            "dpm_2",
            "dpmpp_sde",
            "dpmpp_2m",
            "uni_pc",
            "ddim",
            "lcm",
            "dpm_adaptive",
        )
    },
    **{
        f"scheduler {name}": {"scheduler": name, "steps": 4}
        for name in ("normal", "karras", "sgm_uniform")
    },
    "KSamplerAdvanced in two segments": {"way": "segments", "steps": 4},
    "SamplerCustomAdvanced": {"way": "custom"},
    "DualCFGGuider": {"way": "dual"},
    "PerpNegGuider": {"way": "perpneg"},
    "cond and uncond in two calls": {"split": True},
    "combined prompts": {"prompts": "combined"},
    "area prompt beside a whole one": {"prompts": "area"},
    "area prompts alone": {"prompts": "area alone"},
    "masked prompts": {"prompts": "masked"},
    "prompts with timestep ranges": {"prompts": "ranged"},
    "img2img, denoise 0.5": {"begins": "picture", "steps": 4},
    "inpaint mask": {"begins": "inpaint"},
    "hires second pass": {"begins": "hires"},
    "two samplers in one graph": {"graph": "two samplers"},
    "two branches of one chain": {"graph": "two branches"},
    "the same node twice": {"graph": "twice"},
    "two different references": {"graph": "two references"},
    "read in both halves of CFG": {"halves": "both"},
    "cond's features in both halves": {"halves": "shared"},
}


def setting(row: str) -> Setting:
    return Setting(**ROWS[row])


# the host's nodes ------------------------------------------------------------------------------------------------------------


def told(who: Sequence[int], tokens: int, seed: int, mark: Marks | None = None) -> list:
    """CONDITIONING with a row per picture; picture i has the same row in every batch."""
    from networks import random_prompt

    rows = [random_prompt("tiny", seed + i, tokens)[0][0] for i in who]
    return [[torch.cat(rows), mark(len(rows)) if mark else {}]]


def conditioning(s: Setting, who: Sequence[int], mark: Marks | None = None) -> tuple[list, list]:
    """Positive and negative, as the host's conditioning nodes make them."""
    from networks import random_prompt

    import nodes

    positive, other = told(who, s.tokens[0], 50, mark), random_prompt("tiny", 6, s.tokens[0])
    negative = random_prompt("tiny", 2, s.tokens[1])

    def area(c: list) -> list:
        return nodes.ConditioningSetAreaPercentage().append(c, 0.75, 0.625, 0.25, 0.125, 1.0)[0]

    if s.prompts == "combined":
        positive = nodes.ConditioningCombine().combine(positive, other)[0]
    elif s.prompts == "area":
        positive = nodes.ConditioningCombine().combine(positive, area(other))[0]
    elif s.prompts == "area alone":
        positive = area(positive)
    elif s.prompts == "masked":
        mask = torch.zeros(1, 64, 64)
        mask[:, :40, 24:] = 1
        (bounded,) = nodes.ConditioningSetMask().append(other, mask, "mask bounds", 1.0)
        (whole,) = nodes.ConditioningSetMask().append(
            random_prompt("tiny", 7, s.tokens[0]), mask, "default", 0.5
        )
        positive = positive + bounded + whole
    elif s.prompts == "ranged":
        (early,) = nodes.ConditioningSetTimestepRange().set_range(positive, 0.0, 0.5)
        (late,) = nodes.ConditioningSetTimestepRange().set_range(
            told(who, s.tokens[0], 70, mark), 0.5, 1.0
        )
        positive = nodes.ConditioningCombine().combine(early, late)[0]
    elif s.prompts == "late alone":
        (positive,) = nodes.ConditioningSetTimestepRange().set_range(positive, 0.5, 1.0)
    return positive, negative


def latent(s: Setting, who: Sequence[int]) -> dict[str, Any]:
    """LATENT; picture i gets the same noise in every batch."""
    import nodes

    samples = torch.zeros(len(who), 4, *s.size)
    if s.begins in ("picture", "inpaint"):
        samples = torch.stack(
            [torch.randn(4, *s.size, generator=torch.Generator().manual_seed(900 + i)) for i in who]
        )
    made = {"samples": samples, "batch_index": list(who)}
    if s.begins == "inpaint":
        mask = torch.zeros(1, 64, 64)
        mask[:, :, 32:] = 1
        made = nodes.SetLatentNoiseMask().set_mask(made, mask)[0]
    return made


@contextmanager
def split_calls() -> Iterator[None]:
    """The host finds no memory to run two conds in one call."""
    from comfy.model_patcher import ModelPatcher

    own = ModelPatcher.get_free_memory
    ModelPatcher.get_free_memory = lambda self, device: 0
    try:
        yield
    finally:
        ModelPatcher.get_free_memory = own


def ksampler(
    model: Any, s: Setting, positive: list, negative: list, given: dict[str, Any], denoise: float
) -> dict[str, Any]:
    import nodes

    return nodes.KSampler().sample(
        model, s.seed, s.steps, s.cfg, s.sampler, s.scheduler, positive, negative, given, denoise
    )[0]


def in_segments(
    model: Any, s: Setting, positive: list, negative: list, given: dict[str, Any], denoise: float
) -> dict[str, Any]:
    """Half of the steps, and the others in a sampler of their own."""
    import nodes

    advanced, half = nodes.KSamplerAdvanced(), s.steps // 2
    how = s.seed, s.steps, s.cfg, s.sampler, s.scheduler, positive, negative
    (given,) = advanced.sample(model, "enable", *how, given, 0, half, "enable", denoise)
    return advanced.sample(model, "disable", *how, given, half, 10000, "disable", denoise)[0]


def custom(
    model: Any, s: Setting, positive: list, negative: list, given: dict[str, Any], denoise: float
) -> dict[str, Any]:
    """SamplerCustomAdvanced under the setting's guider."""
    from comfy_extras import nodes_custom_sampler as c
    from comfy_extras.nodes_perpneg import PerpNegGuider
    from networks import random_prompt

    third = random_prompt("tiny", 8, s.tokens[1])
    guider = {
        "custom": lambda: c.CFGGuider.execute(model, positive, negative, s.cfg),
        "dual": lambda: c.DualCFGGuider.execute(
            model, positive, third, negative, s.cfg, 2.0, "regular"
        ),
        "perpneg": lambda: PerpNegGuider.execute(model, positive, third, negative, s.cfg, 1.0),
    }.get(s.way)
    guider = (guider or (lambda: c.CFGGuider.execute(model, positive, negative, s.cfg)))()[0]
    # at KSampler's own tolerance dpm_adaptive asks three times as often
    sampler = (
        c.SamplerDPMAdaptative.execute(2, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.81, 0.0, 1.0)
        if s.sampler == "dpm_adaptive"
        else c.KSamplerSelect.execute(s.sampler)
    )[0]
    (sigmas,) = c.BasicScheduler.execute(model, s.scheduler, s.steps, denoise).result
    return c.SamplerCustomAdvanced.execute(
        c.RandomNoise.execute(s.seed)[0], guider, sampler, sigmas, given
    )[0]


def first_pass(
    model: Any, s: Setting, who: Sequence[int], mark: Marks | None = None
) -> dict[str, Any]:
    sampled = {"KSampler": ksampler, "segments": in_segments}.get(
        "custom" if s.sampler == "dpm_adaptive" else s.way, custom
    )
    with torch.inference_mode(), split_calls() if s.split else nullcontext():
        return sampled(model, s, *conditioning(s, who, mark), latent(s, who), s.denoise)


def larger(given: dict[str, Any]) -> dict[str, Any]:
    """The pictures half as large again."""
    import nodes

    y, x = given["samples"].shape[2:]
    return nodes.LatentUpscale().upscale(given, "nearest-exact", 12 * x, 12 * y, "disabled")[0]


def second_pass(
    model: Any, s: Setting, given: dict[str, Any], who: Sequence[int], mark: Marks | None = None
) -> dict[str, Any]:
    """Half of the noise over the larger pictures."""
    with torch.inference_mode(), split_calls() if s.split else nullcontext():
        return ksampler(model, s, *conditioning(s, who, mark), larger(given), 0.5)


def draw(model: Any, s: Setting, mark: Marks | None = None) -> Tensor:
    """The setting's pictures [b c y x]."""
    out = first_pass(model, s, s.who, mark)
    return (second_pass(model, s, out, s.who, mark) if s.begins == "hires" else out)["samples"]


# random state ----------------------------------------------------------------------------------------------------------------


def seed_all() -> None:
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)


def states() -> str:
    """The global random states of torch, numpy and Python, as one word."""
    of_numpy = np.random.get_state()
    told = (
        torch.get_rng_state().numpy().tobytes(),
        of_numpy[1].tobytes(),
        repr((of_numpy[2:], random.getstate())).encode(),
    )
    return " ".join(hashlib.blake2b(part, digest_size=6).hexdigest() for part in told)


def seeded(model: Any, s: Setting, mark: Marks | None = None) -> tuple[Tensor, str]:
    """The setting's pictures from a known random state, and the state they leave."""
    seed_all()
    return draw(model, s, mark), states()


def main(host: str, file: str) -> None:
    """Every row's plain pictures, by a host without the pack."""
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tools" / "workshop"))
    from boot import boot

    torch.set_num_threads(1)
    boot(Path(host), pack=False)
    import comfy.utils
    from networks import random_model

    comfy.utils.set_progress_bar_enabled(False)
    model = random_model("tiny")
    torch.save(
        {row: seeded(model, setting(row)) for row in ROWS} | {"nothing": seeded(model, NOTHING)},
        file,
    )


NOTHING = replace(Setting(), batch=1, steps=1)  # the quickest plain picture


if __name__ == "__main__":
    main(*sys.argv[1:])
