"""Ref-UNet Feature Capture: the subject read out of a photo (paper A, arXiv 2403.11284, section
2.2).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.network.blocks import BlockId, Grid
from ..models.network.call import Half, grid_of
from ..models.network.sites import BlockSite, family_of, map_blocks
from ..models.noise.inversion import Denoiser, InversionTrajectory, Progress
from ..models.overlay import draw_masks
from ..models.reference.bank import ReferenceBank, ReferencePrompt
from ..models.reference.builder import BankBuilder, Keeps
from ..models.reference.photo import (
    NODE,
    RefUNetPass,
    doubts_of,
    flow_loop,
    is_live,
    one_pass_loop,
    projecting,
    replay_loop,
    user_masks,
)
from ..models.reference.recorder import Recorder
from ..models.subject.masks import Threshold
from . import host, inputs

OTSU, VALUE = "otsu", "value"
log = logging.getLogger(__name__)


class RefUNetCapture(io.ComfyNode):
    """Ref-UNet pass of paper A: features of every step, and the subject's mask from its words'
    cross-attention, eq. (4), (5).
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredRefUNetCapture",
            display_name=NODE,
            category="Kindred",
            description="Reads the subject out of a photo: the self-attention features of every "
            "step and a mask of where the subject is. "
            "Give it the encoded photo (it inverts and reads in one pass) or the result of DDIM "
            "Invert.",
            search_aliases=[
                "reference capture",
                "ref unet",
                "reference only",
                "subject mask",
                "attention features",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that will generate, with its LoRAs."),
                io.Conditioning.Input(
                    "positive",
                    tooltip="A coarse description with the subject's word, such as: a photo of a "
                    "cat "
                    "(Subject Prompts).",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=1000,
                    tooltip="With a latent: match your sampler's steps. A mismatch works "
                    "but is slower. Unused with an inversion.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.schedulers(),
                    default="ddim_uniform",
                    tooltip="With a latent: match your sampler's scheduler; simple for "
                    "Flux, SD3.5, Qwen-Image and most transformers. Unused with an "
                    "inversion.",
                ),
                inputs.blocks(
                    "Which self-attention blocks to keep: all, encoder, middle, decoder, "
                    "masactrl, measured (by Block Probe), or a list such as "
                    "output 3-5, middle 0. In transformers encoder and decoder are the first and "
                    "the second half, "
                    "and double, single or a list such as double 3-5, single 0 name their own. "
                    "Fewer blocks take less memory.",
                ),
                io.Combo.Input(
                    "mask_threshold",
                    options=[OTSU, VALUE],
                    default=OTSU,
                    advanced=True,
                    tooltip="otsu: chosen automatically from the map. value: mask_value, below.",
                ),
                io.Float.Input(
                    "mask_value",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Threshold on the map scaled to 0..1, used when the threshold is set "
                    "to value.",
                ),
                io.Int.Input(
                    "mask_steps",
                    default=2,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="How many of the first (noisiest) steps find the mask. 2 as in "
                    "the paper; more finds more of the subject.",
                ),
                io.String.Input(
                    "mask_blocks",
                    default="auto",
                    advanced=True,
                    tooltip="Blocks whose attention to the words locates the subject. auto: "
                    "those at a quarter of the latent's size; in transformers the second half of "
                    "the double blocks, or the middle third of all.",
                ),
                inputs.precision(
                    "How the features are stored in memory. float16 halves the "
                    "memory if the model computes in float32.",
                ),
                io.Combo.Input(
                    "keeps",
                    options=[k.value for k in Keeps],
                    default=Keeps.AUTO.value,
                    optional=True,
                    advanced=True,
                    tooltip="What is kept in memory. keys and values: every later step is a "
                    "little faster. hidden states: half the memory. automatic: "
                    "keys and values up to 1 GB.",
                ),
                io.Float.Input(
                    "token_share",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the subject's tokens that is kept, evenly spread. "
                    "Less takes less memory and time; the kept ones are weighted up "
                    "to compensate.",
                ),
                host.Inversion.Input(
                    "inversion",
                    optional=True,
                    tooltip="From DDIM Invert; reading it takes one model call per step.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The photo through VAE Encode, instead of an inversion: it is "
                    "inverted and read in one pass.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Only for halves = both: also reads the photo with your "
                    "negative prompt.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White = the subject. Replaces finding it by its word.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="With a latent: the SIGMAS that your sampler gets; they replace "
                    "steps and scheduler.",
                ),
            ],
            outputs=[
                host.Reference.Output(
                    display_name="reference",
                    tooltip="What was read of the subject, for Masked Self-Attn Inject or "
                    "ConsiStory Shared Attention.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Where the subject was found."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: host.Conditioning,
        steps: int,
        scheduler: str,
        blocks: str = "all",
        mask_threshold: str = OTSU,
        mask_value: float = 0.3,
        mask_steps: int = 2,
        mask_blocks: str = "auto",
        precision: str = "as computed",
        keeps: str = Keeps.AUTO.value,
        token_share: float = 1.0,
        inversion: InversionTrajectory | None = None,
        latent: dict[str, Any] | None = None,
        negative: host.Conditioning | None = None,
        mask: Tensor | None = None,
        sigmas: Tensor | None = None,
    ) -> io.NodeOutput:
        sites = host.require_sites(model, NODE)
        wanted = host.chosen_blocks(model, blocks, sites, NODE)
        require_share(token_share)
        photo = photo_of(model, inversion, latent, steps, scheduler, sigmas)
        prompts = read_prompts(
            model, positive, negative, photo.pictures, mask is not None, family_of(sites)
        )
        threshold = OTSU if mask_threshold == OTSU else mask_value
        subject = Finding(mask, mask_blocks, threshold, mask_steps)
        say_doubts(mask, photo.whole)
        kept = inputs.stored_in(precision), token_share, Keeps(keeps)
        reading = pass_over(sites, wanted, photo, prompts, subject, *kept)
        if reading.transformer:
            photo = inverted(model, photo, prompts[Half.COND])
        bank = read(model, photo, reading)
        picture, drawn = shown(model, bank, photo.whole)
        saved = ui.ImageSaveHelper.save_images(
            drawn, "kindred_subject", io.FolderType.temp, cls, compress_level=1
        )
        return io.NodeOutput(bank, picture, ui=ui.SavedImages(saved))

    @classmethod
    def validate_inputs(cls, input_types: dict[str, str]) -> bool | str:
        """What the wires tell before anything runs: input_types, of those that are there."""
        if why := host.mismatch(cls, input_types):
            return f"{NODE}: {why}"
        wired = "inversion" in input_types, "latent" in input_types
        return True if sum(wired) == 1 else f"{NODE}: {one_of_both(*wired)}"

    @classmethod
    def fingerprint_inputs(cls, blocks: str = "all", **others: Any) -> str:
        """A new measurement means other blocks by the same word."""
        return host.measurements_stamp(blocks)


def one_of_both(inversion: bool, latent: bool) -> str:
    """Why exactly one of them has to be wired."""
    none, both = "neither an inversion nor a latent is", "both an inversion and a latent are"
    return (
        f"{both if latent and inversion else none} wired. Wire exactly one: the photo's "
        "latent, or the result of DDIM Invert."
    )


@dataclass(frozen=True)
class Photo:
    """What is read: an inverted photo, or an encoded one and the schedule that it is inverted
    along.
    """

    key: str  # of the model
    down: Tensor  # [t+1] sigmas, descending
    shape: tuple[int, ...]  # [r c y x] of its latents
    schedule: str = ""  # its name; "": the inversion tells
    z0: Tensor | None = None  # [r c y x] in model scale; None: it is inverted already
    inversion: InversionTrajectory | None = None

    @property
    def pictures(self) -> int:
        return self.shape[0]

    @property
    def whole(self) -> Grid:
        return tuple(self.shape[2:])


@dataclass(frozen=True)
class Finding:
    """How the subject is found in the photo: by a wired mask, else by its words' maps."""

    mask: Tensor | None  # MASK [1|r Y X]
    blocks: str  # whose cross-attention locates it
    threshold: Threshold
    steps: int  # tau


def say_doubts(mask: Tensor | None, whole: Grid) -> None:
    """A warning for each reason why a wired mask may not be the subject of a photo."""
    for doubt in () if mask is None else doubts_of(mask, whole):
        host.warn(f"{NODE}: {doubt}")


def require_share(token_share: float) -> None:
    """ValueError for a share of the subject's tokens that is none."""
    if not 0 < token_share <= 1:
        raise ValueError(
            f"{NODE}: token_share is {token_share}. Give a share above 0 and up to 1 (all of the "
            f"subject)."
        )


def photo_of(
    model: Any,
    inversion: InversionTrajectory | None,
    latent: dict[str, Any] | None,
    steps: int,
    scheduler: str,
    sigmas: Tensor | None,
) -> Photo:
    """The one of both that is wired; ValueError for both and for none, and where it does not fit
    the model.
    """
    if (inversion is None) == (latent is None):
        raise ValueError(f"{NODE}: {one_of_both(inversion is not None, latent is not None)}")
    key = host.model_key(model)
    if inversion is not None:
        host.require_same_model(NODE, "inversion", inversion.model_key, key)
        down, shape = inversion.sigmas.flip(0), tuple(inversion.latents.shape[1:])
        return Photo(key, down, shape, inversion=inversion)
    down, name = host.chosen_sigmas(model, steps, scheduler, sigmas, NODE)
    z0 = host.latent_in(model, latent["samples"], NODE)
    return Photo(key, down, tuple(z0.shape), name, z0)


def pass_over(
    sites: Mapping[BlockId, BlockSite],
    blocks: Sequence[BlockId],
    photo: Photo,
    prompts: Mapping[Half, ReferencePrompt],
    subject: Finding,
    stored: torch.dtype | None,
    token_share: float,
    keeps: Keeps,
) -> RefUNetPass:
    """The pass that keeps these blocks, before it begins; stored: the dtype of what is kept, None
    as it is computed.
    """
    grids = {block: grid_of(photo.whole, sites[block].divisor) for block in blocks}
    masks = None
    if subject.mask is not None:
        masks = user_masks(subject.mask, photo.pictures, {*grids.values(), photo.whole})
    map_at = () if masks else map_blocks(subject.blocks, sites, NODE)
    reading = RefUNetPass(
        sites,
        grids,
        photo.whole,
        prompts,
        len(photo.down) - 1,
        Recorder(blocks, map_at, prompts[Half.COND]),
        BankBuilder(stored, masks, token_share, keeps, projecting(sites), host.pins_memory()),
        subject.threshold,
        subject.steps,
    )
    reading.live = is_live(reading.transformer, keeps)
    return reading


def inverted(model: Any, photo: Photo, prompt: ReferencePrompt) -> Photo:
    """The same, inverted along a transformer's path; what is inverted already stays as it is."""
    if photo.inversion is not None:
        return photo
    noise, down = host.noise_of(model, NODE), photo.down
    loop = flow_loop(photo.z0, down, noise)
    path = host.reference_pass(model, photo.shape, down, prompt, None, loop, total=len(down))
    inversion = InversionTrajectory(
        down.flip(0), path, "fireflow", prompt.text, photo.key, photo.schedule, noise=noise
    )
    return replace(photo, inversion=inversion)


def read(model: Any, photo: Photo, reading: RefUNetPass) -> ReferenceBank:
    """The whole pass, and what needs the loaded model after it."""
    prompt, masks = reading.prompts[Half.COND], reading.builder.masks
    if photo.inversion is not None:
        loop = replay_loop(photo.inversion, reading.keep)
    else:
        loop = one_pass_loop(
            photo.z0, photo.down, prompt.text, photo.key, photo.schedule, reading.keep
        )

    def whole_pass(denoise: Denoiser, device: torch.device, progress: Progress) -> ReferenceBank:
        return reading.finish(loop(denoise, device, progress), photo.key)

    calls = reading.calls(one_pass=photo.inversion is None)
    dtype = reading.builder.precision or host.computes_in(model)
    held = reading.bytes_held(photo.pictures, dtype)
    log.info(
        "%s: reads the photo in %d calls of the network%s%s.",
        NODE,
        calls,
        f"; its features take {held / 1e6:.1f} MB of main memory" if held else "",
        " until the mask is known"
        if held and masks is None
        else "; a sampler reads it anew in each step"
        if reading.live
        else "",
    )
    return host.reference_pass(
        model,
        photo.shape,
        photo.down,
        prompt,
        reading.prompts.get(Half.UNCOND),
        whole_pass,
        reading.recorder,
        calls,
        ends_early=photo.inversion is not None,
    )


def shown(model: Any, bank: ReferenceBank, whole: Grid) -> tuple[Tensor, Tensor]:
    """The subject's mask as a MASK [r Y X], and as the node draws it [r Y X 3]."""
    subject = bank.masks[whole]
    log.info(
        "%s: %s, %d blocks, %.1f MB, %.0f %% of the picture is subject",
        NODE,
        bank.trajectory.schedule,
        len(bank.layers),
        bank.bytes / 1e6,
        100 * subject.float().mean(),
    )
    pixels = host.cell(model)
    picture = subject.float().repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)
    rough = host.rough_pictures(model, bank.trajectory.latents[0])
    return picture, subject_picture(rough, subject, picture)


