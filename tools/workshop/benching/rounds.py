"""Rounds of pairs, and what they say: plain, A, plain, B, plain, each case beside the plain runs before and behind it.

What drifts or is gone again within a few runs meets both of a pair. The first round is thrown away, and no other: what another
program did to the machine shows in the standard error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benching.catalogue import CASES, PLAIN, Key

QUIET = 0.15  # plain's own spread up to which nothing else used the machine


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


@dataclass(frozen=True)
class Pair:
    """A case, and plain of as many pictures right before and right behind it."""

    case: Lap
    plain: tuple[Lap, Lap]

    @property
    def beside(self) -> float:
        """Seconds of the plain runs, mean."""
        return statistics.fmean(lap.total for lap in self.plain)


Job = Callable[[], Lap]
Round = Mapping[Key, Pair]


@dataclass(frozen=True)
class Played:
    """The rounds that were finished; stopped: by hand, before all were."""

    rounds: tuple[Round, ...]
    stopped: bool = False


def play(jobs: Mapping[Key, Job], rounds: int, tell: Callable[[int, Key], None]) -> Played:
    """Every case once per round, in their order, among plain runs; one round more before them warms up and does not count.

    jobs: plain's of every number of pictures among them; cases of one number follow one another.
    """
    finished: list[Round] = []
    try:
        for turn in range(rounds + 1):
            pairs = play_round(jobs, lambda key, turn=turn: tell(turn, key))
            if turn:
                finished.append(pairs)
    except KeyboardInterrupt:
        return Played(tuple(finished), True)
    return Played(tuple(finished))


def play_round(jobs: Mapping[Key, Job], tell: Callable[[Key], None]) -> Round:
    def lap(key: Key) -> Lap:
        tell(key)
        return jobs[key]()

    pairs: dict[Key, Pair] = {}
    plain, before = None, None
    for key in jobs:
        if key[0] == PLAIN:
            continue
        if plain != (PLAIN, key[1]):
            plain = (PLAIN, key[1])
            before = lap(plain)
        mine, behind = lap(key), lap(plain)
        pairs[key], before = Pair(mine, (before, behind)), behind
    return pairs


@dataclass(frozen=True)
class Spread:
    """What several rounds gave."""

    median: float
    least: float
    most: float
    error: float | None = None  # standard error of the mean; None of one round

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        if not values:
            raise ValueError("a spread of 0 rounds: at least 1 has to be finished")
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return Spread(statistics.median(values), min(values), max(values), error)

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
    def quiet(self) -> bool:
        """Whether plain itself took the same time in every round."""
        return self.plain_spread <= QUIET

    @property
    def memory(self) -> float | None:
        return self.peak / self.plain_peak if self.peak and self.plain_peak else None


def table(rounds: Sequence[Round], family: str) -> list[Row]:
    """A row per case. Each of its ratios is within one pair."""
    return [row_of(key, [pairs[key] for pairs in rounds], family) for key in rounds[0]]


def row_of(key: Key, pairs: Sequence[Pair], family: str) -> Row:
    """Of one case, its pair of every round."""
    first, plain = pairs[0].case, [lap for pair in pairs for lap in pair.plain]
    steps = sum(plain[0].calls)
    fifty = CASES[key[0]].calls_on(family)

    def stretched(lap: Lap) -> float:  # each part's seconds per call, times its calls at 50 steps
        return sum(s * at_50 / calls for s, at_50, calls in zip(lap.seconds, fifty, lap.calls))

    own = Spread.of([pair.beside for pair in pairs])
    peaks = [[lap.peak for lap in laps if lap.peak] for laps in ([p.case for p in pairs], plain)]
    return Row(
        *key,
        Spread.of([pair.case.total / pair.beside for pair in pairs]),
        Spread.of([stretched(pair.case) / (pair.beside * 50 / steps) for pair in pairs]).median,
        Spread.of([pair.case.total for pair in pairs]).median,
        own.median,
        own.relative,
        sum(first.calls),
        steps,
        first.rows,
        plain[0].rows,
        all(pair.case.finite for pair in pairs),
        *(max(p, default=None) for p in peaks),
    )
