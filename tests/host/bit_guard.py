"""Draws many cells with the pack of any tree and keeps every tensor, so trees can be compared.

`python bit_guard.py HOST TREE FILE` boots the ComfyUI in HOST with the pack in TREE and writes
FILE, a .safetensors, its entries named "cell/tensor". A cell's warnings are kept too, as the bytes
of their text. Names of cells behind FILE draw these alone.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bit_guard_host import (
    ROWS,
    SIZE,
    Setting,
    boot,
    build,
    clip,
    coarse,
    conditioning,
    draw,
    image,
    kindred,
    latent,
    model_in,
    model_of,
    negative,
    noise,
    photo,
    scenes,
    square,
)
from bit_guard_nodes import (
    COLUMNS,
    ELSEWHERE,
    STORIES,
    WINDOWS,
    anchored,
    anchors,
    cached,
    capture,
    concept,
    encoder,
    everything,
    inject,
    levels,
    live,
    reference,
    sharing,
    story,
)
from bit_guard_warnings import Warnings
from torch import Tensor

UNDRAWN = {  # refused, without an effect, or no such setting
    **{("batch of 1", column): True for column in STORIES[:2]},
    **{("area prompts alone", column): True for column in STORIES},
    **{("the same node twice", column): True for column in (*STORIES, "all")},
    **{("two different references", column): True for column in (*STORIES, "all")},
    **{("cond's features in both halves", column): True for column in STORIES},
    **{(row, "further"): True for row in ("sampler dpm_adaptive", "hires second pass")},
}


def in_row(row: str, column: str) -> Tensor:
    """The pictures of one column under the setting of one row."""
    s, node = Setting(**ROWS[row]), COLUMNS[column]
    model = node(model_of(), s)
    if s.graph:
        again = {} if s.graph == "twice" else {"seed": 8}
        model = node(node(model_of(), s, weight=1.0), s, weight=1.0, **again)
    return draw(model, s)


def matrix() -> dict[str, Callable[[], Any]]:
    """Two columns per row, in turn."""
    cells, turn = {}, 0
    for row in ROWS:
        free = [c for c in COLUMNS if (row, c) not in UNDRAWN]
        for column in (free * 3)[turn % len(free) :][:2]:
            cells[f"{row} - {column}"] = partial(in_row, row, column)
        turn += 2
    return cells


# what the matrix does not reach ------------------------------------------------------------------

S = Setting()
LONG = Setting(steps=5)  # a story's features are those of its fourth step
LARGE = Setting(
    batch=1, size=(48, 48), steps=2
)  # its finest attentions are long enough to be joined by their sums
MODES = ("logit bias", "post softmax", "key scale", "output blend")


def inversion(**inputs: Any) -> dict[str, Tensor]:
    """DDIM Invert's noise, the decibels of its round trip, and pictures that read its path."""
    import nodes

    how = {"steps": 3, "scheduler": "ddim_uniform", "sigmas": torch.tensor(levels(S))} | inputs
    made = nodes.NODE_CLASS_MAPPINGS["KindredDDIMInvert"].execute(
        model_of(), photo(), coarse(), **how
    )
    trajectory, start = made.result
    round_trip = re.findall(r"-?[\d.]+(?= dB)", made.ui.as_dict()["text"][0])
    bank, mask = capture(model_of(), levels(S), latent=None, inversion=trajectory)
    drawn = draw(inject(model_of(), bank), S)
    found = {"noise": start["samples"], "round trip": torch.tensor([float(x) for x in round_trip])}
    return found | {"mask": mask, "pictures": drawn}


def captured(sigmas: tuple[float, ...] = (), **inputs: Any) -> dict[str, Tensor]:
    """Ref-UNet Feature Capture's mask, and the pictures that read its reference in both halves."""
    bank, mask = capture(model_of(), sigmas or levels(S), **inputs)
    return {"mask": mask, "pictures": draw(inject(model_of(), bank, halves="both"), S)}


def under(node: Callable[..., Any], s: Setting = S, **inputs: Any) -> Tensor:
    """The pictures of a column under other inputs of its node."""
    return draw(node(model_of(s.family), s, **inputs), s)


def anchored_story(precision: str = "as computed", **inputs: Any) -> dict[str, Tensor]:
    """The anchors' own pictures, and further ones that read them."""
    s = replace(LONG, batch=3)
    own, bank = anchors(anchored(s), precision, **inputs)
    its = {name: inputs[name] for name in ("halves", "order") if name in inputs}
    model = kindred("ConsiStory", model_of(), reference=bank, **{"anchors": 2} | WINDOWS | its)
    return {"anchors": own["samples"], "pictures": draw(model, s)}


def photos_as_anchors(**inputs: Any) -> Tensor:
    bank = reference(levels(LONG), SIZE, pictures=2)
    return under(story, replace(LONG, batch=3), reference=bank, **inputs)


