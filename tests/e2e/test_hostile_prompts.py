"""Prompts as no canvas would send them, through the real server: each is answered, each that runs ends well or in words.

The mutants come from the shipped workflows and from every node alone, by number: the same ones on every machine. Most are refused by
the host before anything runs; 150 hold only what the host takes (the ends of every range, NaN, odd sizes, other wires of the type) and run
on the miniature at 64 pixels with 2 steps. KINDRED_LONG=1: five times as many.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image
from prompt_mutants import Mutator, Prompt, small
from remedy import REMEDY

LONG = 5 if os.environ.get("KINDRED_LONG") == "1" else 1
THE_HOSTS = (
    "outside the output folder is not allowed",
)  # sentences of the host that reach the user through a node of ours
SENTENCES = (
    "ValueError",
    "FileNotFoundError",
    "OSError",
    "PermissionError",
)  # what a node of ours says is one of these


def post(client, prompt: Any) -> tuple[int, Any]:
    """Status and body of the host's answer; whatever it is, there is one."""
    body = prompt if isinstance(prompt, bytes) else json.dumps({"prompt": prompt}).encode()
    request = urllib.request.Request(
        client.url + "/prompt", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=120
        ) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        try:
            return error.code, json.loads(text)
        except ValueError:
            return error.code, text


def ended(client, timeout: float = 3000) -> None:
    end = time.monotonic() + timeout
    while client.json("/prompt")["exec_info"]["queue_remaining"]:
        assert time.monotonic() < end, "the queue does not come to an end"
        time.sleep(0.2)


def ours(frames: list[str]) -> bool:
    """Whether the innermost frame lies in the pack."""
    last = next((f for f in reversed(frames) if "File " in f), "")
    return "custom_nodes/kindred" in last.replace("\\", "/") or f"{ROOT}{os.sep}" in last


def fault_of_refusal(code: int, body: Any) -> str:
    """What is wrong with how the host refused, as far as it is ours."""
    if code == 400 and isinstance(body, dict):
        traces = [
            error.get("extra_info", {}).get("traceback", [])
            for node in body.get("node_errors", {}).values()
            for error in node.get("errors", [])
        ]
        return "our validation raised" if any(map(ours, traces)) else ""
    return (
        "" if code == 500 and "kindred" not in str(body) else f"answered {code}"
    )  # 500: what is no prompt at all


def by_our_sentence(body: Any) -> bool:
    """Whether every mistake that the host names is one that a node of the pack said in words."""
    return all(
        node["class_type"].startswith("Kindred")
        and all(
            error["type"] == "custom_validation_failed" and REMEDY.search(error["details"])
            for error in node["errors"]
        )
        for node in body["node_errors"].values()
    )


def fault_of_run(history: dict[str, Any] | None) -> tuple[str, str]:
    """How a run ended, and what is wrong with it."""
    if history is None:
        return "lost", "it left no trace"
    for kind, data in history["status"]["messages"]:
        if kind == "execution_error":
            said, name = data["exception_message"].strip(), data["exception_type"].split(".")[-1]
            words = f"{data['node_type']}: {name}: {said[:300]} {''.join(data['traceback'][-1:])[-200:]}"
            if data["node_type"].startswith("Kindred"):  # wherever in the end it was raised
                fits = (
                    name in SENTENCES
                    and len(said) <= 700
                    and REMEDY.search(said)
                    or any(word in said for word in THE_HOSTS)
                )
                return ("refused while it ran", "") if fits else ("failed", words)
            if name not in SENTENCES and ours(data["traceback"]):
                return "failed", words
            return "refused while it ran", ""
    return (
        ("drew", "")
        if history["status"]["status_str"] == "success"
        else ("failed", str(history["status"])[:300])
    )


def plain() -> Prompt:
    graph = small("self_attention_only")
    sampler = next(key for key, node in graph.items() if node["class_type"] == "KSampler")
    graph[sampler]["inputs"]["model"] = ["1", 0]
    return graph


def pixels(client, prompt: Prompt) -> list[np.ndarray]:
    """Drawn anew: another name of the file makes the host run it."""
    saves = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    client.free()
    images = client.run(prompt)[saves[0]]["images"]
    return [np.asarray(Image.open(BytesIO(client.view(i)))) for i in images]


