"""tools/client/automate.py as its user starts it, without a package, against real hosts: one subject on two of them, Ctrl-C, a restart.

The subject has five steps, so that making it and drawing with it is quick.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from archive import files
from automate import parse
from changes import (
    Change,
    find_place,
    parse_change,
    picture_place,
    read_workflow,
    subject_place,
    typed,
)
from checkout import ROOT
from host_server import HostServer
from PIL import Image

LOAD, PROMPTS, SAMPLER = "9", "2", "6"  # story_more_pictures
WORKFLOWS = ROOT / "workflows" / "api"
STEPS = 5  # a divisor of 1000: ddim_uniform then has as many steps as asked for
LIMIT = 900  # seconds: a busy machine is no failure
SAMPLING = ["--set", f"{SAMPLER}.steps={STEPS}", "--set", f"{SAMPLER}.scheduler=ddim_uniform"]
MANY = "\n".join(
    ["dog in the snow", "dog in the city"] * 4
)  # so that a prompt is still sampled when it is stopped
posix = pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")


def start(workflow: Path | str, *words: object) -> subprocess.Popen:
    path = workflow if isinstance(workflow, Path) else WORKFLOWS / f"{workflow}.json"
    return subprocess.Popen(
        [
            sys.executable,
            "-E",
            "-s",
            "-S",
            str(ROOT / "tools" / "client" / "automate.py"),
            str(path),
            "--json",
            *map(str, words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(program: subprocess.Popen, code: int = 0) -> tuple[dict, str]:
    """Its report and what it said; it has to end with `code`."""
    try:
        out, err = program.communicate(timeout=LIMIT)
    finally:
        program.kill()
    assert program.returncode == code and "Traceback" not in err, err
    return json.loads(out), err


def automated(workflow: Path | str, *words: object, code: int = 0) -> tuple[dict, str]:
    return ended(start(workflow, *words), code)


def until(true) -> None:
    end = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def pictures(job: dict) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in job["files"] if path.endswith(".png")]


@dataclass
class Other:
    """A second host on this machine, whose models may also lie in a folder that it shares; it can be killed and started again."""

    base: Path
    shared: Path

    def __post_init__(self) -> None:
        self.shared.mkdir()
        config = self.base.parent / "paths.yaml"
        config.write_text(
            f"shared:\n  base_path: {self.shared}\n  kindred_references: .\n", "utf-8"
        )
        self.words = {
            "cpu": True,
            "threads": 1,
            "arguments": ["--extra-model-paths-config", str(config)],
        }
        self.server = HostServer(base=self.base, **self.words)
        self.server.__enter__()

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait()

    def again(self) -> None:
        self.server.__exit__(None, None, None)
        self.server = HostServer(base=self.base, port=self.server.port, **self.words)
        self.server.__enter__()


@pytest.fixture(scope="module")
def other(server, tmp_path_factory) -> Iterator[Other]:
    folder = tmp_path_factory.mktemp("other")
    running = Other(folder / "base", folder / "shared")
    try:
        yield running
    finally:
        running.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def subject(server, tmp_path_factory) -> Path:
    """A dog, made by the first host, saved there, and fetched by the program."""
    report, _ = automated(
        "story_save_subject",
        "--server",
        server.url,
        "--out",
        tmp_path_factory.mktemp("subject"),
        *SAMPLING,
    )
    [file] = [path for path in report["jobs"][0]["files"] if path.endswith(".safetensors")]
    texts = [
        Path(path).read_text("utf-8")
        for path in report["jobs"][0]["files"]
        if path.endswith(".txt")
    ]
    assert (
        any(text.startswith("kindred/subject_0") for text in texts)
        and len(pictures(report["jobs"][0])) >= 2
    )
    return Path(file)


def references(client) -> list[str]:
    return client.object_info("KindredLoadReference")["KindredLoadReference"]["input"]["required"][
        "file"
    ][1]["options"]


@pytest.fixture(scope="module")
def story(server, other, subject, tmp_path_factory) -> list[dict]:
    """Two pictures with that subject, one drawn by each host."""
    lines = [
        word
        for line in ("dog in the snow", "dog in the city")
        for word in ("--each", f"{PROMPTS}.prompts={line}")
    ]
    words = ["--subject", subject, *lines, *SAMPLING]
    hosts = ["--server", server.url, "--server", other.server.url]
    report, said = automated(
        "story_more_pictures", *words, *hosts, "--out", tmp_path_factory.mktemp("both")
    )
    assert {job["server"] for job in report["jobs"]} == {server.url, other.server.url}, said
    assert (
        all(url[7:] in said for url in (server.url, other.server.url))
        and "Sample with the subject's steps" in said
    )
    before = references(server.client)
    [name] = {name for name in before if name.startswith(subject.stem)} & set(
        references(other.server.client)
    )
    alone, _ = automated(
        "story_more_pictures",
        *words,
        "--server",
        server.url,
        "--out",
        tmp_path_factory.mktemp("alone"),
    )
    assert references(server.client) == before  # the same contents are not sent twice
    assert (server.base / "output" / "kindred" / name).read_bytes() == subject.read_bytes()
    return [report["jobs"], alone["jobs"]]


def test_the_other_host_draws_what_this_one_would_have_drawn(story, other):
    """Bit for bit: the subject arrived whole, and nothing of a picture depends on who else draws."""
    both, alone = story
    assert (
        other.server.url in [job["server"] for job in both]
        and len({job["server"] for job in alone}) == 1
    )
    for one, same in zip(both, alone, strict=True):
        assert one["lines"] == same["lines"] and len(pictures(one)) == 1
        assert (pictures(one)[0] == pictures(same)[0]).all()
    assert np.abs(pictures(both[0])[0].astype(int) - pictures(both[1])[0]).mean() > 1


@posix
def test_ctrl_c_interrupts_its_own_prompt_and_the_next_one_runs(client, server, subject, tmp_path):
    """In mid-run, with someone else's prompt waiting behind it: that one runs, the queue is empty, and so does our next."""
    theirs = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 7},
        },
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    program = start(
        "story_more_pictures",
        "--server",
        server.url,
        "--out",
        tmp_path,
        "--repeat",
        "2",
        "--seed",
        "100",
        "--set",
        f"{PROMPTS}.prompts={MANY}",
    )
    while "Let them look" not in (
        line := program.stderr.readline()
    ):  # the next node is the sampler
        assert line, "it ended"
    waiting = client.queue(theirs)
    program.send_signal(signal.SIGINT)
    report, said = ended(program, 130)
    assert "job 1 was interrupted; no other prompt was touched" in said
    assert [job["state"] for job in report["jobs"]] == ["cancelled", "not run"] and not list(
        tmp_path.iterdir()
    )
    until(lambda: client.state(waiting) == "completed")
    assert client.state(report["jobs"][0]["prompt_id"]) == "cancelled"
    queue = client.json("/queue")
    assert not queue["queue_running"] and not queue["queue_pending"]
    words = ["--subject", subject, "--set", f"{PROMPTS}.prompts=dog in the forest", *SAMPLING]
    [job] = automated("story_more_pictures", *words, "--server", server.url, "--out", tmp_path)[0][
        "jobs"
    ]
    assert len(pictures(job)) == 1


