"""Keys that move with the text, on a rotary code of its own: laws I46, I48 and I51."""

from __future__ import annotations

import pytest
import torch
from kindred.models.attention.joint import TextShare, attend_picture
from kindred.models.attention.references import ReferenceTokens
from kindred.models.network.rope import turned
from small_attention import rand, sdpa_attend
from small_rope import ALONG, B, D, H, P, PAIRINGS, PRECISIONS, T, at, placed, turn
from torch import Tensor


@PAIRINGS
@PRECISIONS
@pytest.mark.parametrize("shift", [-7, 0, 1, 64])
def test_turning_is_rotating_anew(halves, dtype, bound, shift) -> None:
    """I46: R(p' - p) R(p) k = R(p') k."""
    k = rand(B, P, H * D, seed=1, dtype=dtype)
    found = turned(placed(k, at(3, 1, 0), halves), turn(halves), shift)
    wanted = placed(k, at(3, 1, 0) + shift * torch.tensor(ALONG), halves)
    assert found.dtype is dtype and (found - wanted).abs().max() <= bound


@PAIRINGS
@PRECISIONS
def test_all_moved_together_is_not_moved(halves, dtype, bound) -> None:
    """I46: text and picture moved alike leave the attention as it was; the picture alone does not."""
    q, k, v = (rand(B, T + P, H * D, seed=s, dtype=dtype) for s in (1, 2, 3))
    places = torch.cat((at(0, 0, 0, count=T), at(T, 0, 0)))
    q, k = (placed(x, places, halves) for x in (q, k))
    plain = sdpa_attend(q, k, v, H)
    whole = sdpa_attend(*(turned(x, turn(halves), 5) for x in (q, k)), v, H)
    assert (whole - plain).abs().max() <= bound
    picture = [torch.cat((x[:, :T], turned(x[:, T:], turn(halves), 5)), 1) for x in (q, k)]
    assert (sdpa_attend(*picture, v, H) - plain).abs().max() > 1e-2


@PAIRINGS
@PRECISIONS
def test_a_reference_is_read_by_where_it_stands_from_the_picture(halves, dtype, bound) -> None:
    """D (1): its logits know p_i - pi(j) alone; a scale of 1 is its own place, of 0 the origin."""
    q, k = (rand(B, P, H * D, seed=s, dtype=dtype) for s in (1, 2))
    places = at(T, 2, 1)

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        return queries.unflatten(-1, (H, D)).transpose(1, 2) @ keys.unflatten(-1, (H, D)).permute(
            0, 2, 3, 1
        )

    own = scores(placed(q, places, halves), placed(k, places, halves))
    both = scores(*(turned(placed(x, places, halves), turn(halves), 9) for x in (q, k)))
    one = scores(placed(q, places, halves), turned(placed(k, places, halves), turn(halves), 9))
    assert (both - own).abs().max() <= 10 * bound and (one - own).abs().max() > 1e-2
    token = placed(k[:, :1], places[:1], halves)  # back from its place, whole or not at all
    back = turn(halves, tuple((-places[0]).tolist()))
    assert (turned(token, back, 1.0) - k[:, :1]).abs().max() <= bound
    assert (turned(token, back, 0.0) - token).abs().max() <= bound


@PAIRINGS
def test_a_scale_for_each_frequency_commutes_with_turning(halves) -> None:
    """I51: S R = R S where both channels of a pair have one scale; with a scale a channel they do not."""
    k, pairs = rand(B, P, H * D, seed=1), torch.rand(D // 2).double()
    scale = torch.cat((pairs, pairs)) if halves else pairs.repeat_interleave(2)
    other = pairs.repeat_interleave(2) if halves else torch.cat((pairs, pairs))

    def apart(s: Tensor) -> float:
        s = s.repeat(H)
        return (turned(k * s, turn(halves), 3) - turned(k, turn(halves), 3) * s).abs().max().item()

    assert apart(scale) <= 1e-12 and apart(other) > 1e-2


@PAIRINGS
@PRECISIONS
def test_a_picture_taken_beside_a_short_text_is_itself_beside_a_long_one(
    halves, dtype, bound
) -> None:
    """I48 with turned keys: what was recorded beside 2 text tokens, turned by 2 more, is the picture's own beside 4."""
    q, k, v = (rand(B, n, H * D, seed=s, dtype=dtype) for n, s in ((P, 1), (T + P, 2), (T + P, 3)))
    unmoved = k[:, T:]
    k = torch.cat((k[:, :T], placed(unmoved, at(T, 0, T / 2), halves)), 1)
    recorded = placed(unmoved, at(T - 2, 0, T / 2 - 1), halves)
    plain = sdpa_attend(q, k, v, H)

    def read(keys: Tensor) -> Tensor:
        tokens = ReferenceTokens(keys, v[:, T:], 3.0)
        return attend_picture(sdpa_attend, q, k, v, H, slice(T, T + P), [tokens], TextShare.KEPT)

    assert (read(turned(recorded, turn(halves), 2)) - plain).abs().max() <= bound
    assert (read(recorded) - plain).abs().max() > 1e-2


def test_heads_of_another_width_are_told() -> None:
    with pytest.raises(ValueError, match="20 channels.*heads of 8"):
        turned(torch.zeros(1, 2, 20), turn(False), 1.0)
