"""The workflow of the flow miniature, a transformer, made from the one that ships for the UNet miniature.

Among the shipped workflows it stands only while the miniature is offered: `FLOW_OFFERED` in miniature/layout.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkout import as_kindred

NAME, SOURCE = "personalize_flow_miniature", "personalize"
CHECKPOINT = "kindred_flow_miniature.safetensors"
STEPS = 25
SAMPLING = {  # inputs of the nodes that have them
    "ckpt_name": CHECKPOINT,
    "sampler_name": "euler",
    "scheduler": "simple",
    "steps": STEPS,
    "preset": "identity",  # nothing is beside it
}
LEFT_OUT = ("KindredConceptEncoderLoad", "KindredCrossAttnDetailInject")  # it has no encoder yet


def flow_form(graph: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet miniature's workflow in API form as one of the flow miniature's; MODEL goes past what is left out."""
    flow = copy.deepcopy(dict(graph))
    models = {key: node["inputs"].get("model") for key, node in flow.items()}
    gone = [key for key, node in flow.items() if node["class_type"] in LEFT_OUT]
    for key in gone:
        del flow[key]
    for node in flow.values():
        inputs = node["inputs"]
        inputs |= {name: value for name, value in SAMPLING.items() if name in inputs}
        while isinstance(inputs.get("model"), list) and inputs["model"][0] in gone:
            inputs["model"] = models[inputs["model"][0]]
    return flow


def checkpoint() -> Path:
    """The file of the flow miniature."""
    as_kindred()
    from kindred.miniature.pack import FLOW_CHECKPOINT

    return FLOW_CHECKPOINT


def offered() -> bool:
    """Whether the flow miniature stands in Load Checkpoint, its workflow among the shipped ones, and both in the archive."""
    as_kindred()
    from kindred.miniature.layout import FLOW_OFFERED

    return FLOW_OFFERED


def follow(api: Path) -> None:
    """Write its API form into the folder of the others where it is offered, and take it away where it is not."""
    path = api / f"{NAME}.json"
    if not offered():
        path.unlink(missing_ok=True)
        return
    graph = flow_form(json.loads((api / f"{SOURCE}.json").read_text("utf-8")))
    path.write_text(json.dumps(graph, indent=1, ensure_ascii=False) + "\n", "utf-8")
