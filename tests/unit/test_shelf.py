"""What a run gave, as tools/client keeps it."""

import pytest
from jobs import Job
from shelf import Shelf, files_of


def test_pictures_that_load_reference_shows_are_no_result():
    graph = {
        "1": {"class_type": "KindredLoadReference", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {}},
    }
    shown, saved = (
        {"images": [{"filename": f"{name}.png", "subfolder": "", "type": kind}]}
        for name, kind in (("subject", "temp"), ("drawn", "output"))
    )
    results = list(files_of(graph, {"1": shown | {"text": ["a cat"]}, "2": saved}))
    assert results == [("KindredLoadReference", 1, "a cat"), ("SaveImage", 1, saved["images"][0])]


def test_nothing_is_ever_overwritten(tmp_path):
    """Numbers count on; a name that someone took meanwhile is passed over; a write that fails leaves nothing."""
    (tmp_path / "00007_mine_1.png").write_bytes(b"mine")
    shelf = Shelf(tmp_path)
    (tmp_path / "00008_A_title_1.png").write_bytes(b"theirs")
    assert shelf.keep(Job(1), "A title?", 1, ".png", b"new").endswith("00008_A_title_2.png")
    assert (tmp_path / "00008_A_title_1.png").read_bytes() == b"theirs"
    with pytest.raises(OSError, match="could not be written"):
        Shelf(tmp_path / "more").keep(Job(1), "x", 1, "/none/p.png", b"")


def test_a_name_that_another_process_took_at_the_last_moment_is_passed_over(tmp_path, monkeypatch):
    """Between looking and making: theirs stays, and ours gets the next number."""
    shelf, made, taken = Shelf(tmp_path), type(tmp_path).open, tmp_path / "00001_A_title_1.png"

    def late(path, *how, **more):
        if path == taken and not taken.exists():
            with open(taken, "wb") as theirs:
                theirs.write(b"theirs")
        return made(path, *how, **more)

    monkeypatch.setattr(type(tmp_path), "open", late)
    assert shelf.keep(Job(1), "A title", 1, ".png", b"ours").endswith("00001_A_title_2.png")
    assert (
        taken.read_bytes() == b"theirs"
        and (tmp_path / "00001_A_title_2.png").read_bytes() == b"ours"
    )
