"""The flow miniature's forward pass as its training runs it: the host's modules, out of place and in
functions that torch compiles.

The host's own blocks write into their inputs, which a backward pass has to be protected from, and
leave every sum and product to itself: 1.5 times the time of a step on a CPU. What is computed is
the same (tests/host/test_flow_training.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# whose map of the class word is shown: where the nodes read words in this layout, and beyond
MAP_DOUBLE, MAP_SINGLE = (1,), (1, 3, 5)
Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values [b h n d]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: x [b n c] normalised, then scaled and shifted by [b 1 c]."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def split_heads(qkv: Tensor, norm: nn.Module, heads: int) -> Heads:
    """[b n (3 h d)] -> q and k, each normalised over d in float32, and v."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q = F.rms_norm(q.float(), q.shape[-1:], norm.query_norm.weight, 1e-6)
    return q, F.rms_norm(k.float(), k.shape[-1:], norm.key_norm.weight, 1e-6), v


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: x [b h n d] by turns [1 1 n d/2 2 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    pairs = (turns[..., 0] * even[..., None], turns[..., 1] * odd[..., None])
    return (pairs[0] + pairs[1]).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q is scaled already -> [b n (h d)]."""
    weights = (q.to(v) @ k.to(v).transpose(2, 3)).softmax(-1).to(v)
    return (weights @ v).transpose(1, 2).flatten(2)


def double_block(
    block: nn.Module,
    picture: Tensor,
    text: Tensor,
    vector: Tensor,
    turns: Tensor,
    word: Tensor,
    wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """FLUX's block of two streams, picture [b n c] and text [b t c], with one attention -> both,
    and the word's map as single_block shows it.
    """
    streams = ((text, block.txt_attn, block.txt_mod), (picture, block.img_attn, block.img_mod))
    shifts = [mod.lin(F.silu(vector))[:, None].chunk(6, -1) for _, _, mod in streams]
    parts = [
        split_heads(attn.qkv(modulated(x, *shift[:2])), attn.norm, block.num_heads)
        for (x, attn, _), shift in zip(streams, shifts, strict=True)
    ]
    q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
    q, k = turned(q, turns) * q.shape[-1] ** -0.5, turned(k, turns)
    seen, rows = attend(q, k, v), text.shape[1]
    text = text + block.txt_attn.proj(seen[:, :rows]) * shifts[0][2]
    picture = picture + block.img_attn.proj(seen[:, rows:]) * shifts[1][2]
    text = text + block.txt_mlp(modulated(text, *shifts[0][3:5])) * shifts[0][5]
    picture = picture + block.img_mlp(modulated(picture, *shifts[1][3:5])) * shifts[1][5]
    return picture, text, word_map(q, k, v, word, rows if wanted else 0)


def single_block(
    block: nn.Module, x: Tensor, vector: Tensor, turns: Tensor, word: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    """FLUX's block of one stream x [b n c], text first -> x, and its map of the class word [b n - rows].

    word: its row of the text [b]. The map is the word's share of the text's part of the softmax,
    mean over heads; rows: of the text (0: the map is not wanted, and empty).
    """
    shift, scale, gate = block.modulation.lin(F.silu(vector))[:, None].chunk(3, -1)
    width = x.shape[-1]
    qkv, inner = block.linear1(modulated(x, shift, scale)).split(
        (3 * width, block.mlp_hidden_dim), -1
    )
    q, k, v = split_heads(qkv, block.norm, block.num_heads)
    q, k = turned(q, turns) * q.shape[-1] ** -0.5, turned(k, turns)
    both = torch.cat((attend(q, k, v), F.gelu(inner, approximate="tanh")), -1)
    return x + block.linear2(both) * gate, word_map(q, k, v, word, rows)


def word_map(q: Tensor, k: Tensor, v: Tensor, word: Tensor, rows: int) -> Tensor:
    """Of scaled q and k [b h n d] with `rows` of text first -> [b n - rows], as token_map of the nodes has it."""
    if not rows:
        return q.new_zeros(0)
    of_text = (q[:, :, rows:].to(v) @ k[:, :, :rows].to(v).transpose(2, 3)).float().softmax(-1)
    at = word[:, None, None, None].expand(*of_text.shape[:3], 1)
    return of_text.gather(3, at).squeeze(3).mean(1)


@dataclass
class Forward:
    """`flow`, the host's Flux, as training runs it."""

    flow: nn.Module
    double: Callable[..., tuple[Tensor, Tensor, Tensor]] = double_block
    single: Callable[..., tuple[Tensor, Tensor]] = single_block

    def compiled(self) -> Forward:
        """The same with compiled blocks; needs a C++ compiler, and a minute at the first step."""
        torch._dynamo.config.recompile_limit = 64  # each block is compiled for itself
        once = [torch.compile(block, dynamic=False) for block in (double_block, single_block)]
        return Forward(self.flow, *once)

    def __call__(
        self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor, word: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """x [b c y x] at noise level sigma [b] in 0..1, context [b t 64], pooled [b 64], the class
        word's row of the text [b] -> dx/dsigma [b c y x], and the word's maps [b (y x)].
        """
        from comfy.ldm.flux.layers import timestep_embedding

        flow, grid, rows = self.flow, x.shape[2:], context.shape[1]
        turns = turns_of(flow, rows, *grid)
        picture = flow.img_in(x.flatten(2).transpose(1, 2)).float()
        text = flow.txt_in(context).float()
        vector = (flow.time_in(timestep_embedding(sigma, 256)) + flow.vector_in(pooled)).float()
        maps = []
        for index, block in enumerate(flow.double_blocks):
            wanted = index in MAP_DOUBLE
            picture, text, shown = self.double(block, picture, text, vector, turns, word, wanted)
            maps.append(shown)
        both = torch.cat((text, picture), 1)
        for index, block in enumerate(flow.single_blocks):
            wanted = rows if index in MAP_SINGLE else 0
            both, shown = self.single(block, both, vector, turns, word, wanted)
            maps.append(shown)
        last = flow.final_layer
        shift, scale = last.adaLN_modulation(vector)[:, None].chunk(2, -1)
        out = last.linear(modulated(both[:, rows:], shift, scale))
        return out.transpose(1, 2).unflatten(2, grid), [shown for shown in maps if shown.numel()]


def turns_of(flow: nn.Module, rows: int, height: int, width: int) -> Tensor:
    """Rotations [1 1 n d/2 2 2]: text at (0, 0, 0), the picture at (0, y, x)."""
    ids = torch.zeros(1, rows + height * width, 3)
    ids[0, rows:, 1] = torch.arange(height).repeat_interleave(width)
    ids[0, rows:, 2] = torch.arange(width).repeat(height)
    return flow.pe_embedder(ids)
