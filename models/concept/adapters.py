"""Public image adapters of transformers as encoders: what their files hold, and what it computes.

Their layouts, as their own programs load them: InstantX and Shakker Labs' IP-Adapter for FLUX.1
(tokens of SigLIP's pooled picture, keys and values of every block, both divided by the root mean
square of each head), XLabs' for FLUX.1 (four tokens of CLIP's projected picture, keys and values of
the double blocks).
Axes: b pictures, d width of what is read of a picture, m tokens, w their width, c channels of a
block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .config import ConceptConfig, Kind
from .encoder import ConceptEncoder, KeysValues, layer_name
from .timed import TimedEncoder


class PooledEncoder(nn.Module):
    """One vector of a picture -> m tokens -> keys and values of each block."""

    tower = None  # the host's CLIP Vision gives what is read of a picture

    def __init__(self, config: ConceptConfig) -> None:
        super().__init__()
        self.config = config
        d, w, m = config.tower_width, config.width, config.adapter.tokens
        mixed = config.adapter.kind is Kind.SHAKKER
        self.proj: nn.Module = nn.Linear(d, m * w)
        if mixed:
            self.proj = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, m * w))
        self.norm = nn.LayerNorm(w)
        self.to_k, self.to_v = (
            nn.ModuleDict(
                {layer_name(b): nn.Linear(w, c, bias=not mixed) for b, c in config.layers}
            )
            for _ in "kv"
        )

    def features(self, pooled: Tensor) -> Tensor:
        """What is read of a picture [b d] -> tokens [b m w]."""
        return self.norm(self.proj(pooled).unflatten(-1, (self.config.adapter.tokens, -1)))

    def keys_values(self, features: Tensor) -> KeysValues:
        """Tokens [b m w] -> (k, v) [b m c] of each block."""
        names = {block: layer_name(block) for block, _ in self.config.layers}
        return {b: (self.to_k[n](features), self.to_v[n](features)) for b, n in names.items()}


AnyEncoder = ConceptEncoder | PooledEncoder | TimedEncoder


def built(config: ConceptConfig) -> AnyEncoder:
    """An encoder of this description, with weights yet to be read."""
    if config.adapter is None:
        return ConceptEncoder(config)
    return TimedEncoder(config) if config.adapter.kind is Kind.TIMED else PooledEncoder(config)


def normed(config: ConceptConfig) -> bool:
    """Whether keys and values are divided by the root mean square of each head."""
    return config.adapter is not None and config.adapter.kind is Kind.SHAKKER


def names_of(prefixes: Mapping[str, str], shapes: Sequence[str]) -> dict[str, str]:
    """Our names of a file's tensors -> theirs; prefixes: ours by theirs."""
    return {
        ours + name.removeprefix(theirs): name
        for theirs, ours in prefixes.items()
        for name in shapes
        if name.startswith(theirs)
    }
