"""Work that is counted instead of timed."""

import sys

import pytest
from effort import TooMuch, at_most


def test_what_does_not_end_is_stopped_at_its_count():
    done = []
    with pytest.raises(TooMuch, match="more than 1000 calls"), at_most(1000):
        while True:
            done.append(len(done))
    assert 400 < len(done) <= 500 and sys.getprofile() is None


def test_what_does_less_is_left_alone():
    with at_most(1000):
        assert sorted(map(str, range(100)))[:2] == ["0", "1"]
    assert sys.getprofile() is None
