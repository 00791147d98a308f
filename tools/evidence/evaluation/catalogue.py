"""The papers' tables and figures, as rows that this program measures."""

from __future__ import annotations

from .miniatures import A_UNET, ENCODER, JOINT
from .rows import PRESETS, rows_of
from .tables import Table

PLAIN_PHOTO, PLAIN_STORY = "self=off", "node=off"
CONTROL = "photo=another"  # what another subject's photo brings: the floor, if identity is what comes through
TABLE_2 = {
    "plain": PLAIN_PHOTO,
    "cross": "self=off, concept.strength=1",
    "self": "",
    "full": "concept.strength=1",
    "shuffled": f"concept.strength=1, {CONTROL}",
}
# paper A's Table 1: what people would use instead
TABLE_1 = {
    "plain": PLAIN_PHOTO,
    "textual inversion": "rival=textual inversion, train_steps=100, train_rate=0.1",
    "LoRA": "rival=lora, train_steps=200, train_rate=0.0005",
    "LoRA with prior": "rival=lora with prior, train_steps=200, train_rate=0.0005",
    "decoupled sum": "self=off, concept.merge=add",
    "img2img 0.5": "rival=img2img, denoise=0.5",
    "img2img 0.7": "rival=img2img, denoise=0.7",
    "reference-only": "rival=reference-only",
    "reference-only, cond": "rival=reference-only, halves=cond only",
    "Kindred self": TABLE_2["self"],
    "Kindred cross": TABLE_2["cross"],
    "Kindred both": TABLE_2["full"],
}
# the same for stories
TABLE_STORY = {
    "plain": PLAIN_STORY,
    "one seed": "rival=one seed",
    "description": "rival=description",
    "LoRA of the first": "rival=lora, train_steps=200, train_rate=0.0005",
    "StyleAligned": "rival=style aligned",
    "Kindred": "",
}
W_S, W_C, DROPOUTS = (0.25, 0.5, 1, 2, 4), (0.25, 0.5, 1, 2, 4), (0, 0.15, 0.5, 0.7)


def self_weight(w: float) -> str:
    return (
        "" if w == 1 else f"weight={w}"
    )  # the node's default: the same row as Table 2's, measured once


FIGURE_6 = (
    {"plain": PLAIN_PHOTO}
    | {f"W_S {w}": self_weight(w) for w in W_S}
    | {f"W_S {w}, no mask": f"{self_weight(w)}, mask=none".removeprefix(", ") for w in W_S[2:]}
    | {f"W_C {w}": TABLE_2["cross"] if w == 1 else f"self=off, concept.weight={w}" for w in W_C}
)
PARETO = {"plain": PLAIN_STORY} | {
    f"dropout {p}": "" if p == 0.5 else f"dropout={p}" for p in DROPOUTS
}
ABLATION = {
    "plain": PLAIN_STORY,
    "story": "",
    "no_sharing": "weight=0",
    "no_variation": "dropout=0, query_blend=0",
    "no_injection": "feature_injection=0",
    "no_mask": "mask=none",
    "no_dropout": "dropout=0",
    "no_blend": "query_blend=0",
}