def read_prompts(
    model: Any,
    positive: host.Conditioning,
    negative: host.Conditioning | None,
    pictures: int,
    masked: bool,
    family: str | None,
) -> dict[Half, ReferencePrompt]:
    """The prompts of a pass; ValueError where positive marks no subject and no mask is wired that
    would show it.
    """
    prompts = {Half.COND: host.read_prompt(model, positive, "positive", NODE, pictures)}
    if negative is not None:
        prompts[Half.UNCOND] = host.read_prompt(model, negative, "negative", NODE, pictures)
    if not masked and prompts[Half.COND].subject is None:
        unknown = f" If you did both, this CLIP's words are not known in {family}: wire a mask."
        raise ValueError(
            f"{NODE}: positive ({(prompts[Half.COND].text or 'a CLIP Text Encode')[:200]!r}) marks "
            "no subject word, and no mask is wired. Encode it with Subject Prompts and write the "
            "subject there, or wire a mask of the subject."
            f"{unknown if family else ''}"
        )
    return prompts


def subject_picture(rough: Tensor | None, masks: Tensor, picture: Tensor) -> Tensor:
    """What the node shows: masks bool [r y x] over the rough pictures [r y x 3], at the size of
    picture [r Y X]; without them, it alone.
    """
    if rough is None:
        return picture[..., None].expand(-1, -1, -1, 3)
    return draw_masks(
        torch.nn.functional.interpolate(
            rough.movedim(-1, 1), picture.shape[1:], mode="bilinear"
        ).movedim(1, -1),
        masks,
    )