@posix
def test_ctrl_c_takes_a_waiting_prompt_out_of_the_queue(client, server, tmp_path):
    """Behind someone else's long prompt, which goes on."""
    graph = json.loads((WORKFLOWS / "story_more_pictures.json").read_text("utf-8"))
    graph[SAMPLER]["inputs"]["seed"], graph[PROMPTS]["inputs"]["prompts"] = 200, MANY
    theirs = client.queue(graph)
    until(lambda: client.state(theirs) == "in_progress")
    program = start(
        "story_more_pictures", "--server", server.url, "--out", tmp_path, "--seed", "201"
    )
    until(lambda: client.json("/queue")["queue_pending"])
    program.send_signal(signal.SIGINT)
    said = ended(program, 130)[1]
    assert "taken out of the queue" in said and not client.json("/queue")["queue_pending"]
    assert client.state(theirs) == "in_progress"
    assert (
        client.cancel(theirs, LIMIT) == "cancelled" and not client.json("/queue")["queue_running"]
    )


def test_a_host_that_is_killed_and_started_again_ends_the_job(other, subject, story, tmp_path):
    """The restarted host knows nothing of the prompt: it gets it again under the same id, and draws the same picture.

    Here the subject is not sent: it lies in a folder that extra_model_paths.yaml names, as large ones do.
    """
    (other.shared / "shared.safetensors").write_bytes(subject.read_bytes())
    assert "shared.safetensors" in references(other.server.client)
    other.server.client.free()  # else it knows the picture already
    program = start(
        "story_more_pictures",
        "--server",
        other.server.url,
        "--out",
        tmp_path,
        "--set",
        f"{LOAD}.file=shared.safetensors",
        "--set",
        f"{PROMPTS}.prompts=dog in the snow",
        *SAMPLING,
    )
    while "Let them look" not in (line := program.stderr.readline()):
        assert line, "it ended"
    other.kill()
    other.again()
    report, said = ended(program)
    [job] = report["jobs"]
    assert job["posts"] == 2 and "is back" in said and "forgot job 1" in said
    assert other.server.client.state(job["prompt_id"]) == "completed"
    assert (pictures(job)[0] == pictures(story[0][0])[0]).all()


