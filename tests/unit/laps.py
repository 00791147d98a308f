"""Rounds that nobody measured: what the laws of tools/workshop/bench.py are said in."""

from __future__ import annotations

from benching.ground import Setting
from benching.rounds import Lap, Pair

SETTING = Setting("sd15", 64, 2, "fp32", "cpu", "pytorch", 1, 0.25)
SOFTWARE = {"host": "0.30.0", "torch": "2.11", "python": "3.13", "machine": "a machine"}


def lap(seconds, calls=2, rows=4, **more):
    many = isinstance(seconds, tuple)
    return Lap(
        seconds if many else (seconds,),
        calls if isinstance(calls, tuple) else (calls,),
        rows,
        **more,
    )


def pair(case, plain):
    """A case between two plain runs that took equally long."""
    return Pair(case, (plain, plain))


def rounds_of(plain, cached, **more):
    return [{("cached", 1): pair(lap(b, **more), lap(a))} for a, b in zip(plain, cached)]
