"""What the cells of bit_guard.py are drawn with: host, tiny networks, the settings of its samplers.

The pack is reached only through what saved workflows hold (node ids, input names and values), so
that its files and classes may move; for the same reason nothing is imported from the other tests
or from tools.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIZE = (8, 8)  # y, x in latent cells
FIRST = 2  # pictures 0 and 1 of the endless story are the anchors of further pictures
TILE = 1_000_003  # a prime, so that no layer's rows repeat


# the host and its tiny networks ------------------------------------------------------------------


def boot(host: Path, tree: Path) -> None:
    """Start ComfyUI here, on the CPU, with a base folder of its own and the pack in `tree`."""
    base = Path(tempfile.mkdtemp(prefix="host-", dir=Path.cwd()))
    sys.path[0] = str(host)
    options = ["--cpu", "--use-pytorch-cross-attention", "--base-directory", str(base)]
    sys.argv = ["main.py", *options]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv now
    import comfy.utils

    import nodes

    for name in ("input", "output", "temp", "user"):
        (base / name).mkdir(exist_ok=True)
    if not asyncio.run(nodes.load_custom_node(str(tree), module_parent="custom_nodes")):
        raise RuntimeError(f"ComfyUI could not load the pack in {tree}; its log above says why")
    comfy.utils.set_progress_bar_enabled(False)


def kindred(node: str, *values: Any, **inputs: Any) -> Any:
    """What a node of the pack gives, by its id: its only output, the tuple of several, or None."""
    import nodes

    result = nodes.NODE_CLASS_MAPPINGS[f"Kindred{node}"].execute(*values, **inputs).result
    return result[0] if result and len(result) == 1 else result


def configurations() -> dict[str, dict[str, Any]]:
    """The host's UNet configurations at 32 channels."""
    narrow = {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": [1, 1],
        "context_dim": 64,
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "dtype": torch.float32,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
    }
    one = {
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
    }
    two = {
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
    }
    flat = {"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1]}
    coarse = {"transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1]}
    sd = (
        narrow | one | {"adm_in_channels": None, "num_heads": 4, "use_linear_in_transformer": False}
    )
    xl = {"num_classes": "sequential", "adm_in_channels": 2816, "num_head_channels": 16}
    xl = narrow | two | xl | {"num_heads": -1, "use_linear_in_transformer": True}
    return {
        "sd15": sd,
        "sd20": sd | {"use_linear_in_transformer": True},
        "sdxl": xl,
        "koala": xl | {"transformer_depth_middle": -2},
        "vega": xl | {"transformer_depth_middle": -1},
        "coarse": sd | coarse | {"transformer_depth_middle": -2},
        "flat": sd | flat | {"transformer_depth_output": [1, 1]},
    }


def fill(unet: torch.nn.Module, gain: float = 0.8) -> None:
    """Give a UNet on the meta device weights: normal, gain / sqrt(fan-in); norms 1, biases 0."""
    tile, starts = torch.randn(TILE, generator=torch.Generator().manual_seed(0)), count()
    for name, old in list(unet.named_parameters()):
        if old.ndim > 1:
            start = 7919 * next(starts) % (TILE // 2)
            value = tile[start : start + old.numel()].view(old.shape) * (
                gain / old[0].numel() ** 0.5
            )
        else:
            value = torch.full(old.shape, float(name.endswith("weight")))
        path, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(path), leaf, torch.nn.Parameter(value, requires_grad=False))


def build(family: str) -> Any:
    """A fresh MODEL of a family in float32."""
    import comfy.model_base as base
    import comfy.ops
    import comfy.supported_models as known
    from comfy.model_patcher import ModelPatcher

    kinds = {
        "sd20": known.SD20,
        "sdxl": known.SDXL,
        "koala": known.KOALA_700M,
        "vega": known.Segmind_Vega,
    }
    kind = kinds.get(family, known.SD15)
    if family in ("sd20", "koala", "vega"):  # whose heads are made for wider layers
        heads = {"num_heads": 4, "num_head_channels": -1}
        kind = type(kind.__name__, (kind,), {"unet_extra_config": heads})
    config = kind(configurations()[family])
    config.custom_operations = comfy.ops.manual_cast
    how = {"model_type": base.ModelType.V_PREDICTION} if family == "sd20" else {}
    model_of = base.SDXL if family in ("sdxl", "koala", "vega") else base.BaseModel
    model = model_of(config, device=torch.device("meta"), **how)
    fill(model.diffusion_model)
    model.device = torch.device("cpu")
    made = ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))
    made.cached_patcher_init = (
        lambda disable_dynamic=False: build(family),
        (),
    )  # a loader's: read again to be trained
    return made