# what the nodes' defaults were chosen by, on other identities and sets than those that the papers' tables report
SELF = {
    "plain": PLAIN_PHOTO,
    "as it comes": "",
    "W_S 0.5": "weight=0.5",
    "W_S 2": "weight=2",
    "post softmax 0.5": "weight_mode=post softmax, weight=0.5",
    "post softmax 2": "weight_mode=post softmax, weight=2",
    "key scale 0.5": "weight_mode=key scale, weight=0.5",
    "key scale 2": "weight_mode=key scale, weight=2",
    "output blend 0.5": "weight_mode=output blend, weight=0.5",
    "decoder": "blocks=decoder",
    "encoder": "blocks=encoder",
    "both halves": "halves=both",
    "shared halves": "halves=shared",
    "true mask": "mask=true",
    "no mask": "mask=none",
    "threshold 0.3": "mask_threshold=value, mask_value=0.3",
    "1 mask step": "mask_steps=1",
    "5 mask steps": "mask_steps=5",
    "inverted first": "inverted=yes",
}
FULL = {
    "plain": PLAIN_PHOTO,
    "as it comes": "concept.strength=1",
    "from the first step": "concept.start_percent=0",
    "as the paper": "concept.start_percent=0, concept.halves=cond only",
    "start 0.1": "concept.start_percent=0.1",
    "start 0.3": "concept.start_percent=0.3",
    "start 0.45": "concept.start_percent=0.45",
    "cond only": "concept.halves=cond only",
    "shared halves": "concept.halves=shared",
    "W_C 0.5": "concept.weight=0.5",
    "W_C 2": "concept.weight=2",
    "W_S 0.5": "concept.strength=1, weight=0.5",
    "W_S 2": "concept.strength=1, weight=2",
    "add": "concept.merge=add",
    "self decoder": "concept.strength=1, blocks=decoder",
    "inverted first": "concept.strength=1, inverted=yes",
}
FLOW_SETTINGS = {
    "plain": PLAIN_PHOTO,
    "as it comes": "",
    "shuffled": CONTROL,
    "text_share plain": "text_share=plain",
    "W_S 0.5": "weight=0.5",
    "W_S 2": "weight=2",
    "W_S 3": "weight=3",
    "double": "blocks=double",
    "single": "blocks=single",
    "first half": "blocks=encoder",
    "last half": "blocks=decoder",
    "to 0.5": "end_percent=0.5",
    "to 0.8": "end_percent=0.8",
    "from 0.1": "start_percent=0.1",
    "both halves": "halves=both",
    "shared halves": "halves=shared",
    "true mask": "mask=true",
    "no mask": "mask=none",
    "1 mask step": "mask_steps=1",
    "5 mask steps": "mask_steps=5",
    "mask by double": "mask_blocks=double",
    "mask by single": "mask_blocks=single",
    "inverted first": "inverted=yes, method=fireflow",
    "forward noise": "inverted=yes, method=forward noise",
}
ALONE, TOGETHER = "self=off, concept.strength=1", "concept.strength=1"
# what the presets were chosen from: values that mean the same on every network; the number is the
# strength, past 1 the weight itself
INTENTS = {
    "plain": PLAIN_PHOTO,
    "self": "",
    **{f"self {s}": f"strength={s}" for s in (0.5, 0.75)},
    **{f"self {s}": f"weight={s}" for s in (1.25, 1.5)},
    "self, decoder": "blocks=decoder",
    **{f"self, from {start}": f"start_percent={start}" for start in (0.2, 0.4)},
    "self, to 0.7": "end_percent=0.7",
    "cross": ALONE,
    "cross 0.5": "self=off, concept.strength=0.5",
    **{f"cross {s}": f"{ALONE}, concept.weight={s}" for s in (1.25, 1.5, 2)},
    "cross, decoder": f"{ALONE}, concept.blocks=decoder",
    "cross, from 0.4": f"{ALONE}, concept.start_percent=0.4",
    "both": TOGETHER,
    "both 0.5": "strength=0.5, concept.strength=0.5",
    **{f"both {s}": f"{TOGETHER}, weight={s}, concept.weight={s}" for s in (1.25, 1.5, 2)},
    "both, cross 2": f"{TOGETHER}, concept.weight=2",
    "both, self 0.5, cross 2": f"{TOGETHER}, strength=0.5, concept.weight=2",
    "both, self from 0.4": f"{TOGETHER}, start_percent=0.4",
    **{
        f"both, self from 0.4, cross {s}": f"{TOGETHER}, start_percent=0.4, concept.weight={s}"
        for s in (1.5, 2)
    },
    "both, from 0.4": f"{TOGETHER}, start_percent=0.4, concept.start_percent=0.4",
}
BESIDE = "preset=beside an encoder"
NAMED = {
    "plain": PLAIN_PHOTO,
    **{f"self, {name}": f"preset={name}" for name in PRESETS[0][1:]},
    **{f"cross, {name}": f"self=off, concept.preset={name}" for name in PRESETS[1][1:]},
    "both, identity": "preset=identity, concept.preset=identity",
    "both, beside an encoder": f"{BESIDE}, concept.preset=identity",
    "both, gentle": "preset=gentle, concept.preset=gentle",
    "both, strong": f"{BESIDE}, concept.preset=strong",
}
DIALS = {
    "plain": PLAIN_PHOTO,
    **{f"self {s}": f"strength={s}" for s in (0.25, 0.5, 0.75)},
    "self 1": "",
    **{f"concept {s}": f"self=off, concept.strength={s}" for s in (0.25, 0.5, 0.75)},
    "concept 1": TABLE_2["cross"],
}
STORY_DIAL = {
    "plain": PLAIN_STORY,
    **{f"strength {s}": f"strength={s}" for s in (0.25, 0.5, 0.75)},
    "strength 1": "",
}
STORIES = {
    "plain": PLAIN_STORY,
    "as it comes": "",
    "both halves": "halves=both",
    "all read all": "anchors=0, halves=both",
    "all read all, cond only": "anchors=0",
    "1 anchor": "anchors=1",
    "all layers": "blocks=all",
    "W 0.5": "weight=0.5",
    "W 2": "weight=2",
    "dropout 0": "dropout=0",
    "no blending": "query_blend=0",
    "blending to 0.3": "blend_end_percent=0.3",
    "injection to 0.6": "injection_end_percent=0.6",
    "injection from 0": "injection_start_percent=0",
    "injection 1": "feature_injection=1",
    "official order": "order=official",
}
# what is open where text and picture share one softmax
FLOW_STORIES = {
    "plain": PLAIN_STORY,
    "as it comes": "",
    "sharing alone": "feature_injection=0, query_blend=0",
    "alone, no dropout": "feature_injection=0, query_blend=0, dropout=0",
    "alone, both halves": "feature_injection=0, query_blend=0, halves=both",
    "alone, text_share plain": "feature_injection=0, query_blend=0, text_share=plain",
    "alone, all blocks": "feature_injection=0, query_blend=0, blocks=all",
    "without feature injection": "feature_injection=0",
}
# what paper B samples with, on the sets of the papers' tables
SAMPLED = {
    "plain": PLAIN_STORY,
    "plain with FreeU": f"{PLAIN_STORY}, freeu=yes",
    "story": "",
    "story with FreeU": "freeu=yes",
}