@pytest.fixture(scope="module", autouse=True)
def the_server_is_as_it_was(server, client) -> Iterator[None]:
    """After all of this: the plain picture and an injected one, bit for bit, all nodes on offer, no file outside of the host's folders."""
    injected = small("personalize")
    before = pixels(client, plain()), pixels(client, injected), sorted(client.object_info())
    beside, files = set(server.base.parent.iterdir()), of(server.base)
    yield
    assert server.process.poll() is None
    after = pixels(client, plain()), pixels(client, injected), sorted(client.object_info())
    new = of(server.base) - files
    for path in new:  # the other tests count on their own
        if path.parts[0] != "user":
            (server.base / path).unlink()
    assert (
        all(
            np.array_equal(a, b)
            for one, other in zip(before[:2], after[:2])
            for a, b in zip(one, other)
        )
        and before[2] == after[2]
    )
    assert {path.parts[0] for path in new} <= {"output", "temp", "user", "models", "input"}, new
    assert {path.suffix for path in new if path.parts[0] == "models"} <= {
        ".safetensors",
        ".training",
    }, new
    assert not [
        path
        for path in set(server.base.parent.iterdir()) - beside
        if path.name.startswith(("x", "..", "cat"))
    ]


def of(base: Path) -> set[Path]:
    """Its files, without what is linked into it."""
    return {
        path.relative_to(base)
        for path in base.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def test_mutated_prompts_are_refused_or_end_in_words(client):
    mutator, fates, valid, faults, queued = (
        Mutator(client.object_info()),
        Counter(),
        Counter(),
        [],
        {},
    )
    start = time.monotonic()
    for prompt, words in mutator.mutants(1000 * LONG):
        code, body = post(client, prompt)
        if code == 200:
            queued[body["prompt_id"]] = words
            continue
        fates[f"refused, {code}"] += 1
        valid[f"refused, {code}"] += words.startswith("valid")
        fault = fault_of_refusal(code, body)
        if not fault and words.startswith("valid") and not by_our_sentence(body):
            fault = f"values that the host takes are refused: {body}"
        faults += [f"{words}: {fault}"] * bool(fault)
    print(f"answered after {time.monotonic() - start:.0f} s, {len(queued)} to run")
    ended(client)
    for key, words in queued.items():
        fate, fault = fault_of_run(client.history(key))
        fates[fate] += 1
        valid[fate] += words.startswith("valid")
        faults += [f"{words}: {fault}"] * bool(fault)
    print(dict(fates), "of these valid:", dict(valid), f"{time.monotonic() - start:.0f} s")
    assert not faults, "\n".join(faults)
    assert fates["refused, 400"] > 400 * LONG and fates["refused while it ran"] > 50 * LONG
    assert (
        valid["drew"] > 90 * LONG
        and valid["refused while it ran"] + valid["refused, 400"] > 10 * LONG
    )


BODIES = (
    b"{",
    b"[]",
    b"null",
    b"5",
    b'{"prompt": null}',
    b'{"prompt": []}',
    b'{"prompt": {}}',
    b'{"prompt": 5}',
    b"[" * 100_000,
    b'{"prompt": {"1": ' * 3000,
    b"\xff\xfe",
    b'{"prompt": {"1": {"class_type": "KindredLoadPhoto"}}}',
    b'{"prompt": {"1": {"class_type": "KindredSaveReference", "inputs": {"reference": 1e999, "filename_prefix": NaN}}}}',
)


def test_what_is_no_prompt_is_answered_too(client):
    for body in BODIES:
        code, answer = post(client, body)
        assert code in (200, 400, 500) and "kindred/nodes" not in str(answer), (
            body[:60],
            code,
            answer,
        )
    ended(client)


PICTURES = [
    ("1", (9, 7)),
    ("L", (9, 7)),
    ("LA", (9, 7)),
    ("P", (9, 7)),
    ("PA", (9, 7)),
    ("RGBA", (9, 7)),
    ("CMYK", (9, 7)),
    ("I;16", (9, 7)),
    ("I", (9, 7)),
    ("F", (9, 7)),
    ("YCbCr", (9, 7)),
    ("RGB", (1, 1)),
    ("RGB", (3, 5000)),
    ("RGB", (5000, 3)),
    ("RGBA", (1, 1)),
    ("L", (1, 700)),
    ("RGB", (333, 221)),
    ("gif", (20, 12)),
    ("webp", (20, 12)),
    ("transparent", (8, 8)),
    ("exif", (30, 10)),
]


def file_of(mode: str, size: tuple[int, int]) -> tuple[bytes, str]:
    """A picture of a mode as the file format that can hold it; gif and webp are animated, the second frame is of another colour."""
    rng, out = np.random.default_rng(0), BytesIO()
    colours = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    if mode in ("gif", "webp"):
        colours.save(
            out, mode, save_all=True, append_images=[Image.new("RGB", size, "red")] * 2, duration=50
        )
        return out.getvalue(), mode
    if mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        colours.save(out, "jpeg", exif=exif)
        return out.getvalue(), "jpg"
    if mode == "transparent":
        Image.new("RGBA", size, (0, 0, 0, 0)).save(out, "png")
        return out.getvalue(), "png"
    kind = {"CMYK": "tiff", "F": "tiff", "YCbCr": "jpeg", "PA": "tiff", "I": "tiff"}.get(
        mode, "png"
    )
    grey = colours.convert("L")
    made = {
        "I;16": lambda: Image.fromarray(np.asarray(grey).astype(np.uint16) * 200),
        "I": lambda: grey.convert("I"),
        "F": lambda: grey.convert("F"),
        "PA": lambda: colours.convert("P").convert("PA"),
    }.get(mode, lambda: colours.convert(mode))()
    made.save(out, kind)
    return out.getvalue(), {"jpeg": "jpg"}.get(kind, kind)


@pytest.mark.parametrize("loader", ["LoadImage", "KindredLoadPhoto"])
def test_pictures_of_any_mode_and_size(client, loader):
    """Read by an encoder, laid on a sheet and scored; or the loader says that it cannot, ours in words."""
    queued, fates, faults = {}, Counter(), []
    for number, (mode, size) in enumerate(PICTURES):
        data, ending = file_of(mode, size)
        name = client.upload_image(data, f"hostile_{number}.{ending}")
        told = {
            "strength": 1.0,
            "weight": 1.0,
            "weight_mode": "logit bias",
            "merge": "as trained",
            "blocks": "all",
            "start_percent": 0.2,
            "end_percent": 1.0,
            "halves": "both",
        }
        graph = {
            "1": {
                "class_type": "CheckpointLoaderSimple",
                "inputs": {"ckpt_name": "kindred_miniature.safetensors"},
            },
            "2": {"class_type": loader, "inputs": {"image": name}},
            "3": {
                "class_type": "KindredConceptEncoderLoad",
                "inputs": {"file": "kindred_miniature_concept.safetensors"},
            },
            "4": {
                "class_type": "KindredCrossAttnDetailInject",
                "inputs": {
                    "model": ["1", 0],
                    "concept_encoder": ["3", 0],
                    "image": ["2", 0],
                    **told,
                },
            },
            "5": {"class_type": "PreviewAny", "inputs": {"source": ["4", 0]}},
            "6": {
                "class_type": "KindredComparisonGrid",
                "inputs": {
                    "images.image0": ["2", 0],
                    "labels": "",
                    "captions": "",
                    "cell": 64,
                    "batches_as": "rows",
                },
            },
            "7": {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}},
            "8": {
                "class_type": "KindredConsistencyScore",
                "inputs": {"images": ["2", 0], "judge": "auto", "reference": ["2", 0]},
            },
        }
        code, body = post(client, graph)
        assert code == 200 and not body["node_errors"], body
        queued[body["prompt_id"]] = f"{mode} {size}"
    ended(client)
    for key, words in queued.items():
        history = client.history(key)
        fate, fault = fault_of_run(history)
        fates[fate] += 1
        faults += [f"{words}: {fault}"] * bool(fault)
        for kind, data in history["status"]["messages"]:
            if kind == "execution_error":
                said = data["exception_message"].strip()
                fits = data["node_type"] == loader and (
                    loader == "LoadImage" or "cannot be read" in said and "Upload" in said
                )
                faults += [f"{words}: {data['node_type']}: {said}"] * (not fits)
    print(loader, dict(fates))
    assert not faults, "\n".join(faults)
    assert fates["drew"] >= len(PICTURES) // 2