@cache
def model_of(family: str = "sd15") -> Any:
    return build(family)


@cache
def model_in(weights: torch.dtype, computed: torch.dtype) -> Any:
    """A MODEL as a file of such weights is loaded: kept as they are, cast where they are used."""
    made = build("sd15")
    made.model.diffusion_model.to(weights)
    made.model.diffusion_model.dtype, made.model.manual_cast_dtype = weights, computed
    return made


@cache
def clip() -> Any:
    """A CLIP as Load Checkpoint gives it: the host's tokenizer, one random layer, 64 wide."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base

    small = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
        "projection_dim": 64,
        "layer_norm_eps": 1e-5,
    }

    class Text(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = {}) -> None:
            options = {"device": device, "dtype": dtype, "model_options": model_options}
            super().__init__(textmodel_json_config=small, return_projected_pooled=False, **options)

    class Clip(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = {}) -> None:
            super().__init__(
                device=device, dtype=dtype, model_options=model_options, clip_model=Text
            )

    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, Clip)
    made = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    generator = torch.Generator().manual_seed(0)
    for name, p in made.cond_stage_model.named_parameters():
        one = torch.full(p.shape, float(name.endswith("weight")))
        p.data = torch.randn(p.shape, generator=generator) * 0.3 if p.ndim > 1 else one
    return made


# prompts, latents, pictures ----------------------------------------------------------------------

PLACES = ("on a beach", "in the snow", "beside a lamp", "under a tree", "at night", "in a red car")


def longer(text: str, chunks: int) -> str:
    """The text in so many chunks of 77 tokens."""
    return text + " and" * (75 * (chunks - 1))


def pooled(prompt: list, family: str) -> list:
    """The CONDITIONING with pooled text of SDXL's width, where the family reads one."""
    if not configurations()[family]["adm_in_channels"]:
        return prompt
    rows = [noise(i, (1280,)) for i in range(len(prompt[0][0]))]
    return [[prompt[0][0], prompt[0][1] | {"pooled_output": torch.stack(rows)}]]


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def encoded(text: str, family: str = "sd15", chunks: int = 1) -> list:
    """CLIP Text Encode."""
    import nodes

    return pooled(nodes.CLIPTextEncode().encode(clip(), longer(text, chunks))[0], family)


def scenes(
    who: Sequence[int],
    family: str = "sd15",
    chunks: int = 1,
    *,
    subject: str = "cat",
    words: str = "a cat",
) -> list:
    """Subject Prompts: a line for each of these pictures of an endless story."""
    lines = [longer(f"a photo of {words} {PLACES[i % len(PLACES)]}", chunks) for i in who]
    return pooled(kindred("SubjectPrompts", clip(), "\n".join(lines), subject)[0], family)


def coarse(family: str = "sd15", pictures: int = 1) -> list:
    """The coarse description of a photo, with its subject."""
    return pooled(kindred("SubjectPrompts", clip(), "a photo of a cat", "cat")[0], family)


def negative(family: str = "sd15", chunks: int = 1) -> list:
    return encoded("blurry, dark", family, chunks)


def photo(size: tuple[int, int] = SIZE, pictures: int = 1, seed: int = 3) -> dict[str, Any]:
    """A LATENT as VAE Encode would give it."""
    return {"samples": noise(seed, (pictures, 4, *size))}


def square(part: float = 0.5, side: int = 64) -> Tensor:
    """A MASK whose upper left is white."""
    mask = torch.zeros(1, side, side)
    mask[:, : int(side * part), : int(side * 0.75)] = 1
    return mask


