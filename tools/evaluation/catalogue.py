"""The papers' tables and figures, as rows that this program measures."""
from __future__ import annotations

from .rows import rows_of
from .tables import Table

PLAIN_PHOTO, PLAIN_STORY = "self=off", "node=off"
TABLE_2 = {"plain": PLAIN_PHOTO, "cross": "self=off, concept.strength=1", "self": "", "full": "concept.strength=1"}
W_S, W_C, DROPOUTS = (0.25, 0.5, 1, 2, 4), (0.25, 0.5, 1, 2, 4), (0, 0.15, 0.5, 0.7)


def self_weight(w: float) -> str:
    return "" if w == 1 else f"weight={w}"  # the node's default: the same row as Table 2's, measured once


FIGURE_6 = ({"plain": PLAIN_PHOTO} | {f"W_S {w}": self_weight(w) for w in W_S}
            | {f"W_S {w}, no mask": f"{self_weight(w)}, mask=none".removeprefix(", ") for w in W_S[2:]}
            | {f"W_C {w}": TABLE_2["cross"] if w == 1 else f"self=off, concept.weight={w}" for w in W_C})
PARETO = {"plain": PLAIN_STORY} | {f"dropout {p}": "" if p == 0.5 else f"dropout={p}" for p in DROPOUTS}
ABLATION = {"plain": PLAIN_STORY, "story": "", "no_sharing": "weight=0", "no_variation": "dropout=0, query_blend=0",
            "no_injection": "feature_injection=0", "no_mask": "mask=none", "no_dropout": "dropout=0", "no_blend": "query_blend=0"}

TABLES = {table.name: table for table in (
    Table("table_2", "Paper A, Table 2: what each injection adds", "personalize", rows_of("personalize", TABLE_2), 12),
    Table("figure_6", "Paper A, Fig. 6: weights, with and without the mask", "personalize", rows_of("personalize", FIGURE_6), 6),
    Table("ablation", "Paper B, section 5.4: a story less one of its parts", "story", rows_of("story", ABLATION), 6),
    Table("pareto", "Paper B, Fig. 8: likeness against text, by dropout", "story", rows_of("story", PARETO), 6))}
DEFAULT = tuple(TABLES)  # what a run without arguments measures
PLAIN = {"personalize": TABLES["table_2"].rows[0], "story": TABLES["ablation"].rows[0]}
