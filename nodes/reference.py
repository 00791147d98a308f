"""Ref-UNet Feature Capture and Masked Self-Attn Inject: paper A's training-free half (arXiv 2403.11284, section 2.2)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..models.attention.attend import SELF_ODDS, ReferenceTokens, WeightMode, dial
from ..models.attention.joint import TextShare
from ..models.injection import (
    AttnCall,
    BlockSite,
    References,
    Role,
    TargetMask,
    grid_of,
    map_blocks,
)
from ..models.noise import inversion as method
from ..models.noise.inversion import InversionTrajectory
from ..models.noise.path import Noise
from ..models.overlay import draw_masks
from ..models.reference.bank import (
    BankBuilder,
    BlockId,
    Grid,
    Half,
    Halves,
    Keeps,
    Layer,
    ReferenceBank,
    ReferencePrompt,
    block_name,
    select_blocks,
    thinned,
)
from ..models.reference.recorder import Recorder
from ..models.subject.masks import Threshold, resize_user_mask, union_of_first
from . import host

CAPTURE, INJECT = "Ref-UNet Feature Capture", "Masked Self-Attn Inject"
OTSU, VALUE = "otsu", "value"
log = logging.getLogger(__name__)


def replay_loop(trajectory: InversionTrajectory, keep: Callable[[int], bool]) -> host.Loop:
    """Ref-UNet pass over stored latents, noisiest first: one call per step, whose answer nobody needs, until enough is kept."""

    def loop(
        denoise: method.Denoiser,
        device: torch.device,
        progress: Callable[[int, Tensor, Tensor], None],
    ) -> InversionTrajectory:
        last, photo = len(trajectory.sigmas) - 1, trajectory.latents[0].to(device)
        for i in range(last, 0, -1):
            x = trajectory.latents[i].to(device)
            denoise(x, trajectory.sigmas[i].to(device).expand(x.shape[0]))
            progress(last - i, photo, x)
            if keep(i):
                break
        return trajectory

    return loop


def one_pass_loop(
    z0: Tensor, down: Tensor, prompt: str, key: str, name: str, keep: Callable[[int], bool]
) -> host.Loop:
    """Inversion and capture in one pass: steps + 1 calls, each at a (latent, sigma) that the generation will ask for."""

    def loop(
        denoise: method.Denoiser,
        device: torch.device,
        progress: Callable[[int, Tensor, Tensor], None],
    ) -> InversionTrajectory:
        def step(i: int, total: int, x: Tensor, denoised: Tensor) -> None:
            progress(i, denoised, x)
            if i:
                keep(i)

        up = down.flip(0)
        latents = method.ddim_invert(
            denoise, z0.to(device), up, label="source", evaluate_last=True, on_step=step
        )
        return InversionTrajectory(up, latents.cpu(), "ddim, one pass", prompt, key, name)

    return loop


@dataclass
class RefUNetPass:
    """The Ref-UNet's pass over a photo: its tokens of every step, the subject's mask from its words' maps, and the bank made of both."""

    sites: Mapping[BlockId, BlockSite]
    grids: Mapping[BlockId, Grid]  # of the blocks that are kept
    whole: Grid  # [y x] of the latent
    prompts: Mapping[Half, ReferencePrompt]
    steps: int
    recorder: Recorder
    builder: BankBuilder  # with the masks, where they are wired; else they are found
    threshold: Threshold
    mask_steps: int  # tau
    live: bool = False  # no step is held: a sampler will have each of them read anew
    maps: dict[int, Tensor] = field(
        default_factory=dict
    )  # [r y x] per step; none where the masks are wired

    def keep(self, i: int) -> bool:
        """Take what the recorder saw at sigma i of the trajectory, counted from the photo's own, 0 -> whether that is enough."""
        if not self.live:
            for half in self.prompts:
                self.builder.add(
                    half, i - 1, self.recorder.of(half), len(self.prompts) * self.steps, self.grids
                )
        if self.builder.masks is None:
            found = self.recorder.word_map()
            if found is None:
                raise ValueError(f"{CAPTURE}: {self.why_no_map()}")
            self.maps[i] = found.cpu()
        return self.live and (self.builder.masks is not None or len(self.maps) >= self.mask_steps)

    def why_no_map(self) -> str:
        """Why the subject's words were seen in no block, and what to do."""
        blocks = ", ".join(map(block_name, sorted(self.recorder.map_blocks)))
        if (family := family_of(self.sites)) is None:
            return (
                f"another node replaces the cross-attention of {blocks}, so the subject's word cannot be followed there. Wire a mask, "
                "or put that node behind this one."
            )
        subject = self.prompts[Half.COND].subject
        words, last = (
            ", ".join(map(repr, subject.words)),
            max(p for row in subject.positions for p in row) + 1,
        )
        return (
            f"{words} stands in row {last} of the prompt, but {family} was not seen to read it there in {blocks}. Wire a mask of the "
            "subject, or remove the node that changes the prompt or computes these blocks by itself."
        )

    def found_masks(self) -> dict[Grid, Tensor]:
        """bool [r y x] per grid: where the subject's words light up in the noisiest steps, eq. (4), (5)."""
        noisiest_first = [self.maps[i] for i in sorted(self.maps, reverse=True)]
        masks = {
            grid: union_of_first(noisiest_first, self.mask_steps, self.threshold, grid)
            for grid in {*self.grids.values(), self.whole}
        }
        words = ", ".join(map(repr, self.prompts[Half.COND].subject.words))
        check_masks(
            masks[self.whole],
            f"{words} lights up nowhere. Describe what the photo shows, or wire a mask.",
        )
        return masks

    def finish(
        self, trajectory: InversionTrajectory, key: str, device: torch.device
    ) -> ReferenceBank:
        """The bank, once every step is kept and while the model is still loaded."""
        masks = self.found_masks() if self.builder.masks is None else self.builder.masks
        computed = next(iter(self.recorder.tokens.values())).dtype
        maps = torch.stack([self.maps[i] for i in sorted(self.maps)]) if self.maps else None
        if self.live:
            layers = tuple(
                Layer(block, self.grids[block], tokens.shape[-1])
                for block, tokens in self.recorder.of(Half.COND).items()
            )
            return ReferenceBank(
                trajectory,
                self.prompts,
                layers,
                masks,
                dict.fromkeys(self.prompts, ()),
                key,
                maps,
                share=self.builder.share,
            )

        def project(block: BlockId, tokens: Tensor) -> Tensor:
            return torch.cat(self.sites[block].keys_values(tokens.to(device, computed)), -1).cpu()

        return self.builder.finish(self.grids, masks, trajectory, self.prompts, key, maps, project)

    def width(self, block: BlockId) -> int:
        """Channels of a token of a block; of a transformer they are known once the recorder saw one."""
        module, seen = self.sites[block].module, self.recorder.tokens.get((Half.COND, block))
        if module is not None:
            return module.attn1.to_k.in_features
        return 0 if seen is None else seen.shape[-1]

    def bytes_held(self, pictures: int, dtype: torch.dtype) -> int:
        """Of main memory while the pass runs: of all hidden states, or of what is kept where the masks are wired."""
        masks, keeps = self.builder.masks, self.builder.keeps
        tokens = {
            grid: pictures * math.prod(grid)
            if masks is None
            else len(thinned(masks[grid].flatten().nonzero().squeeze(1), self.builder.share))
            for grid in self.grids.values()
        }
        step = (
            sum(tokens[grid] * self.width(block) for block, grid in self.grids.items())
            * dtype.itemsize
        )
        held = len(self.prompts) * self.steps * step
        return held * 2 if masks is not None and keeps.projects(held) else held