def subjects(
    *words: str, places: Sequence[int] = (0, 1, 2), chunks: Sequence[int] = (1,)
) -> Tensor:
    """A story of several subjects; the lines may be of several lengths."""
    import nodes

    lines = [
        f"a {words[i % len(words)]} beside a {words[0]}"
        + " and" * 75 * (chunks[i % len(chunks)] - 1)
        for i in places
    ]
    positive, count, _ = kindred(
        "SubjectPrompts", clip(), "\n".join(lines), ", ".join(words), "an oil painting of"
    )
    begin = {"samples": torch.zeros(count, 4, *SIZE)}
    how = (1, 5, 4.0, "euler", "ddim_uniform", positive, negative(), begin, 1.0)
    return nodes.KSampler().sample(story(model_of(), LONG), *how)[0]["samples"]


def with_lora(bypass: bool) -> Tensor:
    """A photo read and a picture drawn through one LoRA of rank 2."""
    from comfy_extras.nodes_train import LoraModelLoader

    weights, own = {}, model_of().model.state_dict()
    for n, layer in enumerate(("attn1.to_k", "attn1.to_v", "attn2.to_out.0")):
        name = f"diffusion_model.middle_block.1.transformer_blocks.0.{layer}"
        out, inner = own[f"{name}.weight"].shape
        weights[f"{name}.lora_up.weight"] = noise(n, (out, 2))
        weights[f"{name}.lora_down.weight"] = noise(n + 9, (2, inner))
    model = LoraModelLoader.execute(build("sd15"), weights, 0.3, bypass).result[0]
    return draw(concept(inject(model, capture(model, levels(S))[0]), S), S)


def with_control(node: Callable[..., Any], s: Setting) -> Tensor:
    """A ControlNet that adds the same to every call's middle block."""
    import comfy.controlnet

    import nodes

    class Control(comfy.controlnet.ControlBase):
        def get_control(self, x: Tensor, t: Tensor, cond: Any, number: int, options: Any) -> Any:
            grid = tuple((n + 1) // 2 for n in x.shape[-2:])
            return {"input": [], "middle": [noise(4, (1, 64, *grid)) * 0.3], "output": []}

        def copy(self) -> Any:
            return Control()

    both = conditioning(s, s.who)
    both = [
        [[c, more | {"control": Control(), "control_apply_to_uncond": True}] for c, more in x]
        for x in both
    ]
    how = (s.seed, s.steps, s.cfg, s.sampler, s.scheduler, *both, latent(s, s.who), 1.0)
    return nodes.KSampler().sample(node(model_of(), s), *how)[0]["samples"]


def beside(patch: Callable[[Any], Any], node: Callable[..., Any], s: Setting) -> Tensor:
    """The pictures of a column with a neighbour's node on its MODEL."""
    return draw(patch(node(model_of(), s)), s)


def draw_two_references(s: Setting) -> Tensor:
    return draw(cached(cached(model_of(), s), s, seed=8, weight=0.7), s)


def hyper_tile(model: Any) -> Any:
    from comfy_extras.nodes_hypertile import HyperTile

    return HyperTile.execute(model, 32, 1, 0, False)[0]


def merged_tokens(model: Any) -> Any:
    from comfy_extras.nodes_tomesd import TomePatchModel

    return TomePatchModel.execute(model, 0.3)[0]


def free_u(model: Any) -> Any:
    from comfy_extras.nodes_freelunch import FreeU

    return FreeU.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def perturbed(model: Any) -> Any:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 2.0)[0]


def doubled_text(model: Any) -> Any:
    """A patch that gives every text twice: where its words stand has to be traced."""
    model = model.clone()
    model.set_model_attn2_patch(lambda n, k, v, extra: (n, k.repeat(1, 2, 1), v.repeat(1, 2, 1)))
    return model


def in_precision(weights: torch.dtype, computed: torch.dtype) -> Tensor:
    model = model_in(weights, computed)
    return draw(concept(inject(model, capture(model, levels(S))[0]), S), S).float()


def story_in_precision(weights: torch.dtype, computed: torch.dtype) -> Tensor:
    return draw(story(model_in(weights, computed), LONG), LONG).float()


def of_file(kind: str) -> Tensor:
    """Save Reference and Load Reference between a reference and the pictures that read it."""
    import folder_paths

    bank = anchors(anchored(LONG))[1] if kind == "anchors" else reference(levels(S), SIZE)
    kindred("SaveReference", bank, filename_prefix=f"kindred/{kind}")
    folder = Path(folder_paths.get_output_directory()) / "kindred"
    file = max(folder.glob(f"{kind}*")).name
    again = kindred(
        "LoadReference", next(name for name in (f"kindred/{file}", file) if listed(name))
    )
    again = again[0] if isinstance(again, tuple) else again  # it has gained outputs behind it
    if kind == "anchors":
        return under(story, LONG, reference=again, query_blend=0.0)
    return draw(inject(model_of(), again), S)


