"""The API client against the real host, with the host's own nodes only."""

import struct
import time
import zlib

import pytest
from client import Client, HostError, NodeFailed, Progress, PromptRefused
from host_server import HostServer


def png(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """A plain RGB picture as a PNG file."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = (b"\0" + bytes(colour) * width) * height
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_the_pack_is_loaded(client):
    """Every node of the pack is on offer under its frozen id."""
    offered = client.object_info()
    assert "CheckpointLoaderSimple" in offered
    assert all(
        info["python_module"] == "custom_nodes.kindred"
        for name, info in offered.items()
        if name.startswith("Kindred")
    )


def test_a_picture_goes_in_and_comes_out(client):
    """Upload, load, save, view; progress names the nodes; a second run of the same prompt answers from the cache."""
    name = client.upload_image(png(16, 8, (200, 40, 90)), "plain.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "t"}},
    }
    seen: list[Progress] = []
    outputs = client.run(prompt, seen.append)
    picture = client.view(outputs["2"]["images"][0])
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", picture[16:24]) == (16, 8)
    assert {"1", "2"} <= {progress.node for progress in seen}
    assert "2" in client.run(prompt)


def test_a_refused_prompt_names_the_node_and_the_input(client):
    with pytest.raises(PromptRefused) as refused:
        client.run(
            {
                "7": {"class_type": "LoadImage", "inputs": {"image": "missing.png"}},
                "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
            }
        )
    assert "missing.png" in str(refused.value) and "7" in refused.value.nodes


def test_an_unknown_node_is_refused(client):
    with pytest.raises(PromptRefused, match="NoSuchNode"):
        client.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_a_failing_node_gives_its_own_sentence_and_the_server_lives_on(client):
    name = client.upload_image(b"not a picture", "broken.png")
    with pytest.raises((NodeFailed, PromptRefused)) as failed:
        client.run(
            {
                "1": {"class_type": "LoadImage", "inputs": {"image": name}},
                "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
            }
        )
    assert "broken.png" in str(failed.value)
    assert client.object_info("LoadImage")


def test_without_a_websocket_it_polls(client, monkeypatch):
    monkeypatch.setattr(
        "client.WebSocket.__init__",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError("refused")),
    )
    outputs = client.run(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 7},
            },
            "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
        }
    )
    assert outputs["2"]["images"]


def test_a_line_that_closes_late_takes_no_progress_from_a_newer_one(client):
    """The host drops whatever line an id has when one of that id closes, as the last run's does while the next one starts."""
    late, seen = client.websocket(), []

    def hang_up(progress: Progress) -> None:
        if not seen:
            late.close()
            time.sleep(0.5)
        seen.append(progress)

    slow = {
        "class_type": "ImageScale",
        "inputs": {"upscale_method": "lanczos", "width": 4096, "height": 4096, "crop": "disabled"},
    }
    chain = {
        str(key): slow
        | {"inputs": slow["inputs"] | {"image": [str(key - 1), 0], "width": 4096 - key}}
        for key in range(2, 8)
    }
    client.run(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 9},
            },
            **chain,
            "8": {"class_type": "PreviewImage", "inputs": {"images": ["7", 0]}},
        },
        hang_up,
    )
    assert {"7", "8"} <= {progress.node for progress in seen}


def test_no_server_is_a_sentence():
    with pytest.raises(HostError, match="does not answer"):
        Client("http://127.0.0.1:9").object_info()


def test_a_host_that_cannot_start_shows_its_log(server, tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('no such torch')")
    with pytest.raises(HostError, match="no such torch"), HostServer(tmp_path, cpu=True):
        pass