def image(pictures: int = 1, seed: int = 7, size: tuple[int, int] = (48, 40)) -> Tensor:
    """An IMAGE as Load Image gives it."""
    return torch.rand(pictures, *size, 3, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Setting:
    """One way of sampling, as in matrix.py."""

    cfg: float = 4.0
    batch: int = 2
    size: tuple[int, int] = SIZE
    chunks: tuple[int, int] = (1, 1)  # of 77 tokens: of the prompt, of the negative
    sampler: str = "euler"
    scheduler: str = "ddim_uniform"
    way: str = "KSampler"
    split: bool = False  # cond and uncond in calls of their own
    prompts: str = "one"
    begins: str = "noise"
    graph: str = ""
    halves: str = ""
    steps: int = 3
    seed: int = 1
    family: str = "sd15"

    @property
    def denoise(self) -> float:
        return 0.5 if self.begins == "picture" else 1.0

    @property
    def who(self) -> tuple[int, ...]:
        return tuple(range(FIRST, FIRST + self.batch))


SAMPLERS = "euler_ancestral heun dpm_2 dpmpp_sde dpmpp_2m uni_pc ddim lcm dpm_adaptive".split()
ROWS: dict[str, dict[str, Any]] = {
    "KSampler": {},
    "CFG 1": {"cfg": 1.0},
    "CFG 7": {"cfg": 7.0},
    "batch of 1": {"batch": 1},
    "batch of 3": {"batch": 3},
    "192x128 pixels": {"size": (16, 24)},
    "136x120 pixels": {"size": (15, 17)},
    "256x64 pixels": {"size": (8, 32)},
    "prompts over 77 tokens": {"chunks": (2, 2)},
    "prompts over 154 tokens": {"chunks": (3, 3)},
    "prompt longer than negative": {"chunks": (3, 1)},
    "negative longer than prompt": {"chunks": (1, 2)},
    "lengths that fit no common call": {"chunks": (1, 6)},
    **{f"sampler {name}": {"sampler": name} for name in SAMPLERS},
    **{f"scheduler {n}": {"scheduler": n, "steps": 4} for n in ("normal", "karras", "sgm_uniform")},
    "two segments": {"way": "segments", "steps": 4},
    "SamplerCustomAdvanced": {"way": "custom"},
    "DualCFGGuider": {"way": "dual"},
    "PerpNegGuider": {"way": "perpneg"},
    "cond and uncond in two calls": {"split": True},
    "combined prompts": {"prompts": "combined"},
    "area prompt beside a whole one": {"prompts": "area"},
    "area prompts alone": {"prompts": "area alone"},
    "masked prompts": {"prompts": "masked"},
    "prompts with timestep ranges": {"prompts": "ranged"},
    "img2img": {"begins": "picture", "steps": 4},
    "inpaint mask": {"begins": "inpaint"},
    "hires second pass": {"begins": "hires"},
    "the same node twice": {"graph": "twice"},
    "two different references": {"graph": "two"},
    "read in both halves of CFG": {"halves": "both"},
    "cond's features in both halves": {"halves": "shared"},
}


def conditioning(s: Setting, who: Sequence[int]) -> tuple[list, list]:
    """Positive and negative, as the host's conditioning nodes make them."""
    import nodes

    positive, other = scenes(who, s.family, s.chunks[0]), encoded("a house", s.family, s.chunks[0])

    def area(c: list) -> list:
        return nodes.ConditioningSetAreaPercentage().append(c, 0.75, 0.625, 0.25, 0.125, 1.0)[0]

    if s.prompts == "combined":
        positive = nodes.ConditioningCombine().combine(positive, other)[0]
    elif s.prompts == "area":
        positive = nodes.ConditioningCombine().combine(positive, area(other))[0]
    elif s.prompts == "area alone":
        positive = area(positive)
    elif s.prompts == "masked":
        (bounded,) = nodes.ConditioningSetMask().append(other, square(0.6), "mask bounds", 1.0)
        third = encoded("a hill", s.family)
        positive = (
            positive
            + bounded
            + nodes.ConditioningSetMask().append(third, square(), "default", 0.5)[0]
        )
    elif s.prompts == "ranged":
        at = nodes.ConditioningSetTimestepRange().set_range
        (early,), (late,) = at(positive, 0.0, 0.5), at(scenes([i + 2 for i in who]), 0.5, 1.0)
        positive = nodes.ConditioningCombine().combine(early, late)[0]
    return positive, negative(s.family, s.chunks[1])


def latent(s: Setting, who: Sequence[int]) -> dict[str, Any]:
    """LATENT; picture i gets the same noise in every batch."""
    import nodes

    samples = torch.zeros(len(who), 4, *s.size)
    if s.begins in ("picture", "inpaint"):
        samples = torch.stack([noise(900 + i, (4, *s.size)) for i in who])
    made = {"samples": samples, "batch_index": list(who)}
    if s.begins == "inpaint":
        made = nodes.SetLatentNoiseMask().set_mask(made, square())[0]
    return made


@contextmanager
def split_calls(split: bool) -> Iterator[None]:
    """The host finds no memory to run two conds in one call."""
    from comfy.model_patcher import ModelPatcher

    own = ModelPatcher.get_free_memory
    if split:
        ModelPatcher.get_free_memory = lambda self, device: 0
    try:
        yield
    finally:
        ModelPatcher.get_free_memory = own


def custom(
    model: Any, s: Setting, positive: list, uncond: list, begin: dict[str, Any]
) -> dict[str, Any]:
    """SamplerCustomAdvanced under the setting's guider."""
    from comfy_extras import nodes_custom_sampler as c
    from comfy_extras.nodes_perpneg import PerpNegGuider

    third = encoded("a drawing", s.family, s.chunks[1])
    if s.way == "dual":
        guider = c.DualCFGGuider.execute(model, positive, third, uncond, s.cfg, 2.0, "regular")
    elif s.way == "perpneg":
        guider = PerpNegGuider.execute(model, positive, third, uncond, s.cfg, 1.0)
    else:
        guider = c.CFGGuider.execute(model, positive, uncond, s.cfg)
    # at KSampler's own tolerance dpm_adaptive asks three times as often
    adaptive = (2, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.81, 0.0, 1.0)
    sampler = (
        c.SamplerDPMAdaptative.execute(*adaptive)
        if s.sampler == "dpm_adaptive"
        else c.KSamplerSelect.execute(s.sampler)
    )
    sigmas = c.BasicScheduler.execute(model, s.scheduler, s.steps, s.denoise)
    return c.SamplerCustomAdvanced.execute(
        c.RandomNoise.execute(s.seed)[0], guider[0], sampler[0], sigmas[0], begin
    )[0]


def one_pass(model: Any, s: Setting, begin: dict[str, Any], denoise: float) -> dict[str, Any]:
    """The pictures s.who of the endless story by the setting's sampler."""
    import nodes

    positive, uncond = conditioning(s, s.who)
    how = (s.seed, s.steps, s.cfg, s.sampler, s.scheduler, positive, uncond)
    with split_calls(s.split):
        if s.way == "segments":
            half, advanced = s.steps // 2, nodes.KSamplerAdvanced()
            (begin,) = advanced.sample(model, "enable", *how, begin, 0, half, "enable", denoise)
            return advanced.sample(model, "disable", *how, begin, half, 10000, "disable", denoise)[
                0
            ]
        if s.way != "KSampler" or s.sampler == "dpm_adaptive":
            return custom(model, s, positive, uncond, begin)
        return nodes.KSampler().sample(model, *how, begin, denoise)[0]


def draw(model: Any, s: Setting) -> Tensor:
    """The setting's pictures [b c y x]."""
    import nodes

    out = one_pass(model, s, latent(s, s.who), s.denoise)
    if s.begins == "hires":
        y, x = s.size
        large = nodes.LatentUpscale().upscale(out, "nearest-exact", 12 * x, 12 * y, "disabled")[0]
        out = one_pass(model, s, large, 0.5)
    return out["samples"]