def listed(name: str) -> bool:
    import nodes

    schema = nodes.NODE_CLASS_MAPPINGS["KindredLoadReference"].INPUT_TYPES()
    return name in schema["required"]["file"][1]["options"]


class SmallVae:
    """What a node asks of a VAE: a latent cell is the mean of its 8 x 8 pixels."""

    def decode(self, samples: Tensor) -> Tensor:
        large = samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        return large.movedim(1, -1).sigmoid()

    def encode(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), 8)
        return torch.cat((small, small.mean(1, keepdim=True)), 1) * 4 - 2


def preview(kind: str) -> Tensor:
    bank = anchors(anchored(LONG))[1] if kind == "anchors" else reference(levels(S), SIZE)
    return kindred("ReferencePreview", bank, SmallVae())


def added() -> Tensor:
    return under(concept, concept_encoder=encoder("sd15", "add"))


def trained() -> Tensor:
    """Two steps of Concept Encoder Train, and the pictures that read its encoder."""
    inputs = {"model": model_of(), "vae": SmallVae(), "clip": clip()}
    inputs |= {
        "save_name": "trained",
        "steps": 2,
        "learning_rate": 3e-3,
        "tower_rate": 3e-3,
        "average": 0.9,
    }
    inputs |= {
        "concept_encoder": encoder(),
        "size": 64,
        "drop_text": 0.3,
        "drop_image": 0.3,
        "seed": 5,
        "resume": False,
    }
    made, _ = kindred(
        "ConceptEncoderTrain",
        images=[image(2, size=(64, 64))],
        prompt=["a photo"],
        **{name: [value] for name, value in inputs.items()},
    )
    return under(concept, S, concept_encoder=made)


def scores() -> Tensor:
    lines = "a photo of a cat\na photo of a dog"
    made = kindred(
        "ConsistencyScore",
        image(2, size=(128, 128)),
        prompts=lines,
        reference=image(1, 9, (128, 128)),
    )
    return torch.tensor([float(value) for value in made[:3]])


def prompts() -> Tensor:
    return scenes((0, 1, 2), subject="cat, red car", words="a cat and a red car")[0][0]


def photo_cells() -> dict[str, Callable[[], Any]]:
    """DDIM Invert, Ref-UNet Feature Capture, Masked Self-Attn Inject."""
    return {
        "DDIM Invert": inversion,
        "DDIM Invert, edit-friendly": partial(inversion, method="edit-friendly ddpm", seed=5),
        "capture, wired mask": partial(captured, mask=square()),
        "capture, mask by value": partial(
            captured, mask_threshold="value", mask_value=0.45, mask_steps=1
        ),
        "capture, mask of other blocks": partial(captured, mask_blocks="output 2-3", mask_steps=3),
        "capture, two photos": partial(captured, latent=photo(pictures=2)),
        "capture, hidden states": partial(captured, keeps="hidden states"),
        "capture, keys and values": partial(captured, keeps="keys and values"),
        "capture, half of the tokens": partial(captured, token_share=0.5),
        "capture, float16": partial(captured, precision="float16"),
        "capture, live, two photos": partial(
            captured, ELSEWHERE, latent=photo(pictures=2), token_share=0.5
        ),
        **{
            f"photo, {m}": partial(under, cached, weight=0.6, weight_mode=m, halves="both")
            for m in MODES
        },
        "photo, half strength": partial(under, cached, strength=0.5),
        "photo, target mask": partial(under, cached, target_mask=square(0.7)),
        "photo, live, target mask": partial(
            under, live, target_mask=square(0.7), weight_mode="output blend"
        ),
        "photo, decoder, a window": partial(
            under, cached, blocks="decoder", start_percent=0.3, end_percent=0.9
        ),
        "photo of another size": partial(under, live, replace(S, size=(9, 11))),
    }


def concept_cells() -> dict[str, Callable[[], Any]]:
    """Cross-Attn Detail Inject, Concept Encoder Train."""
    return {
        **{f"concept, {m}": partial(under, concept, weight=0.6, weight_mode=m) for m in MODES},
        "concept, added": added,
        "concept, half strength": partial(under, concept, strength=0.5),
        "concept, two pictures": partial(under, concept, image=image(2)),
        "concept, target mask": partial(
            under, concept, target_mask=square(0.7), halves="cond only"
        ),
        "concept, some blocks, a window": partial(
            under, concept, blocks="output 0-1, middle 0", start_percent=0.3, end_percent=0.9
        ),
        "concept, trained": trained,
    }