class RefUNetCapture(io.ComfyNode):
    """Ref-UNet pass of paper A: features of every step, and the subject's mask from its words' cross-attention, eq. (4), (5)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredRefUNetCapture",
            display_name=CAPTURE,
            category="Kindred",
            description="Reads the subject out of a photo: the self-attention features of every step and a mask of where the subject is. "
            "Give it the encoded photo (it inverts and reads in one pass) or the result of DDIM Invert.",
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
                    tooltip="A coarse description with the subject's word, such as: a photo of a cat "
                    "(Subject Prompts).",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=2,
                    max=1000,
                    tooltip="With a latent: the steps of the sampler that will generate. Unused with an inversion.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=host.schedulers(),
                    default="ddim_uniform",
                    tooltip="With a latent: the scheduler of the sampler that will generate. Unused with an inversion.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    advanced=True,
                    tooltip="Which self-attention blocks to keep: all, encoder, middle, decoder, masactrl, or a list such as "
                    "output 3-5, middle 0. Fewer blocks take less memory.",
                ),
                io.Combo.Input(
                    "mask_threshold",
                    options=[OTSU, VALUE],
                    default=OTSU,
                    advanced=True,
                    tooltip="otsu finds the threshold from the map itself; value uses the number below.",
                ),
                io.Float.Input(
                    "mask_value",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Threshold on the map scaled to 0..1, used when the threshold is set to value.",
                ),
                io.Int.Input(
                    "mask_steps",
                    default=2,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="The mask is the union over this many first (noisiest) steps: the paper's tau = 2.",
                ),
                io.String.Input(
                    "mask_blocks",
                    default="auto",
                    advanced=True,
                    tooltip="Blocks whose cross-attention locates the subject. auto: those at a quarter of the latent's size.",
                ),
                io.Combo.Input(
                    "precision",
                    options=["as computed", "float16"],
                    default="as computed",
                    advanced=True,
                    tooltip="How the features are stored in memory. float16 halves the memory of a model that computes in "
                    "float32.",
                ),
                io.Combo.Input(
                    "keeps",
                    options=[k.value for k in Keeps],
                    default=Keeps.AUTO.value,
                    optional=True,
                    advanced=True,
                    tooltip="What is held of each token. keys and values make every later step a little faster and take "
                    "twice the memory of hidden states; automatic takes them up to 1 GB.",
                ),
                io.Float.Input(
                    "token_share",
                    default=1.0,
                    min=0.05,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How much of the subject's tokens is kept, evenly spread: less takes less memory and time, and "
                    "those that are kept speak the louder.",
                ),
                host.Inversion.Input(
                    "inversion",
                    optional=True,
                    tooltip="From DDIM Invert: its latents are read, one call per step.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Instead of an inversion: the photo through VAE Encode; inverted and read "
                    "in one pass.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="Also reads the features of the negative half, for CFG halves = both.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the subject is, instead of finding it by its word. White is the "
                    "subject.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="With a latent, instead of steps and scheduler: the SIGMAS the sampler "
                    "gets.",
                ),
            ],
            outputs=[
                host.Reference.Output(
                    display_name="reference",
                    tooltip="Features, masks and the trajectory of the photo.",
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
        sites = host.require_sites(model, CAPTURE)
        wanted = select_blocks(blocks, host.self_attentions(sites), CAPTURE)
        if not 0 < token_share <= 1:
            raise ValueError(
                f"{CAPTURE}: token_share is {token_share}. Give a share above 0 and up to 1 (all of the subject)."
            )
        if (inversion is None) == (latent is None):
            raise ValueError(
                f"{CAPTURE}: "
                f"{'neither an inversion nor a latent is' if latent is None else 'both an inversion and a latent are'} "
                "wired. Wire exactly one: the photo's latent, or the result of DDIM Invert."
            )
        key = host.model_key(model)
        if inversion is not None:
            host.require_same_model(CAPTURE, "inversion", inversion.model_key, key)
            shape, down = inversion.latents.shape[1:], inversion.sigmas.flip(0)
        else:
            down, name = host.chosen_sigmas(model, steps, scheduler, sigmas, CAPTURE)
            z0 = host.latent_in(model, latent["samples"], CAPTURE)
            shape = z0.shape
        prompts = read_prompts(
            model, positive, negative, shape[0], masked=mask is not None, family=family_of(sites)
        )
        whole = tuple(shape[2:])
        grids = {block: grid_of(whole, sites[block].divisor) for block in wanted}
        masks = None if mask is None else user_masks(mask, shape[0], {*grids.values(), whole})
        recorder = Recorder(
            wanted, () if masks else map_blocks(mask_blocks, sites, CAPTURE), prompts[Half.COND]
        )
        builder = BankBuilder(
            torch.float16 if precision == "float16" else None, masks, token_share, Keeps(keeps)
        )
        reading = RefUNetPass(
            sites,
            grids,
            whole,
            prompts,
            len(down) - 1,
            recorder,
            builder,
            OTSU if mask_threshold == OTSU else mask_value,
            mask_steps,
        )
        transformer = family_of(sites) is not None
        reading.live = is_live(transformer, Keeps(keeps))
        if inversion is None and transformer:
            noise = host.noise_of(model, CAPTURE)
            path = host.reference_pass(
                model,
                shape,
                down,
                prompts[Half.COND],
                None,
                flow_loop(z0, down, noise),
                total=len(down),
            )
            inversion = InversionTrajectory(
                down.flip(0), path, "fireflow", prompts[Half.COND].text, key, name, noise=noise
            )
        if inversion is not None:
            loop = replay_loop(inversion, reading.keep)
        else:
            loop = one_pass_loop(z0, down, prompts[Half.COND].text, key, name, reading.keep)

        def read(
            denoise: method.Denoiser,
            device: torch.device,
            progress: Callable[[int, Tensor, Tensor], None],
        ) -> ReferenceBank:
            """The whole pass, and what needs the loaded model after it."""
            return reading.finish(loop(denoise, device, progress), key, device)

        calls = (
            (1 if masks else mask_steps) if reading.live else len(down) - 1 + (inversion is None)
        )
        held = reading.bytes_held(shape[0], builder.precision or host.computes_in(model))
        log.info(
            "%s: reads the photo in %d calls of the network%s%s.",
            CAPTURE,
            calls,
            f"; its features take {held / 1e6:.1f} MB of main memory" if held else "",
            " until the mask is known"
            if held and masks is None
            else "; a sampler reads it anew in each step"
            if reading.live
            else "",
        )
        bank = host.reference_pass(
            model,
            shape,
            down,
            prompts[Half.COND],
            prompts.get(Half.UNCOND),
            read,
            recorder,
            calls,
            ends_early=inversion is not None,
        )
        found = bank.masks[whole]
        log.info(
            "%s: %s, %d blocks, %.1f MB, %.0f %% of the picture is subject",
            CAPTURE,
            bank.trajectory.schedule,
            len(bank.layers),
            bank.bytes / 1e6,
            100 * found.float().mean(),
        )
        pixels = host.cell(model)
        picture = found.float().repeat_interleave(pixels, 1).repeat_interleave(pixels, 2)
        drawn = found_picture(
            host.rough_pictures(model, bank.trajectory.latents[0]), found, picture
        )
        shown = ui.ImageSaveHelper.save_images(
            drawn, "kindred_subject", io.FolderType.temp, cls, compress_level=1
        )
        return io.NodeOutput(bank, picture, ui=ui.SavedImages(shown))


def flow_loop(z0: Tensor, down: Tensor, noise: Noise) -> host.Loop:
    """FireFlow's inversion of a transformer's photo; its points are read in a pass of their own."""

    def loop(
        denoise: method.Denoiser,
        device: torch.device,
        progress: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        return method.fireflow_invert(
            denoise,
            z0.to(device),
            down.flip(0),
            noise=noise,
            on_step=lambda i, total, x, denoised: progress(i, denoised, x),
        ).cpu()

    return loop


def is_live(transformer: bool, keeps: Keeps) -> bool:
    """Whether every step will be read anew: of a transformer, unless its keys and values are asked for by name.

    ValueError for hidden states of a transformer, which nothing here could make keys of.
    """
    if transformer and keeps is Keeps.HIDDEN:
        raise ValueError(
            f"{CAPTURE}: keeps is {keeps.value!r}, but of a transformer keys and values are taken as they come. Choose "
            "automatic (read live, step by step) or keys and values (held for every step)."
        )
    return transformer and keeps is Keeps.AUTO


def family_of(sites: Mapping[BlockId, BlockSite]) -> str | None:
    """The name of a transformer's kind; None for a UNet."""
    return next((site.backbone.family for site in sites.values() if site.backbone), None)


