"""What it is to be refused in words: the file, the remedy, a sentence; and nothing else.

KINDRED_LONG=1: ten times as many damaged files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import folder_paths
import pytest
from effort import TooMuch, at_most
from remedy import REMEDY

CALLS = 1_000_000  # the most that one of them takes is 192 thousand, with a picture drawn
LONG = 10 if os.environ.get("KINDRED_LONG") == "1" else 1


def resident() -> float:
    """The most memory this process ever held, in MB."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1024 if sys.platform != "darwin" else 1 << 20
    )


def faults_of(act: Callable[[], Any], name: str = "") -> tuple[Any, str]:
    """What `act` gives and "", None and "" where it refuses in words, or None and what is wrong with how it ended."""
    try:
        with at_most(CALLS):
            made, said = act(), ""
    except TooMuch as error:
        return None, f"it hangs: {error}"
    except (ValueError, FileNotFoundError) as error:
        made, said = None, str(error)
        fits = (
            type(error) in (ValueError, FileNotFoundError)
            and name in said
            and REMEDY.search(said)
            and said.endswith(".")
        )
        if not fits or len(said) > 700 or str(folder_paths.base_path) in said:
            return None, f"no sentence: {type(error).__name__} {said[:400]!r}"
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error)[:300]!r}"
    return made, ""
