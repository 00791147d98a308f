"""Which public adapter of a transformer a file holds, known by the names and shapes of its tensors.

Layouts were read in the programs that their authors and ComfyUI's users load them with; a file that
is none of them to the letter is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..attention.parts import Merge
from ..network.backbone import DOUBLE, SINGLE
from ..network.blocks import BlockId
from .adapters import names_of
from .config import Adapter, ConceptConfig, Kind
from .timed import HEAD

Shapes = Mapping[str, tuple[int, ...]]
Described = tuple[ConceptConfig, dict[str, str]]  # the description, and the file's names by ours
IP_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight$")
XLABS_LAYER = re.compile(
    r"double_blocks\.(\d+)\.processor\.ip_adapter_double_stream_k_proj\.weight$"
)
FLUX_PARTS = 3  # of FLUX.1's 57 blocks every third is a double one: 19


def read_adapter(path: Path, shapes: Shapes) -> Described | None:
    """The description of a public adapter of a transformer, and its tensors' names by ours; None
    for a file of another kind.

    ValueError for one that begins as such an adapter and is cut or of a size that cannot be.
    """
    for mark, read in MARKS.items():
        if mark in shapes:
            try:
                known = read(shapes)
                _require_known(shapes, known[1])
                return known
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(
                    f"{path.name} looks like {KINDS[read].value}, but its tensors are not those "
                    f"of one ({error!s:.120}). Copy or download it again, or take the file that "
                    f"its authors published."
                ) from error
    return None


def _require_known(shapes: Shapes, names: Mapping[str, str]) -> None:
    """ValueError where the file holds more than such an adapter has."""
    more = sorted(shapes.keys() - set(names.values()))
    if more:
        raise ValueError(f"it also holds {more[0]}")


def _numbered(shapes: Shapes, pattern: re.Pattern[str]) -> list[str]:
    """The tensors that match, by their number, which must run from 0."""
    known = {int(match[1]): name for name in shapes if (match := pattern.match(name))}
    if sorted(known) != list(range(len(known))) or not known:
        raise ValueError(f"{len(known)} layers that are not numbered from 0")
    return [known[i] for i in range(len(known))]


def _side(shapes: Shapes, name: str, axis: int) -> int:
    """One side of a matrix; ValueError where it cannot be one's."""
    sides = shapes[name]
    if len(sides) != 2 or not 0 < sides[axis] <= 1 << 20:
        raise ValueError(f"{name} is {list(sides)}")
    return sides[axis]


def _tokens(whole: int, width: int) -> int:
    if not 0 < width <= 1 << 16 or whole % width or not 0 < whole // width <= 4096:
        raise ValueError(f"{whole} numbers are no tokens of width {width}")
    return whole // width


def shakker(shapes: Shapes) -> Described:
    """InstantX and Shakker Labs' IP-Adapter for FLUX.1."""
    layers = _numbered(shapes, IP_LAYER)
    if len(layers) % FLUX_PARTS:
        raise ValueError(f"{len(layers)} layers, where FLUX.1 has 19 double and 38 single blocks")
    doubles = len(layers) // FLUX_PARTS
    blocks: list[BlockId] = [
        (DOUBLE, i, 0) if i < doubles else (SINGLE, i - doubles, 0) for i in range(len(layers))
    ]
    width, whole = _side(shapes, layers[0], 1), _side(shapes, "image_proj.proj.2.weight", 0)
    adapter = Adapter(Kind.SHAKKER, _tokens(whole, width))
    seen = _side(shapes, "image_proj.proj.0.weight", 1)
    channels = tuple((block, _side(shapes, name, 0)) for block, name in zip(blocks, layers))
    prefixes = {"image_proj.": ""}
    for i, (stage, index, depth) in enumerate(blocks):
        for half in "kv":
            prefixes[f"ip_adapter.{i}.to_{half}_ip."] = f"to_{half}.{stage}_{index}_{depth}."
    return _described("Flux", channels, width, seen, adapter), names_of(prefixes, [*shapes])


def xlabs(shapes: Shapes) -> Described:
    """XLabs' IP-Adapter for FLUX.1."""
    layers = _numbered(shapes, XLABS_LAYER)
    width, whole = _side(shapes, layers[0], 1), _side(shapes, f"{XLABS}proj.weight", 0)
    adapter, seen = (
        Adapter(Kind.XLABS, _tokens(whole, width)),
        _side(shapes, f"{XLABS}proj.weight", 1),
    )
    channels = tuple(((DOUBLE, i, 0), _side(shapes, name, 0)) for i, name in enumerate(layers))
    prefixes = {XLABS: ""}
    for i in range(len(layers)):
        for half in "kv":
            theirs = f"double_blocks.{i}.processor.ip_adapter_double_stream_{half}_proj."
            prefixes[theirs] = f"to_{half}.{DOUBLE}_{i}_0."
    return _described("Flux", channels, width, seen, adapter), names_of(prefixes, [*shapes])


def timed(shapes: Shapes) -> Described:
    """InstantX's IP-Adapter for SD3.5."""
    layers = _numbered(shapes, IP_LAYER)
    width, hidden = _side(shapes, layers[0], 1), _side(shapes, "image_proj.proj_in.weight", 0)
    (_, tokens, _), (head,) = shapes["image_proj.latents"], shapes["ip_adapter.0.norm_ip_k.weight"]
    depth = len(_numbered(shapes, re.compile(r"image_proj\.layers\.(\d+)\.0\.to_q\.weight$")))
    waves = _side(shapes, TIME, 1)
    if hidden % min(hidden, HEAD) or not head:
        raise ValueError(f"a resampler of width {hidden} and heads of {head}")
    adapter = Adapter(Kind.TIMED, _tokens(tokens, 1), hidden, depth, head, waves)
    channels = tuple(((DOUBLE, i, 0), _side(shapes, name, 0)) for i, name in enumerate(layers))
    prefixes = {"image_proj.": "resampler.", "ip_adapter.": "blocks."}
    seen = _side(shapes, "image_proj.proj_in.weight", 1)
    return _described("SD3", channels, width, seen, adapter), names_of(prefixes, [*shapes])


def _described(
    family: str,
    layers: tuple[tuple[BlockId, int], ...],
    width: int,
    seen: int,
    adapter: Adapter,
) -> ConceptConfig:
    source = {"source": adapter.kind.value}
    return ConceptConfig(
        family, layers, width, seen, merge=Merge.ADD, training=source, adapter=adapter
    )


XLABS = "ip_adapter_proj_model."
TIME = "image_proj.time_embedding.linear_1.weight"
# the tensor that tells a layout -> its reader; full-face files of UNets have none of them
MARKS: dict[str, Callable[[Shapes], Described]] = {
    f"{XLABS}proj.weight": xlabs,
    TIME: timed,
    "ip_adapter.0.to_k_ip.weight": shakker,
}
KINDS = {xlabs: Kind.XLABS, timed: Kind.TIMED, shakker: Kind.SHAKKER}