def read_prompts(
    model: Any,
    positive: host.Conditioning,
    negative: host.Conditioning | None,
    pictures: int,
    masked: bool,
    family: str | None = None,
) -> dict[Half, ReferencePrompt]:
    """The prompts of a pass; ValueError where positive marks no subject and no mask is wired that would show it."""
    prompts = {Half.COND: host.read_prompt(model, positive, "positive", CAPTURE, pictures)}
    if negative is not None:
        prompts[Half.UNCOND] = host.read_prompt(model, negative, "negative", CAPTURE, pictures)
    if not masked and prompts[Half.COND].subject is None:
        raise ValueError(
            f"{CAPTURE}: positive ({(prompts[Half.COND].text or 'a CLIP Text Encode')[:200]!r}) marks no subject word, and no "
            f"mask is wired. "
            "Encode it with Subject Prompts and write the subject there, or wire a mask of the subject."
            f"{f' If it was, its CLIP is not one whose words are known in {family}: wire a mask.' if family else ''}"
        )
    return prompts


def found_picture(rough: Tensor | None, masks: Tensor, picture: Tensor) -> Tensor:
    """What the node shows: masks bool [r y x] over the rough pictures [r y x 3], at the size of picture [r Y X]; without them, it alone."""
    if rough is None:
        return picture[..., None].expand(-1, -1, -1, 3)
    return draw_masks(
        torch.nn.functional.interpolate(
            rough.movedim(-1, 1), picture.shape[1:], mode="bilinear"
        ).movedim(1, -1),
        masks,
    )