def story_cells() -> dict[str, Callable[[], Any]]:
    """ConsiStory Shared Attention, ConsiStory Anchor Sampler."""
    three = replace(LONG, batch=3)
    return {
        "story": partial(under, story, three),
        "story, both halves": partial(under, story, three, halves="both"),
        "story, official order": partial(under, story, three, order="official"),
        "story, all read all": partial(under, story, three, anchors=0),
        "story, louder": partial(under, story, three, weight=2.0, dropout=0.0),
        "story, half strength": partial(under, story, three, strength=0.5),
        "story, other dropout": partial(under, story, three, dropout=0.2, seed=4),
        "story, blended alone": partial(
            under, sharing, three, query_blend=0.6, query_blend_end=0.3
        ),
        "story, nothing blended": partial(under, story, three, query_blend=0.0),
        "story, injected alone": partial(under, story, three, weight=0.0),
        "story, drawn masks": partial(under, story, three, masks=square(0.6)),
        "story, other blocks": partial(under, story, three, blocks="all", mask_blocks="output 2-3"),
        "story, heun": partial(under, story, replace(three, sampler="heun")),
        "story, ancestral": partial(under, story, replace(three, sampler="euler_ancestral")),
        "story, odd size": partial(under, story, replace(three, size=(9, 11))),
        "story, two subjects": partial(subjects, "cat", "dog"),
        "story, lines of two lengths": partial(subjects, "cat", chunks=(1, 2)),
        "anchors": anchored_story,
        "anchors, float16": partial(anchored_story, "float16"),
        "anchors, both halves": partial(anchored_story, halves="both"),
        "anchors, official order": partial(anchored_story, order="official"),
        "photos as anchors": photos_as_anchors,
        "photos as anchors, both halves": partial(photos_as_anchors, halves="both"),
        "photos as anchors, keys as they are": partial(photos_as_anchors, align_keys=False),
    }


def other_cells() -> dict[str, Callable[[], Any]]:
    """Other networks, other neighbours, other precisions, files and pictures."""
    families = ("sd20", "sdxl", "koala", "vega", "coarse", "flat")
    return {
        "Subject Prompts": prompts,
        **{f"{f} - photo": partial(under, cached, replace(S, family=f)) for f in families},
        **{f"{f} - concept": partial(under, concept, replace(S, family=f)) for f in families},
        **{f"{f} - story": partial(under, story, replace(LONG, family=f)) for f in families},
        "LoRA": partial(with_lora, False),
        "LoRA in bypass": partial(with_lora, True),
        "ControlNet - photo": partial(with_control, cached, S),
        "ControlNet - story": partial(with_control, story, LONG),
        "HyperTile - photo": partial(beside, hyper_tile, cached, replace(S, size=(16, 16))),
        "merged tokens - photo": partial(beside, merged_tokens, cached, S),
        "FreeU - story": partial(beside, free_u, story, LONG),
        "perturbed attention - all": partial(beside, perturbed, everything, S),
        "doubled text - concept": partial(beside, doubled_text, concept, S),
        "doubled text - story": partial(beside, doubled_text, story, LONG),
        "384x384 pixels - two references": partial(draw_two_references, LARGE),
        "float16 weights": partial(in_precision, torch.float16, torch.float32),
        "bfloat16": partial(in_precision, torch.bfloat16, torch.bfloat16),
        "bfloat16 - story": partial(story_in_precision, torch.bfloat16, torch.bfloat16),
        "photo of a file": partial(of_file, "photo"),
        "anchors of a file": partial(of_file, "anchors"),
        "preview of a photo": partial(preview, "photo"),
        "preview of anchors": partial(preview, "anchors"),
        "scores": scores,
    }


CELLS = matrix() | photo_cells() | concept_cells() | story_cells() | other_cells()


# the program -------------------------------------------------------------------------------------


def drawn(cell: Callable[[], Any], warnings: Warnings) -> dict[str, Tensor]:
    """A cell's tensors, and the text of its warnings."""
    warnings.texts.clear()
    torch.manual_seed(0)
    with torch.inference_mode():
        made = cell()
    found = dict(made) if isinstance(made, Mapping) else {"pictures": made}
    if warnings.texts:
        found["warnings"] = torch.tensor(
            list("\n".join(warnings.texts).encode()), dtype=torch.uint8
        )
    return found


def main(host: str, tree: str, file: str, *only: str) -> None:
    """Draws every cell, or those named."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    boot(Path(host), Path(tree))
    warnings = Warnings(Path(tree))
    logging.getLogger().addHandler(warnings)
    tensors = {}
    for name, cell in CELLS.items():
        if not only or name in only:
            for part, value in drawn(cell, warnings).items():
                tensors[f"{name}/{part}"] = value.clone().contiguous()
    save_file(tensors, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
