"""Interleaved rounds, and what they say: A B C A B C, the first thrown away, each ratio within its own round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benching.catalogue import CASES, PLAIN, Key

LIMIT = 0.15  # plain's own spread above which its ratios say nothing


@dataclass(frozen=True)
class Lap:
    """One run of a job: seconds, UNet calls and rows of each of its parts."""

    seconds: tuple[float, ...]
    calls: tuple[int, ...]
    rows: int = 0  # of all calls together
    peak: int | None = None  # bytes
    finite: bool = True

    @property
    def total(self) -> float:
        return sum(self.seconds)


Job = Callable[[], Lap]
Round = Mapping[Key, Lap]


@dataclass(frozen=True)
class Played:
    """The rounds that were finished; stopped: by hand, before all were."""

    rounds: tuple[Round, ...]
    stopped: bool = False


def play(jobs: Mapping[Key, Job], rounds: int, tell: Callable[[int, Key], None]) -> Played:
    """Every job once per round, in their order; one round more before them warms up and does not count."""
    finished: list[Round] = []
    try:
        for turn in range(rounds + 1):
            laps: dict[Key, Lap] = {}
            for key, job in jobs.items():
                tell(turn, key)
                laps[key] = job()
            if turn:
                finished.append(laps)
    except KeyboardInterrupt:
        return Played(tuple(finished), True)
    return Played(tuple(finished))


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    median: float
    least: float
    most: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread of 0 rounds: at least 1 has to be finished")
        return Spread(statistics.median(values), min(values), max(values))

    @property
    def relative(self) -> float:
        """From the least to the most, in medians."""
        return (self.most - self.least) / self.median if self.median else 0.0


@dataclass(frozen=True)
class Row:
    """One case of the table, beside plain with as many pictures."""

    case: str
    pictures: int
    ratio: Spread
    at_50: float  # the same if 50 steps had run: each part's time by its calls then
    seconds: float  # median
    plain_seconds: float
    plain_spread: float
    calls: int
    plain_calls: int
    rows: int  # of all UNet calls
    plain_rows: int
    finite: bool
    peak: int | None = None
    plain_peak: int | None = None

    @property
    def rejected(self) -> bool:
        return self.plain_spread > LIMIT

    @property
    def memory(self) -> float | None:
        return self.peak / self.plain_peak if self.peak and self.plain_peak else None


def table(rounds: Sequence[Round]) -> list[Row]:
    """A row per case. Each of its ratios is within one round, against plain of the same batch."""
    return [row_of(rounds, key) for key in rounds[0] if key[0] != PLAIN]


def row_of(rounds: Sequence[Round], key: Key) -> Row:
    mine, plain = [laps[key] for laps in rounds], [laps[PLAIN, key[1]] for laps in rounds]
    steps = sum(plain[0].calls)
    fifty = CASES[key[0]].calls

    def stretched(
        lap: Lap,
    ) -> float:  # each part's seconds per call, times its calls at fifty steps
        return sum(s * at_50 / calls for s, at_50, calls in zip(lap.seconds, fifty, lap.calls))

    own = Spread.of([lap.total for lap in plain])
    peaks = [[lap.peak for lap in laps if lap.peak] for laps in (mine, plain)]
    return Row(
        *key,
        Spread.of([a.total / b.total for a, b in zip(mine, plain)]),
        Spread.of([stretched(a) / (b.total * 50 / steps) for a, b in zip(mine, plain)]).median,
        Spread.of([lap.total for lap in mine]).median,
        own.median,
        own.relative,
        sum(mine[0].calls),
        steps,
        mine[0].rows,
        plain[0].rows,
        all(lap.finite for lap in mine),
        *(max(p, default=None) for p in peaks),
    )