def user_masks(mask: Tensor, r: int, grids: set[Grid]) -> dict[Grid, Tensor]:
    """MASK [1|r Y X] -> bool [r y x] per grid; ValueError when the counts differ or one is empty."""
    mask = mask.reshape(-1, *mask.shape[-2:]).cpu()
    if mask.shape[0] not in (1, r):
        raise ValueError(
            f"{CAPTURE}: {mask.shape[0]} masks for {r} reference picture{'s' * (r > 1)}. Wire one mask, or one per picture."
        )
    corners = mask[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    if (corners > 0.5).all() and not (mask > 0.5).all():
        log.warning(
            "%s: the wired mask marks all four corners of the photo and %.0f %% of it. If the photo is a cut-out, its mask is "
            "what is transparent, so the background: put InvertMask between.",
            CAPTURE,
            100 * (mask > 0.5).float().mean(),
        )
    masks = {grid: resize_user_mask(mask, grid).expand(r, -1, -1) for grid in grids}
    for found in masks.values():
        check_masks(found, "the wired mask is empty (all black). Paint the subject white.")
    return masks


def check_masks(found: Tensor, why: str) -> None:
    """Refuse a reference without a subject, found bool [r y x]: ValueError names the picture and what to do."""
    for i, picture in enumerate(found, 1):
        if not picture.any():
            raise ValueError(f"{CAPTURE}: no subject in picture {i} of {len(found)}: {why}")


@dataclass(frozen=True)
class MaskedSelfInjection:
    """Configuration of one Masked Self-Attn Inject node."""

    bank: ReferenceBank
    weight: float
    mode: WeightMode
    blocks: frozenset[BlockId]
    start: float  # shares of the sampled schedule between which the reference is read
    end: float
    halves: Halves
    target_mask: Tensor | None = None  # [1|b y x] at the mask's own size
    text: TextShare = TextShare.KEPT
    watches: ClassVar[bool] = False

    @property
    def sources(self) -> frozenset[Half]:
        return frozenset(s for half in Half if (s := self.halves.source(half)))

    def check(self, model: Any) -> None:
        """Called when a sampler starts: a LoRA may have been added behind this node."""
        host.require_same_model(INJECT, "reference", self.bank.model_key, host.model_key(model))

    def held(self, model: Any, shape: Sequence[int]) -> int:
        """Bytes on the device: this step's row and the next one, and the longest keys and values of a layer."""
        width, sizes = (
            host.computes_in(model).itemsize,
            host.token_sizes(model, shape[-2:], self.bank),
        )
        kept = {layer: self.bank.most_kept[layer.grid] for layer in self.bank.layers}
        row = sum(kept[layer] * layer.channels for layer in self.bank.layers)
        readers = shape[0] * (1 if self.halves is Halves.COND else 2)
        longest = max(
            2 * (sizes[layer.block][0] + kept[layer]) * sizes[layer.block][1]
            for layer in self.bank.layers
        )
        return (2 * len(self.sources) * row + readers * longest) * width

    def start_run(self, run: host.SamplerRun) -> ActiveMaskedSelf:
        target = None if self.target_mask is None else TargetMask(self.target_mask, INJECT)
        return ActiveMaskedSelf(self, run, run.at(self.start, self.end), target=target)


@dataclass
class ActiveMaskedSelf:
    """A MaskedSelfInjection during one run: the current step's tokens, and target masks per grid."""

    config: MaskedSelfInjection
    run: host.SamplerRun
    window: tuple[float, ...]  # sigmas: from, until
    tokens: Mapping[Half, Mapping[BlockId, Tensor]] | None = None
    target: TargetMask | None = None
    node: ClassVar[str] = INJECT

    @property
    def wants(self) -> bool:
        return self.tokens is not None

    def concerns(self, call: AttnCall) -> bool:
        return not call.cross and self.tokens is not None and call.block in self.config.blocks

    def begin_step(self, sigma: float) -> None:
        c = self.config
        inside = self.window[1] <= sigma <= self.window[0]
        self.tokens = host.reference_tokens(self.run, c.bank, sigma, c.sources) if inside else None

    def references(
        self, call: AttnCall, site: BlockSite, q: Tensor, k: Tensor, v: Tensor
    ) -> list[References]:
        """Keys and values of the reference, projected once per call and not once per row."""
        c = self.config
        if not self.concerns(call):
            return []
        source = {
            role: s
            for role in dict.fromkeys(call.roles)
            if role is not Role.OTHER and (s := c.halves.source(role.half))
        }
        halves = list(dict.fromkeys(source.values()))
        if not halves or not len(self.tokens[halves[0]][call.block]):
            return []
        of_half = [self.tokens[half][call.block][None] for half in halves]
        texts = c.bank.prompts[Half.COND].cross.shape[1], call.texts[0].text if call.texts else None
        k, v = site.keys_values(
            (of_half[0] if len(of_half) == 1 else torch.cat(of_half)).to(q), texts
        )
        louder = c.bank.loudness[c.bank.grids[call.block]]
        weight, log_mask = (
            (c.weight * louder, None)
            if c.mode is WeightMode.LOGIT_BIAS or louder == 1
            else (c.weight, k.new_full((k.shape[1],), math.log(louder), dtype=torch.float32))
        )
        made = {
            half: ReferenceTokens(k[i : i + 1], v[i : i + 1], weight, c.mode, log_mask)
            for i, half in enumerate(halves)
        }
        return [
            References(
                {role: made[half] for role, half in source.items()},
                self.target(call, q) if self.target else None,
                by_row=ReferenceTokens(k, v, weight, c.mode, log_mask)
                if halves == list(source.values())
                else None,
                share=c.text,
            )
        ]


class MaskedSelfAttnInject(io.ComfyNode):
    """Paper A eq. (1)-(3): reference keys and values beside the picture's own, weighted inside the softmax."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredMaskedSelfAttnInject",
            display_name=INJECT,
            category="Kindred",
            description="Lets the picture being made look at the subject of a reference. Works with any sampler; chain several for several "
            "references.",
            search_aliases=[
                "attention injection",
                "reference only",
                "personalize",
                "subject reference",
                "self attention",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model the reference was read with."),
                host.Reference.Input("reference", tooltip="From Ref-UNet Feature Capture."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How much of the reference's subject comes through: 0 is the plain picture, 1 all of it. Start with "
                    "1 and turn it down where the picture copies too much.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="W_S at full strength: 1 is the reference beside the picture's own features, more is more identity "
                    "until shapes break.",
                ),
                io.Combo.Input(
                    "weight_mode",
                    options=[m.value for m in WeightMode],
                    default=WeightMode.LOGIT_BIAS.value,
                    advanced=True,
                    tooltip="How the weight acts. logit bias: renormalised inside the softmax. post softmax: on its output. key "
                    "scale: on the keys. "
                    "output blend: between plain and concatenated.",
                ),
                io.String.Input(
                    "blocks",
                    default="all",
                    advanced=True,
                    tooltip="Which captured blocks to use: all, encoder, middle, decoder, masactrl, or a list such as output "
                    "3-5, middle 0.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="When in the sampling the reference starts to be read.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="When in the sampling it stops to be read.",
                ),
                io.Combo.Input(
                    "halves",
                    options=[h.value for h in Halves],
                    default=Halves.COND.value,
                    advanced=True,
                    tooltip="Which half of CFG reads the reference. cond only lets guidance amplify the subject; both needs a "
                    "negative in the capture; "
                    "shared gives both halves the same features.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Only this part of the new picture may look at the reference. White is "
                    "where.",
                ),
                io.Combo.Input(
                    "text_share",
                    options=[s.value for s in TextShare],
                    default=TextShare.KEPT.value,
                    optional=True,
                    advanced=True,
                    tooltip="In transformers (Flux, Qwen-Image, SD3.5 ...) the prompt and the picture share one attention. "
                    "kept: the prompt is heard as much as without the reference. plain: the reference dims it too. "
                    "Without effect in SD1.5, SD2.x and SDXL.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Wire it into any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        reference: ReferenceBank,
        strength: float = 1.0,
        weight: float = 1.0,
        weight_mode: str = WeightMode.LOGIT_BIAS.value,
        blocks: str = "all",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        halves: str = Halves.COND.value,
        target_mask: Tensor | None = None,
        text_share: str = TextShare.KEPT.value,
    ) -> io.NodeOutput:
        sites = host.require_sites(model, INJECT)
        host.require_reference(INJECT, reference, model)
        wanted = select_blocks(blocks, host.self_attentions(sites), INJECT)
        missing = [block_name(b) for b in wanted if b not in reference.blocks]
        if missing and blocks.strip().lower() != "all":
            raise ValueError(
                f"{INJECT}: {', '.join(missing)} not captured; the reference holds "
                f"{', '.join(map(block_name, reference.blocks))}. "
                "Choose the same blocks in Ref-UNet Feature Capture."
            )
        if not weight >= 0:
            raise ValueError(
                f"{INJECT}: the weight is {weight}. Give 0 (the plain picture) or more; 1 is the plain concatenation."
            )
        mode = WeightMode(weight_mode)
        weight *= dial(strength, INJECT, SELF_ODDS if mode is WeightMode.LOGIT_BIAS else 0.0)
        mask = None if target_mask is None else target_mask.reshape(-1, *target_mask.shape[-2:])
        injection = MaskedSelfInjection(
            reference,
            weight,
            mode,
            frozenset(wanted) & frozenset(reference.blocks),
            start_percent,
            end_percent,
            Halves(halves),
            mask,
            TextShare(text_share),
        )
        if not injection.sources <= reference.features.keys():
            raise ValueError(
                f"{INJECT}: halves is {halves!r}, but the reference holds only the "
                f"{', '.join(h.value for h in reference.features)} half. "
                "Wire the negative prompt into Ref-UNet Feature Capture, or choose cond only or shared."
            )
        nothing = (
            weight == 0
            or start_percent >= end_percent
            or (mask is not None and not (mask > 0.5).any())
        )
        return io.NodeOutput(model.clone() if nothing else host.inject(model, injection))
