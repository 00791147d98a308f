"""tools/client/automate.py against a host that only pretends: what is sent, refused and saved, Ctrl-C, and what the program needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from automating import GRAPH
from checkout import ROOT
from fake_host import FakeHost
from jobs import Board, Job

pytestmark = pytest.mark.usefixtures("hurried")


@pytest.fixture
def host():
    with FakeHost() as running:
        yield running


def test_changed_inputs_uploads_seeds_and_names(host, automated, tmp_path):
    """What is posted is the workflow with what was asked for and nothing else; what comes back is saved under new numbers."""
    (tmp_path / "my photo.png").write_bytes(b"\x89PNG")
    words = [
        "--set",
        "Draw it.steps=3",
        "--image",
        f"Photo={tmp_path / 'my photo.png'}",
        "--repeat",
        "2",
        "--seed",
        "41",
    ]
    code, report, said = automated(host, words=words)
    assert code == 0 and host.uploads == {"my photo.png": b"\x89PNG"} and "2 of 2 jobs done" in said
    for seed, graph in zip((41, 42), host.graphs, strict=True):
        assert graph == GRAPH | {
            "1": GRAPH["1"] | {"inputs": {"image": "my photo.png"}},
            "2": GRAPH["2"] | {"inputs": {"prompts": "a cat", "seed": seed, "steps": 3}},
        }
    assert [job["seed"] for job in report["jobs"]] == [41, 42] and [
        job["posts"] for job in report["jobs"]
    ] == [1, 1]
    assert automated(host)[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"0000{i}_Draw_it_1.png" for i in (1, 2, 3)]
    assert (tmp_path / "out" / names[0]).read_bytes() == b"file p.png"


def test_texts_and_saved_subjects_are_kept_too(host, automated, tmp_path):
    """Every output: pictures, texts, and the file that Save Reference names; booleans beside them are nothing to keep."""
    kept = GRAPH | {
        "5": {"class_type": "KindredSaveReference", "inputs": {}, "_meta": {"title": "Keep"}}
    }
    (tmp_path / "w.json").write_text(json.dumps(kept), "utf-8")
    host.outputs = {
        "2": {"images": [{"filename": "p.png", "type": "temp"}] * 2, "animated": [False]},
        "4": {"text": ["score 0.5"]},
        "5": {"text": ["kindred/dog_00001_.safetensors, 3.1 MB"]},
    }
    assert automated(host)[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        "00001_Draw_it_1.png": b"file p.png",
        "00001_Draw_it_2.png": b"file p.png",
        "00001_Subject_1.txt": b"score 0.5",
        "00001_Keep_1.txt": b"kindred/dog_00001_.safetensors, 3.1 MB",
        "00001_Keep_1.safetensors": b"file dog_00001_.safetensors",
    }


def test_lines_in_packs_each_with_every_seed(host, automated):
    words = [
        "--each",
        "2.prompts=a",
        "--each",
        "2.prompts=b",
        "--each",
        "Draw it.prompts=c",
        "--lines-per-job",
        "2",
        "--repeat",
        "2",
    ]
    code, report, _ = automated(host, words=words)
    assert code == 0
    assert [
        (graph["2"]["inputs"]["prompts"], graph["2"]["inputs"]["seed"]) for graph in host.graphs
    ] == [("a\nb", 7), ("a\nb", 8), ("c", 7), ("c", 8)]
    assert all(graph["3"]["inputs"]["seed"] == 0 for graph in host.graphs)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--set", "2.steps=many"], "whole number"),
        (["--set", "2.stepz=3"], "no input 'stepz'"),
        (["--each", "2.seed=one"], "whole number"),
        (["--seed", "-1"], "0 to 18446744073709551615"),
        (["--seed", "soon"], "whole number or random"),
        (["--image", "Photo=none.png"], "not a file"),
        (["--subject", "none.safetensors"], "not a file"),
        (["--each", "2.prompts=a", "--each", "2.steps=3"], "one input"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(host, automated, words, said):
    code, _, told = automated(host, words=words)
    assert code == 2 and said in told and "Traceback" not in told
    assert not host.posts and not host.uploads


def test_a_subject_is_sent_once_under_the_name_of_its_contents(host, automated, tmp_path):
    """The host lists what it was sent; the same contents are not sent again, other ones are; too large a file is a sentence."""
    host.lists_uploads = True
    subject = tmp_path / "dog.safetensors"
    subject.write_bytes(b"a dog" * 1000)
    assert automated(host, words=["--subject", str(subject)])[0] == 0
    [name] = host.uploads
    assert name.startswith("dog-") and host.uploads.pop(name) == subject.read_bytes()
    assert host.graphs[-1]["4"]["inputs"]["file"] == name
    assert automated(host, words=["--subject", f"Subject={subject}"])[0] == 0 and not host.uploads
    subject.write_bytes(b"another dog" * 1000)
    host.limit = 1000
    code, _, said = automated(host, words=["--subject", str(subject)])
    assert code == 2 and "--max-upload-size" in said and "models/kindred_references" in said


def test_a_subject_that_the_host_does_not_list_is_a_sentence(host, automated, tmp_path):
    (tmp_path / "dog.safetensors").write_bytes(b"a dog")
    code, _, said = automated(host, words=["--subject", str(tmp_path / "dog.safetensors")])
    assert code == 2 and "does not list it; it lists old.safetensors" in said and not host.posts


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process there")
@pytest.mark.parametrize("deaf", [0, 2])
def test_ctrl_c_takes_back_its_own_prompt_and_says_so(host, tmp_path, deaf):
    """As a process: SIGINT in mid-run. A host that drops the first interrupts is told again."""
    host.hold, host.deaf = True, deaf
    host.states["another's"] = "in_progress"
    (tmp_path / "w.json").write_text(json.dumps(GRAPH), "utf-8")
    program = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tools" / "client" / "automate.py"),
            "w.json",
            "--server",
            host.url,
            "--repeat",
            "3",
            "--json",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with host.changed:
            while not host.posts and program.poll() is None:
                host.changed.wait(0.1)
        program.send_signal(signal.SIGINT)
        out, err = program.communicate()
    finally:
        program.kill()
    assert (
        program.returncode == 130
        and "interrupted; no other prompt was touched" in err
        and "Traceback" not in err
    ), err
    assert (
        set(host.cancelled) == set(host.posts)
        and len(host.posts) == 1
        and len(host.cancelled) == deaf + 1
    )
    assert host.states == {"another's": "in_progress", host.posts[0]: "cancelled"}
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["cancelled", "not run", "not run"]


def test_a_board_gives_every_job_to_exactly_one_host():
    """Many threads, some of which give back half of what they take: each job ends once."""
    board, ended = Board([Job(i) for i in range(300)], "abcd"), []

    def work(host: str) -> None:
        given_back = 0
        while (job := board.take(host)) is not None:
            if host == "d" and given_back < 20:
                given_back += 1
                job.refusals["d"] = "no"
                board.give_back(job)
            else:
                ended.append(job.number)
                board.done()

    threads = [threading.Thread(target=work, args=(host,)) for host in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == list(range(300)) and not board.taken


def test_the_program_needs_nothing_but_python(tmp_path):
    """Without site-packages: --help, and a refusal that is a sentence."""

    def run(*words):
        return subprocess.run(
            [
                sys.executable,
                "-E",
                "-s",
                "-S",
                str(ROOT / "tools" / "client" / "automate.py"),
                *words,
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    assert "Exit code" in run("--help").stdout
    told = run("nowhere.json")
    assert (
        told.returncode == 2
        and "nowhere.json could not be read" in told.stderr
        and "Traceback" not in told.stderr
    )


def test_the_client_needs_two_files_beside_it_and_no_package():
    """Whoever copies it into a program of their own copies these three."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import client;"
        "print(*sorted(n for n, m in sys.modules.items() if (getattr(m, '__file__', 0) or '').startswith(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-E", "-s", "-S", "-c", script, str(ROOT / "tools" / "client")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["client", "redirects", "web_socket"]
