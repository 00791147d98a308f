"""Block Probe: which blocks of a checkpoint make the picture, which mind positions, and which bear
a reference; measured once, used by other nodes as `blocks = measured`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from comfy_api.v0_0_2 import io, ui

from ..models.files import remedy
from ..models.network.blocks import block_name
from ..models.probe.measurement import Measurement
from ..models.probe.prober import NODE, Change, Plan, with_reference
from . import host
from .drawing.blocks import Bars, Chart, draw_blocks
from .drawing.pen import as_image

TITLES = {
    Change.BYPASSED: "bypassed: what is lost without the block's attention",
    Change.MOVED: "moved: what changes when its keys stand elsewhere",
    Change.LENT: "lent: what changes when it reads another picture",
}
UNMOVED = "not measured: the keys of this network hold no position that Kindred can turn"
log = logging.getLogger(__name__)


class BlockProbe(io.ComfyNode):
    """Bypass, positions and injection, block by block, in single passes over a noised picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="KindredBlockProbe",
            display_name=NODE,
            category="Kindred",
            is_output_node=True,
            description="Measures which blocks of your checkpoint matter. Each block gets two or "
            "three passes over one picture: without its attention, with its keys moved, and "
            "reading another picture. The result is kept: write measured into blocks of the "
            "other nodes to use it.",
            search_aliases=[
                "vital layers",
                "layer analysis",
                "block importance",
                "measure blocks",
                "attention probe",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint to measure, with its LoRAs."),
                io.Conditioning.Input(
                    "positive", tooltip="What the picture shows, as one plain prompt."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="A picture through VAE Encode, at the size that you draw at. "
                    "With several each borrows from the next; a single one borrows "
                    "from its mirror image.",
                ),
                io.Int.Input(
                    "noise_levels",
                    default=1,
                    min=1,
                    max=8,
                    tooltip="How many noise levels to measure at. Each repeats all passes "
                    "and makes the figures steadier.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Noise seed.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="chart", tooltip="The figures as bars."),
                io.String.Output(
                    display_name="report", tooltip="The figures as a table, and the presets."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: host.Conditioning,
        latent: dict[str, Any],
        noise_levels: int = 1,
        seed: int = 0,
    ) -> io.NodeOutput:
        plan = host.plan_of(model, require_levels(noise_levels))
        pictures = host.latent_in(model, latent["samples"], NODE)
        prompt = host.read_prompt(model, positive, "positive", NODE, len(pictures))
        log.info("%s: measures %d blocks in %d passes.", NODE, len(plan.blocks), plan.calls)
        measurement = host.probe(model, plan, with_reference(pictures), prompt, seed)
        path = keep(measurement)
        host.tell(cls, summary(measurement))
        picture = as_image(draw_blocks(chart_of(measurement, plan)))
        shown = ui.ImageSaveHelper.save_images(
            picture, "kindred_blocks", io.FolderType.temp, cls, compress_level=1
        )
        report = f"{measurement.report()}\n\nkept in {path}"
        return io.NodeOutput(picture, report, ui=ui.SavedImages(shown))


def require_levels(noise_levels: int) -> int:
    """ValueError for no level at all."""
    if noise_levels < 1:
        raise ValueError(f"{NODE}: noise_levels is {noise_levels}. Give 1 or more.")
    return noise_levels


def keep(measurement: Measurement) -> Path:
    """The file it is kept in; OSError in words where the system refuses one."""
    try:
        return host.keep_measurement(measurement)
    except OSError as error:
        todo = remedy(error, "another --user-directory")
        raise OSError(
            f"{NODE}: {error.strerror or error}. Nothing of it is left; {todo} and queue it again."
        ) from error


def summary(measurement: Measurement) -> str:
    """What stands under the node."""
    chosen = ", ".join(map(block_name, measurement.measured))
    return f"measured: {chosen} ({len(measurement.measured)} of {len(measurement.blocks)} blocks)"


def chart_of(measurement: Measurement, plan: Plan) -> Chart:
    """The same, to be drawn."""
    columns = {block: column for column, block in enumerate(measurement.blocks)}
    bars = [
        Bars(
            TITLES[change],
            {columns[block]: value for block, value in measurement.figures[change].items()},
            UNMOVED,
        )
        for change in Change
    ]
    name, *_ = measurement.model_key.split(" ")
    return Chart(
        f"{NODE}: {name}",
        f"{measurement.model_key}, {len(columns)} blocks, {plan.calls} passes at sigma "
        f"{', '.join(f'{sigma:.3g}' for sigma in plan.sigmas)}. A bar of 1 is a change as large as "
        f"the picture.",
        [(stage, index) for stage, index, _ in measurement.blocks],
        bars,
        {columns[block] for block in measurement.measured},
    )