def test_pictures_go_up_by_the_nodes_title_and_no_others_are_lost(client, server, tmp_path):
    """Two pictures of one name from two folders: both arrive, and both stay in the host's input folder."""
    graph = {
        "1": {
            "class_type": "KindredLoadPhoto",
            "inputs": {"image": "other.png"},
            "_meta": {"title": "Photo. Mine"},
        },
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "a/b"},
            "_meta": {"title": "Pictures"},
        },
    }
    (tmp_path / "w.json").write_text(json.dumps({"prompt": graph}), "utf-8")
    for colour in ("red", "blue"):
        path = tmp_path / colour / "my photo.png"
        path.parent.mkdir()
        Image.new("RGB", (16, 8), colour).save(path)
        report, _ = automated(
            tmp_path / "w.json",
            "--server",
            server.url,
            "--image",
            f"photo. mine={path}",
            "--out",
            tmp_path / "out",
        )
        assert (pictures(report["jobs"][0])[0] == np.asarray(Image.open(path))).all()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00001_Pictures_1.png",
        "00002_Pictures_1.png",
    ]
    report, said = automated(
        tmp_path / "w.json",
        "--server",
        server.url,
        "--set",
        "Pictures.images=red",
        "--out",
        tmp_path / "out",
        code=2,
    )
    assert "takes a connection of type IMAGE" in said and not client.json("/queue")["queue_running"]


def documented() -> list[list[str]]:
    """The words of every automate.py command that the documentation shows."""
    commands = []
    for page in files(".md"):
        for block in re.findall(r"```\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [
                shlex.split(line)[2:]
                for line in lines
                if line.startswith("python3 tools/client/automate.py")
            ]
    return commands


def test_the_documented_commands_fit_the_shipped_workflows(client):
    """Every node, input and value of them; the files and hosts in them are the reader's."""
    info, commands = client.object_info(), documented()
    assert len(commands) >= 6
    for words in commands:
        given = parse(words)
        graph = read_workflow(ROOT / given.workflow)
        for change in (parse_change(graph, word) for word in given.set):
            typed(info, graph, change)
        for word in given.each:
            typed(info, graph, Change(find_place(graph, word.partition("=")[0]), "a line"))
        for word in given.image:
            picture_place(info, graph, word.partition("=")[0])
        if given.subject:
            subject_place(graph, None)