PHOTO, STORY = "personalize", "story"
CHOSEN_ON, PRESETS_ON = 1000, 1100  # the first identity or set that settings are chosen on
TABLES = {
    table.name: table
    for table in (
        Table(
            "table_1",
            "Paper A, Table 1: what people would use instead",
            PHOTO,
            rows_of(PHOTO, TABLE_1),
            12,
            needs=ENCODER,
        ),
        Table(
            "table_story",
            "Stories: what people would use instead",
            STORY,
            rows_of(STORY, TABLE_STORY),
            40,
            needs=A_UNET,
        ),
        Table(
            "table_2",
            "Paper A, Table 2: what each injection adds",
            PHOTO,
            rows_of(PHOTO, TABLE_2),
            12,
        ),
        Table(
            "figure_6",
            "Paper A, Fig. 6: weights, with and without the mask",
            PHOTO,
            rows_of(PHOTO, FIGURE_6),
            5,
            axis="weight",
        ),
        Table(
            "ablation",
            "Paper B, section 5.4: a story less one of its parts",
            STORY,
            rows_of(STORY, ABLATION),
            5,
        ),
        Table(
            "pareto",
            "Paper B, Fig. 8: likeness against text, by dropout",
            STORY,
            rows_of(STORY, PARETO),
            5,
            axis="dropout",
        ),
        Table(
            "freeu",
            "Paper B, appendix B: stories with FreeU, as the paper samples",
            STORY,
            rows_of(STORY, SAMPLED),
            20,
            needs=A_UNET,
        ),
        Table(
            "settings_self",
            "Settings of Masked Self-Attn Inject and its reference",
            PHOTO,
            rows_of(PHOTO, SELF),
            6,
            CHOSEN_ON,
        ),
        Table(
            "settings_full",
            "Settings of both injections together",
            PHOTO,
            rows_of(PHOTO, FULL),
            6,
            CHOSEN_ON,
            ENCODER,
        ),
        Table(
            "settings_flow",
            "Settings of Masked Self-Attn Inject on a transformer",
            PHOTO,
            rows_of(PHOTO, FLOW_SETTINGS),
            6,
            CHOSEN_ON,
            JOINT,
        ),
        Table(
            "settings_presets",
            "Settings that the presets were chosen from",
            PHOTO,
            rows_of(PHOTO, INTENTS),
            12,
            PRESETS_ON,
            ENCODER,
        ),
        Table(
            "presets",
            "Presets of the two inject nodes, alone and together",
            PHOTO,
            rows_of(PHOTO, NAMED),
            40,
            needs=ENCODER,
        ),
        Table(
            "settings_story",
            "Settings of ConsiStory Shared Attention",
            STORY,
            rows_of(STORY, STORIES),
            5,
            CHOSEN_ON,
        ),
        Table(
            "settings_story_flow",
            "Settings of ConsiStory Shared Attention on a transformer",
            STORY,
            rows_of(STORY, FLOW_STORIES),
            8,
            CHOSEN_ON,
            JOINT,
        ),
        Table(
            "dials",
            "The strength of the two inject nodes",
            PHOTO,
            rows_of(PHOTO, DIALS),
            6,
            CHOSEN_ON,
            axis="strength",
        ),
        Table(
            "dial_story",
            "The strength of ConsiStory Shared Attention",
            STORY,
            rows_of(STORY, STORY_DIAL),
            5,
            CHOSEN_ON,
            axis="strength",
        ),
    )
}
DEFAULT = ("table_2", "figure_6", "ablation", "pareto")  # what a run without arguments measures
PLAIN = {"personalize": TABLES["table_2"].rows[0], "story": TABLES["ablation"].rows[0]}
