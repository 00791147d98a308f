"""InstantX's IP-Adapter for SD3.5: tokens, keys and values that follow the noise level.

A resampler that knows the time makes tokens of a picture's; each block norms them by the time and
projects them. The picture's queries read them together with the picture's own keys, in a softmax of
its own whose answer is added to the block's attention. The adapter's norms take queries and keys as
the network projects them, before norms of its own.
Axes: b pictures, n tokens of a picture, m latent tokens, e the resampler's width, w the width of
what it gives, c = h d channels of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.fused import Attend
from ..network.blocks import BlockId
from .config import ConceptConfig
from .decoupled import rms_normed

EPS = 1e-6  # of its norms on queries and keys
HEAD = 64  # of the resampler
LONGEST_WAVE = 10000.0


@dataclass(frozen=True, eq=False)
class Norms:
    """Weights [d] of norms on queries and keys."""

    q: Tensor
    k: Tensor


@dataclass(frozen=True, eq=False)
class BesideOwn:
    """Keys and values [1 m (h d)] that are read together with the picture's own: Attn(N_q q,
    [N_k k; K_c], [v; V_c]).

    theirs: the network's own norms, which are on q and k already. A root mean square is taken of
    each head, so dividing by their weights gives what the adapter's norms would take.
    """

    k: Tensor
    v: Tensor
    norms: Norms
    theirs: Norms | None = None

    def read(self, attend: Attend, q: Tensor, own: tuple[Tensor, Tensor], heads: int) -> Tensor:
        """q [b n (h d)], own k v [b n (h d)] -> [b n (h d)]."""
        queries, own_k = q, own[0]
        if self.theirs is not None:
            queries, own_k = _over(q, self.theirs.q), _over(own_k, self.theirs.k)
        queries = rms_normed(queries, heads, EPS, self.norms.q.to(q.device))
        own_k = rms_normed(own_k, heads, EPS, self.norms.k.to(q.device))
        k, v = (t.to(q).expand(len(q), -1, -1) for t in (self.k, self.v))
        queries, own_k = queries.to(q), own_k.to(q)
        return attend(queries, torch.cat((own_k, k), 1), torch.cat((own[1], v), 1), heads)


def _over(x: Tensor, weight: Tensor) -> Tensor:
    """x [b n (h d)] over a weight [d], in float32."""
    return (x.float().unflatten(-1, (-1, len(weight))) / weight.to(x.device).float()).flatten(-2)


class Perceiver(nn.Module):
    """Latent tokens read a picture's tokens and themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """x [b n e], latents [b m e], shift and scale [b 1 e] -> [b m e]."""
        latents = self.norm2(latents) * (1 + scale) + shift
        keys = torch.cat((self.norm1(x), latents), 1)
        q, k, v = self.to_q(latents), *self.to_kv(keys).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (-1, min(HEAD, t.shape[-1]))).transpose(1, 2) for t in (q, k, v))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width: int) -> nn.Sequential:
    """A norm and two layers, four times as wide between."""
    wide = nn.Linear(width, 4 * width, bias=False)
    return nn.Sequential(
        nn.LayerNorm(width), wide, nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class TimeEmbedding(nn.Module):
    """A noise level's code [b f] -> [b e]."""

    def __init__(self, waves: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(waves, width), nn.Linear(width, width)

    def forward(self, code: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(code)))


class TimeResampler(nn.Module):
    """Tokens of a picture, as many as there are latents, for one noise level."""

    def __init__(self, config: ConceptConfig) -> None:
        super().__init__()
        own, e = config.adapter, config.adapter.hidden
        self.waves = own.waves
        self.latents = nn.Parameter(torch.empty(1, own.tokens, e))
        self.proj_in = nn.Linear(config.tower_width, e)
        self.proj_out, self.norm_out = nn.Linear(e, config.width), nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (Perceiver(e), feed_forward(e), nn.Sequential(nn.SiLU(), nn.Linear(e, 4 * e)))
            )
            for _ in range(own.depth)
        )
        self.time_embedding = TimeEmbedding(own.waves, e)

    def forward(self, seen: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """A picture's tokens [b n d] at a time of 0 to 1000 -> tokens [b m w], the time [b e]."""
        clock = self.time_embedding(time_code(time, self.waves).to(seen).expand(len(seen), -1))
        x = self.proj_in(seen) + clock[:, None]
        latents = self.latents.expand(len(seen), -1, -1)
        for attention, mixing, modulation in self.layers:
            shift, scale, shift_mixing, scale_mixing = modulation(clock)[:, None].chunk(4, -1)
            latents = attention(x, latents, shift, scale) + latents
            normed = mixing[0](latents) * (1 + scale_mixing) + shift_mixing
            latents = mixing[1:](normed) + latents
        return self.norm_out(self.proj_out(latents)), clock


def time_code(time: float, waves: int) -> Tensor:
    """Cosines, then sines, of a time at falling frequencies, [1 waves]."""
    powers = torch.arange(waves // 2, dtype=torch.float32) / (waves // 2)
    angles = time * torch.exp(-math.log(LONGEST_WAVE) * powers)
    return torch.cat((angles.cos(), angles.sin()))[None]


class TimedNorm(nn.Module):
    """A layer norm whose scale and shift follow the time."""

    def __init__(self, width: int, time: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time, 2 * width)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        """x [b m w], clock [b e] -> [b m w]."""
        shift, scale = self.linear(F.silu(clock))[:, None].chunk(2, -1)
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class Scale(nn.Module):
    """The weight [d] of a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))


class TimedLayer(nn.Module):
    """Keys and values of one block."""

    def __init__(self, config: ConceptConfig, channels: int) -> None:
        super().__init__()
        own = config.adapter
        self.norm_ip = TimedNorm(config.width, own.hidden)
        self.to_k_ip = nn.Linear(config.width, channels, bias=False)
        self.to_v_ip = nn.Linear(config.width, channels, bias=False)
        self.norm_q, self.norm_k, self.norm_ip_k = (Scale(own.head) for _ in range(3))

    def forward(self, tokens: Tensor, clock: Tensor) -> BesideOwn:
        """Tokens [b m w] of all pictures of a subject, the time [b e] -> one set of keys and
        values.
        """
        x = self.norm_ip(tokens, clock)
        k, v = self.to_k_ip(x), self.to_v_ip(x)
        k = rms_normed(k, k.shape[-1] // len(self.norm_k.weight), EPS, self.norm_ip_k.weight)
        norms = Norms(self.norm_q.weight, self.norm_k.weight)
        return BesideOwn(*(t.flatten(0, 1)[None] for t in (k, v)), norms)


class TimedEncoder(nn.Module):
    """Tokens of a picture and a noise level -> keys and values of each block."""

    tower = None  # the host's CLIP Vision gives the tokens

    def __init__(self, config: ConceptConfig) -> None:
        super().__init__()
        self.config = config
        self.resampler = TimeResampler(config)
        self.blocks = nn.ModuleList(TimedLayer(config, c) for _, c in config.layers)

    @torch.no_grad()
    def at(
        self, seen: Tensor, time: float, theirs: Mapping[BlockId, Norms]
    ) -> dict[BlockId, BesideOwn]:
        """A subject's pictures [b n d] at a time of 0 to 1000 -> what each block reads; theirs: the
        network's own norms.
        """
        tokens, clock = self.resampler(seen, time)
        blocks = zip(self.config.layers, self.blocks)
        return {
            block: replace(layer(tokens, clock), theirs=theirs.get(block))
            for (block, _), layer in blocks
        }
