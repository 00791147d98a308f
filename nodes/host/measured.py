"""Blocks as a user names them: by what was measured on this checkpoint, by what is published for
its network, or by a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import date
from pathlib import Path

import folder_paths
from comfy.model_patcher import ModelPatcher

from ...models.identity import differences
from ...models.network.blocks import BlockId, block_name, select_blocks, terms_of
from ...models.network.sites import BlockSite, family_of
from ...models.probe.file import load_measurement, save_measurement
from ...models.probe.measurement import MEASURED, Measurement
from ...models.probe.published import PUBLISHED, has_published
from .identity import model_key
from .model import log, self_attentions

FLUX1 = ("Flux", "FluxInpaint", "FluxSchnell")  # the host's names of FLUX.1's kinds


def measurement_folder() -> Path:
    """Where measurements are kept: the user's folder of this ComfyUI."""
    return Path(folder_paths.get_user_directory()) / "kindred" / "blocks"


def today() -> str:
    return date.today().isoformat()


def keep_measurement(measurement: Measurement) -> Path:
    """Write it under its model's name, in place of an older one of the same model; OSError as the
    disk gives it.
    """
    folder = measurement_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub('[^A-Za-z0-9.]+', '_', measurement.model_key)}.json"
    save_measurement(measurement, path)
    return path


def measurement_files() -> list[tuple[int, Path]]:
    """When each was written, in ns, and where it lies; newest first. What goes away meanwhile is
    left out.
    """
    files = []
    for path in measurement_folder().glob("*.json"):
        with suppress(OSError):
            files.append((path.stat().st_mtime_ns, path))
    return sorted(files, reverse=True)


def measurements_stamp(blocks: object) -> str:
    """What of the disk an input `blocks` hangs on, for the host's cache; "" where on nothing."""
    if MEASURED not in str(blocks).lower():
        return ""
    return " ".join(f"{path.name} {written}" for written, path in measurement_files())


def _readable() -> Iterator[Measurement]:
    """Every measurement that can be read; of others the log says why."""
    for _, path in measurement_files():
        try:
            yield load_measurement(path)
        except (ValueError, OSError) as error:
            log.warning("Kindred: a measurement of blocks is passed over: %s.", error)


def measurement_of(model: ModelPatcher) -> tuple[Measurement, tuple[str, ...]] | None:
    """The newest of this checkpoint, and what of the MODEL was otherwise then: LoRAs, sampling or
    injected modules; one of the very MODEL first. None where its weights were not measured.
    """
    key, beside = model_key(model), None
    for measurement in _readable():
        differ = differences(measurement.model_key, key)
        if differ == ():
            return measurement, ()
        if differ and "weights" not in differ and "kind" not in differ and beside is None:
            beside = measurement, differ
    return beside


def chosen_blocks(
    model: ModelPatcher, wanted: str, sites: Mapping[BlockId, BlockSite], node: str
) -> tuple[BlockId, ...]:
    """The blocks with self-attention that an input `blocks` asks for.

    ValueError in words for what is unknown, for `measured` where this checkpoint was not, and for a
    published preset of another network.
    """
    available = self_attentions(sites)
    more = _measured(model, wanted, available, node) | _published(wanted, sites, node)
    return select_blocks(wanted, available, node, more)


def _measured(
    model: ModelPatcher, wanted: str, available: Iterable[BlockId], node: str
) -> dict[str, tuple[BlockId, ...]]:
    """The presets that were measured on this checkpoint, where one of them is asked for."""
    terms = [term for term in terms_of(wanted) if term.split()[0] == MEASURED]
    if not terms:
        return {}
    kept = measurement_of(model)
    if kept is None:
        raise ValueError(
            f"{node}: blocks is {wanted!r:.60}, but the blocks of this checkpoint "
            f"({model_key(model)}) have not been measured. Run Block Probe once with this MODEL, "
            f"or write all."
        )
    measurement, differ = kept
    if not {*measurement.blocks} <= {*available}:
        raise ValueError(
            f"{node}: the measurement of this checkpoint names "
            f"{len({*measurement.blocks} - {*available})} blocks that it does not have. Run Block "
            f"Probe with this MODEL again."
        )
    for term in terms:
        _log_preset(node, term, measurement.presets.get(term, ()), _origin(measurement, differ))
    return {**measurement.presets}


def _origin(measurement: Measurement, differ: tuple[str, ...]) -> str:
    """Where a measured preset comes from."""
    other = f", with other {' and '.join(differ)} than now" if differ else ""
    return f"measured by Block Probe on this checkpoint, {measurement.day}{other}"


def _published(
    wanted: str, sites: Mapping[BlockId, BlockSite], node: str
) -> dict[str, tuple[BlockId, ...]]:
    """What papers give for FLUX.1, where the network is that; ValueError where it is asked of
    another.
    """
    fits = family_of(sites) in FLUX1 and has_published(sites)
    for one in (one for one in PUBLISHED if one.name in terms_of(wanted)):
        if not fits:
            kind = family_of(sites) or "a UNet"
            raise ValueError(
                f"{node}: {one.name!r} names blocks of FLUX.1 with its 19 double and 38 single "
                f"blocks ({one.source}), and this model is {kind} with {len(sites)} blocks. Run "
                f"Block Probe with it and write measured, or write all."
            )
        _log_preset(node, one.name, one.blocks, one.source)
    return {one.name: one.blocks for one in PUBLISHED} if fits else {}


def _log_preset(node: str, preset: str, blocks: Iterable[BlockId], source: str) -> None:
    log.info("%s: blocks %r: %s (%s).", node, preset, ", ".join(map(block_name, blocks)), source)
