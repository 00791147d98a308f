"""Laws of names that several processes want at once: each gets one of its own, and nobody takes what a living one is writing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kindred.models.claims import dead, first_free, hold, release
from kindred.models.files import whole

ROOT = Path(__file__).resolve().parents[2]
HEAD = f"import sys; sys.path.insert(0, {str(ROOT / 'tools' / 'workshop')!r}); from checkout import as_kindred; as_kindred()\n"
SAVES = (
    HEAD
    + """
from itertools import count
from pathlib import Path
from kindred.models.claims import first_free
from kindred.models.files import whole
folder, who = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for i in range(40):
    with first_free(folder / f"cat_{n:05}_.safetensors" for n in count(1)) as path, whole(path) as partial:
        partial.write_text(f"{who} {i}")
"""
)
DIES = (
    HEAD
    + """
import os
from pathlib import Path
from kindred.models.claims import hold
from kindred.models.files import whole
with whole(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
    os._exit(9)
"""
)


def child(program: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_three_processes_with_forty_saves_each_leave_all_of_them(tmp_path: Path) -> None:
    saving = [child(SAVES, str(tmp_path), who) for who in "abc"]
    assert [process.stdout.readline() for process in saving] == ["ready\n"] * 3
    for process in saving:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in saving] == [0, 0, 0]
    for process in saving:
        process.stdin.close()
        process.stdout.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"cat_{n:05}_.safetensors" for n in range(1, 121)
    ]
    assert {p.read_text() for p in tmp_path.iterdir()} == {
        f"{who} {i}" for who in "abc" for i in range(40)
    }


def test_what_a_living_process_writes_stays_and_what_it_left_dead_goes(tmp_path: Path) -> None:
    path = tmp_path / "cat.safetensors"
    other = child(DIES, str(path))
    assert other.stdout.readline() == "writing\n"
    with whole(path) as partial:
        partial.write_text("ours")
    assert len(list(tmp_path.glob(".*.partial/file.partial"))) == 1 and path.read_text() == "ours"
    other.communicate("die\n")
    assert len(list(tmp_path.glob(".*.partial/file.partial"))) == 1
    with whole(path) as partial:
        partial.write_text("again")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_name_is_held_once_and_given_back(tmp_path: Path) -> None:
    claim = tmp_path / ".cat.claim"
    handle = hold(claim)
    assert handle is not None and hold(claim) is None and not dead(claim)
    release(claim, handle)
    assert dead(claim) and not claim.exists()


def test_what_a_dead_process_held_is_free(tmp_path: Path) -> None:
    claim = tmp_path / ".cat_1.claim"
    claim.touch()  # nobody has locked it
    with first_free([tmp_path / "cat_1"]) as path:
        assert path.name == "cat_1" and claim.exists()
    assert not list(tmp_path.iterdir())


def test_a_name_that_changed_hands_while_it_was_looked_at_stays_with_its_new_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder let go between our opening and our locking, and another took it: the file that we locked is no longer there."""
    from kindred.models import claims

    claim, lock = tmp_path / ".cat.claim", claims._lock
    first, others = hold(claim), []
    assert first is not None

    def late(handle: int) -> bool:
        if not others:
            others.append(None)
            release(claim, first)
            others[0] = hold(claim)
        return lock(handle)

    monkeypatch.setattr(claims, "_lock", late)
    assert not dead(claim) and claim.exists() and others[0] is not None
    monkeypatch.undo()
    assert not dead(claim)
    release(claim, others[0])


def test_a_name_that_is_taken_or_held_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "1").touch()
    with (
        first_free([tmp_path / n for n in "123"]) as two,
        first_free([tmp_path / n for n in "123"]) as three,
    ):
        assert (two.name, three.name) == ("2", "3")
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_disk_without_locks_leaves_the_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it cannot be known who lives."""
    from kindred.models import claims

    def refuse(handle: int) -> bool:
        raise OSError("no locks here")

    monkeypatch.setattr(claims, "_lock", refuse)
    handle = hold(tmp_path / ".cat.claim")
    assert (
        handle is not None
        and hold(tmp_path / ".cat.claim") is None
        and not dead(tmp_path / ".cat.claim")
    )
    os.close(handle)


def test_a_name_that_another_took_for_a_dead_ones_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our making of the file and our locking of it another process locked and removed it: what we lock has no name any more."""
    from kindred.models import claims

    claim, lock = tmp_path / ".cat.claim", claims._lock

    def late(handle: int) -> bool:
        if claim.exists():
            claim.unlink()
        return lock(handle)

    monkeypatch.setattr(claims, "_lock", late)
    assert hold(claim) is None and not claim.exists()


def test_what_was_written_while_we_waited_for_the_name_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kindred.models import claims

    own = claims.hold

    def late(claim: Path) -> int | None:
        (tmp_path / "1").write_text("theirs")
        return own(claim)

    monkeypatch.setattr(claims, "hold", late)
    with first_free([tmp_path / "1", tmp_path / "2"]) as path:
        assert path.name == "2" and (tmp_path / "1").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]


def test_a_claim_that_may_not_be_opened_is_somebodys(tmp_path: Path) -> None:
    """A folder of that name stands for whatever the system does not open."""
    (tmp_path / ".cat.claim").mkdir()
    assert not dead(tmp_path / ".cat.claim") and dead(tmp_path / ".dog.claim")
    with first_free([tmp_path / "cat", tmp_path / "dog"]) as path:
        assert path.name == "dog"
