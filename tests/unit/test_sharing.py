"""One gather for all pictures is what each picture would read by itself."""

from __future__ import annotations

import pytest
import torch
from kindred.models.attention.parts import attend_sharing, beside_others
from kindred.models.attention.sharing import Gathers, Sharing
from kindred.models.network.call import AttnCall, Part, Role
from kindred.models.run import Run
from kindred.models.story.plan import shared_groups
from small_attention import sdpa_attend

GRID, B, C, H = (3, 4), 4, 8, 2
N = GRID[0] * GRID[1]
CPU = torch.device("cpu")
LAW = pytest.mark.parametrize


def scene(roles, shared, anchors, weight):
    """A call of all roles, its Sharing, and what each group of pictures reads: other lengths for every group."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, len(roles) * B, N, C, generator=generator)
    groups = [who for who, read in shared_groups(B, anchors)]
    reads = {
        who: torch.randperm(B * N, generator=generator)[: 3 + i]
        for i, (who, read) in enumerate(shared_groups(B, anchors))
        if read
    }
    call = AttnCall(("output", 1, 0), GRID, tuple(map(Part, roles)), (6, 8))
    gather = Gathers(B, weight, CPU).of(GRID, len(shared), groups, reads, torch.float32)
    return call, Sharing(shared, gather, weight), reads, q, k, v


@LAW("weight", [1.0, 0.3, 2.0])
@LAW("anchors", [0, 1, 2, 3])
@LAW(
    ("roles", "shared"),
    [
        ((Role.COND,), (0,)),
        ((Role.UNCOND, Role.COND), (1,)),
        ((Role.COND, Role.UNCOND), (0, 1)),
        ((Role.COND, Role.UNCOND, Role.COND), (0, 2)),
    ],
)
def test_every_picture_reads_its_own_and_what_its_group_reads(roles, shared, anchors, weight):
    call, sharing, reads, q, k, v = scene(roles, shared, anchors, weight)
    out = attend_sharing(call, sdpa_attend, q, k, v, H, sharing)
    for part in range(len(roles)):
        for i in range(B):
            row = slice(part * B + i, part * B + i + 1)
            heard = [
                index
                for (first, last), index in reads.items()
                if first <= i < last and part in shared
            ]
            index = torch.cat([torch.zeros(0, dtype=torch.long), *heard])
            keys, values = (
                torch.cat((t[row], t[part * B : (part + 1) * B].flatten(0, 1)[index][None]), 1)
                for t in (k, v)
            )
            bias = torch.cat((torch.zeros(N), torch.full((len(index),), weight).log()))
            torch.testing.assert_close(
                out[row],
                sdpa_attend(q[row], keys, values, H, bias[None, None, None]),
                atol=1e-6,
                rtol=1e-6,
            )


@LAW("anchors", [0, 2])
def test_beside_other_references_it_says_the_same(anchors):
    call, sharing, reads, q, k, v = scene((Role.UNCOND, Role.COND), (0, 1), anchors, 2.0)
    found = beside_others(sharing, call, k, v)
    assert [r.pictures for r in found] == list(reads)

    class Told:
        def concerns(self, _):
            return True

        def references(self, *_):
            return self.found

    run, told = Run(sites={call.block: None}), Told()
    run.active = [told]
    told.found = [sharing]
    alone = run.attend(call, sdpa_attend, q, k, v, H)
    told.found = found
    torch.testing.assert_close(
        run.attend(call, sdpa_attend, q, k, v, H), alone, atol=1e-6, rtol=1e-6
    )


def test_positions_are_made_once_per_step_and_dtype():
    made = Gathers(B, 0.5, CPU)
    groups, reads = [(0, B)], {(0, B): torch.arange(3)}
    first = made.of(GRID, 1, groups, reads, torch.float32)
    assert made.of(GRID, 1, groups, reads, torch.float32) is first
    assert made.of(GRID, 1, groups, reads, torch.bfloat16).biases[0].dtype == torch.bfloat16
    made.begin_step()
    assert made.of(GRID, 1, groups, reads, torch.float32) is not first
