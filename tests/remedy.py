"""The words by which a refusal says what to do."""

from __future__ import annotations

import re

REMEDY = re.compile(
    r"\b(again|Choose|Correct|Encode|Give|Lower|Use|Update|Raise|Remove|Rename|Shorten|Show|Start|Make|Wire|Write|Take)\b"
)
