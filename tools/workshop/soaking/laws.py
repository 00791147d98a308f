"""What a soak's readings say: does memory stay flat, does anything get slower, do the same seeds give the same pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

Late = tuple[
    Sequence["Reading"], Sequence["Reading"]
]  # of the old server and of a fresh one, in turns
WARM_UP = 0.1  # share of the rounds, at least one: libraries load, the allocator finds its size


@dataclass(frozen=True)
class Reading:
    """One prompt: its kind, the round it was sent in, the round whose seeds it had, what it cost and what the server held afterwards."""

    kind: str
    round: int
    number: int
    size: tuple[int, int]
    seconds: float  # on the clock
    worked: float  # of the server's processors; the same where the system does not tell
    resident: int  # bytes
    digest: str | None  # of the pictures, in their order; None where none were to come


@dataclass(frozen=True)
class Law:
    name: str
    kept: bool
    says: str


@dataclass(frozen=True)
class Memory:
    """Medians over the first, middle and last third of what came after the warm-up, in bytes; growth is of the greater of the two."""

    thirds: tuple[float, float, float]
    slope: float  # bytes for each hundred prompts: Theil and Sen's, which single peaks do not move

    @property
    def growth(self) -> float:
        return max(self.thirds[1:]) / self.thirds[0] - 1


def after_warm_up(readings: Sequence[Reading]) -> list[Reading]:
    rounds = 1 + max(r.round for r in readings)
    return [r for r in readings if r.round >= max(1, round(WARM_UP * rounds))]


def thirds(
    readings: Sequence[Reading],
) -> tuple[Sequence[Reading], Sequence[Reading], Sequence[Reading]]:
    n = len(readings) // 3
    return readings[:n], readings[n:-n], readings[-n:]


def memory(readings: Sequence[Reading]) -> Memory:
    held = [r.resident for r in after_warm_up(readings)]
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(held), 2)]
    n = len(held) // 3
    medians = tuple(statistics.median(part) for part in (held[:n], held[n:-n], held[-n:]))
    return Memory(medians, 100 * statistics.median(slopes))


def slowdown(readings: Sequence[Reading]) -> dict[str, tuple[float, float, float]]:
    """Kind -> median seconds of work in the first third and in the last, and their ratio, which is between prompts of one size."""
    first, _, last = thirds(after_warm_up(readings))
    medians = {}
    for kind in dict.fromkeys(r.kind for r in readings if r.digest):
        pairs = []
        for size in {r.size for r in readings}:
            early, late = (
                [r.worked for r in part if (r.kind, r.size) == (kind, size)]
                for part in (first, last)
            )
            if early and late:
                pairs.append((statistics.median(early), statistics.median(late)))
        if pairs:
            a, b = (statistics.mean(side) for side in zip(*pairs))
            medians[kind] = (a, b, b / a)
    return medians


def beside_fresh(
    old: Iterable[Reading], fresh: Iterable[Reading]
) -> dict[str, tuple[float, float, float]]:
    """Kind -> median seconds of work in the fresh server and in the old one in the same minutes, and their ratio."""
    sides = [[r for r in side if r.digest] for side in (fresh, old)]
    medians = {}
    for kind in dict.fromkeys(r.kind for r in sides[0]):
        a, b = (statistics.median(r.worked for r in side if r.kind == kind) for side in sides)
        medians[kind] = (a, b, b / a)
    return medians


def typical(ratios: Mapping[str, tuple[float, float, float]]) -> float:
    return statistics.median(ratio for *_, ratio in ratios.values())


def unlike(readings: Iterable[Reading], kinds: Iterable[str] | None = None) -> list[str]:
    """Kinds that gave other pictures for the same seeds; kinds: only these."""
    seen: dict[tuple[str, int], set[str]] = {}
    for r in readings:
        if r.digest and (kinds is None or r.kind in kinds):
            seen.setdefault((r.kind, r.number), set()).add(r.digest)
    return sorted({kind for (kind, _), digests in seen.items() if len(digests) > 1})


def judged(
    readings: Sequence[Reading],
    fresh: Sequence[Reading],
    late: Late | None,
    flat: float,
    slower: float,
) -> list[Law]:
    """Every law. fresh: what a new server gave for the first round's seeds; late: (old, new server) in turns at the end, where asked."""
    ends = [r for r in readings if r.number == 0]
    others = unlike(ends)
    unlike_fresh = unlike([*ends, *fresh], {r.kind for r in fresh})
    laws = [
        memory_is_flat(readings, flat),
        Law(
            "the same seeds, the same pictures",
            not others,
            sentence(ends, others, "in the first round and the last"),
        ),
        Law(
            "a fresh server draws the same",
            not unlike_fresh,
            sentence(fresh, unlike_fresh, "beside the first round"),
        ),
    ]
    return [*laws, nothing_gets_slower(readings, late, slower)] if late else laws


def memory_is_flat(readings: Sequence[Reading], flat: float) -> Law:
    held = memory(readings)
    mb = [value / 1e6 for value in held.thirds]
    return Law(
        "memory is flat",
        held.growth <= flat,
        f"{mb[0]:.0f}, {mb[1]:.0f}, {mb[2]:.0f} MB in thirds after the warm-up: "
        f"{100 * held.growth:+.2f} %, allowed {100 * flat:g} %; {held.slope / 1e6:+.2f} MB for each 100 prompts",
    )


def nothing_gets_slower(readings: Sequence[Reading], late: Late, slower: float) -> Law:
    since, beside = typical(slowdown(readings)), typical(beside_fresh(*late))
    return Law(
        "nothing gets slower",
        min(since, beside) <= slower,  # a busy machine is in the first alone
        f"the last third works {since:.3f} times as long as the first, the old server {beside:.3f} times as long as a "
        f"fresh one in the same minutes; allowed {slower:g} of either",
    )


def sentence(readings: Iterable[Reading], others: Sequence[str], where: str) -> str:
    return f"{len({r.kind for r in readings if r.digest})} kinds {where}" + (
        f"; others: {', '.join(others)}" if others else ""
    )
