"""Laws of measuring the flow miniature: which tables it can be measured on, its own figures by hand, its workflow, its one flag."""

from __future__ import annotations

import json
from types import SimpleNamespace

import demo
import pytest
import torch
from archive import ROOT, files, ignored
from evaluation import own
from evaluation.catalogue import CONTROL, DEFAULT, TABLES
from evaluation.ground import Job, Setting
from evaluation.journal import Journal
from evaluation.miniatures import FLOW, HAS, UNET, fitted, lacks
from evaluation.options import chosen, parse
from evaluation.personalize import Identities, Personalize, Subject
from evaluation.rows import CONCEPT, Row
from flow_workflow import CHECKPOINT, LEFT_OUT, NAME, flow_form, follow
from kindred.miniature.layout import FLOW_OFFERED
from kindred.miniature.pack import FLOW_CHECKPOINT
from kindred.miniature.world import CLASSES, SCENES
from workflow_notes import NOTES


def asked(tmp_path, *words):
    return parse([*words, "--host", "nowhere", "--out", str(tmp_path)])


# tables ------------------------------------------------------------------------------------------------------------------------


def test_the_unet_miniature_is_measured_as_it_was(tmp_path):
    assert asked(tmp_path).miniature == UNET
    assert all(fitted(table, UNET) == table for table in TABLES.values())
    assert [table.name for table in TABLES.values() if lacks(table, UNET)] == [
        "settings_flow",
        "settings_story_flow",
    ]


def test_what_the_flow_miniature_lacks_is_said_before_the_work(tmp_path, capsys):
    tables = chosen(asked(tmp_path, "--miniature", "flow"))
    said = capsys.readouterr().err
    assert [table.name for table in tables] == [*DEFAULT]
    assert "table_2 is without cross, full: the flow miniature does not have a concept enc" in said
    assert [row.name for row in tables[0].rows] == ["plain", "self", "shuffled"]
    assert [row.name for row in tables[1].rows][-1] == "W_S 4, no mask"


def test_every_table_of_the_flow_miniature_begins_plain_and_sets_no_concept():
    for table in TABLES.values():
        if not lacks(table, FLOW):
            rows = fitted(table, FLOW).rows
            assert rows[0] == table.rows[0] and len(rows) > 3 - (table.name == "table_2")
            assert len({row.inputs for row in rows}) == len(rows)
            assert not [row for row in rows if row.of(CONCEPT)], table.name


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--table", "table_story"], "table_story needs a UNet, .*--miniature unet"),
        (["--table", "freeu"], "freeu needs a UNet, .*--miniature unet"),
        (["--table", "settings_full"], "settings_full needs a concept encoder"),
        (
            ["--task", "story", "--variant", "a: freeu=yes"],
            "row 'a' sets freeu, which needs a UNet.*--miniature unet",
        ),
        (["--task", "story", "--variant", "a: rival=one seed"], "row 'a' sets rival"),
        (
            ["--task", "personalize", "--variant", "a: concept.strength=1"],
            "row 'a' sets concept.strength, but the flow miniature",
        ),
    ],
)
def test_what_it_cannot_be_asked_for_is_a_sentence(tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        chosen(asked(tmp_path, "--miniature", "flow", *words))


def test_a_table_of_joint_attention_is_none_of_the_unet_miniatures(tmp_path):
    with pytest.raises(SystemExit, match="settings_flow needs joint attention.*--miniature flow"):
        chosen(asked(tmp_path, "--table", "settings_flow"))
    rows = chosen(asked(tmp_path, "--miniature", "flow", "--table", "settings_flow"))[0].rows
    assert {"text_share plain", "shuffled", "double", "inverted first"} <= {r.name for r in rows}


def test_both_miniatures_may_share_a_journal_and_have_a_folder_each(tmp_path):
    job, code = Job("personalize", Row("plain"), 1, 0), ("h", 25, 4.0, "x")
    keys = {Journal.key(Setting(*code, miniature=name).of(job)) for name in HAS}
    assert len(keys) == 2 and Setting(*code).of(job)["ground"] == "miniature"
    outs = [parse(["--host", "h", "--miniature", name]).out.name for name in (UNET, FLOW)]
    assert outs == ["kindred-evaluation", "kindred-evaluation-flow"]


def test_a_checkpoint_of_ones_own_is_no_miniature(tmp_path, capsys):
    (checkpoint := tmp_path / "a.safetensors").write_bytes(b"")
    (prompts := tmp_path / "p.txt").write_text("a {subject}")
    with pytest.raises(SystemExit):
        words = ["--checkpoint", str(checkpoint), "--prompts", str(prompts)]
        asked(tmp_path, "--miniature", "flow", *words)
    assert "--miniature does nothing here" in capsys.readouterr().err


# the control -------------------------------------------------------------------------------------------------------------------


class Pretender:
    """A studio that keeps what the nodes get."""

    scheduler, steps, batch, torch = "simple", 3, 4, torch
    model = encoder = "model"

    def __init__(self) -> None:
        self.runs: list[tuple[str, dict]] = []

    def run(self, node, **inputs):
        self.runs.append((node, inputs))
        return SimpleNamespace(masks={}, trajectory=None), None

    def picture(self, image):
        return torch.tensor(image).float().div(255)[None]

    def encode(self, image):
        return {"samples": image}

    def prompts(self, lines, subject):
        return lines, subject

    def empty(self):
        return "empty"


def read(text: str) -> list[tuple[str, dict]]:
    """The nodes that one row runs for a held-out identity, its mask wired."""
    studio = Pretender()
    task = Personalize(studio, Identities(studio))
    task.injected(Row.parse("personalize", f"a: {text}"), task.subject(7))
    return studio.runs


def test_the_control_reads_another_identity_in_the_same_place():
    own_photo, another = (
        read(f"mask=none{more}")[0][1]["latent"]["samples"][0] for more in ("", f", {CONTROL}")
    )
    differs = (own_photo != another).any(-1)
    subject = Identities(Pretender())(7)
    assert (
        0 < differs.float().mean() < 0.5
        and not differs[~(subject.mask | subject.another[1])][:20].any()
    )
    assert torch.equal(another, subject.another[0][0])


def test_the_control_holds_for_the_concept_encoder_and_the_true_mask():
    runs = read(f"{CONTROL}, mask=true, concept.strength=1")
    subject = Identities(Pretender())(7)
    assert torch.equal(runs[0][1]["mask"][0] > 0.5, torch.from_numpy(subject.another[1]))
    assert torch.equal(runs[2][1]["image"], subject.another[0])


def test_references_are_read_anew_for_another_photo_or_way_back():
    studio = Pretender()
    task = Personalize(studio, Identities(studio))
    for text in ("mask=none", f"mask=none, {CONTROL}", "mask=none", "mask=none, inverted=yes"):
        task.reference(Row.parse("personalize", f"a: {text}"), task.subject(7))
    told = Row.parse("personalize", "a: mask=none, inverted=yes, method=forward noise")
    task.reference(told, task.subject(7))
    names = [name for name, _ in studio.runs]
    assert names == ["KindredRefUNetCapture"] * 2 + ["KindredDDIMInvert", names[0]] * 2
    assert studio.runs[-2][1]["method"] == "forward noise" and "method" not in studio.runs[2][1]
    assert all(inputs["scheduler"] == "simple" for _, inputs in studio.runs)


def test_a_subject_without_another_has_its_own_photo():
    subject = Subject("photo", "cat", "a cat", (), lambda images: {}, "mask")
    assert subject.shown(Row("a")) == ("photo", "mask")


# its own figures ---------------------------------------------------------------------------------------------------------------


def test_the_jobs_are_every_class_in_every_scene_and_the_held_out_renderings():
    jobs = own.jobs(6)
    asked_for = [job for job in jobs if job.task == own.PROMPTS]
    assert len(asked_for) == 2 * len(CLASSES) * len(SCENES) and len(set(jobs)) == len(jobs)
    assert sum(job.row.get("pictures", 0) for job in asked_for) == 6 * 40
    known = [job for job in jobs if job.task == own.RENDERINGS]
    assert len(known) * own.CHUNK == 200 and sum(job.row.get("masked", 0) for job in known) == 60
    assert sum(job.row.get("masked", 0) for job in own.jobs(40)) == 200
    assert {job for job in own.jobs(4) if job.task == own.PROMPTS} <= set(own.jobs(8))


def test_its_figures_by_hand():
    colours = {"hue": [0.0, 0.5], "saturation": [1.0, 1.0], "value": [1.0, 1.0]}
    drawn = colours | {"class": [1.0, 0.0], "scene": [1.0, 1.0], "whole": [0.0, 1.0]}
    known = colours | {
        "psnr": [30.0, 32.0],
        "whole": [1.0, 1.0],
        "iou": [0.5],
        "accuracy": {"a": 1},
    }
    found = {
        job: drawn | {"class": [1.0, 1.0]} if job.case < len(SCENES) else drawn
        for job in own.jobs(2)
        if job.task == own.PROMPTS
    } | {Job(own.RENDERINGS, Row("renderings"), 0, 0): known}
    figures = own.figures(found, 25.0)
    assert figures["class_accuracy.prompts"] == pytest.approx(0.6)
    assert figures["class_accuracy.cat"] == 1 and figures["class_accuracy.dog"] == 0.5
    assert figures["scene_accuracy.prompts"] == 1 and figures["whole_subject.prompts"] == 0.5
    assert figures["spread_ratio"] == pytest.approx(1) and figures["vae.psnr_db"] == 31
    assert (figures["mask.iou"], figures["count.masks"], figures["count.pictures"]) == (0.5, 1, 80)


# its workflow and its flag -----------------------------------------------------------------------------------------------------


def personalize() -> dict:
    return json.loads(demo.WORKFLOW.read_text("utf-8"))


def test_its_workflow_is_the_shipped_one_without_an_encoder():
    graph = personalize()
    made = flow_form(graph)
    links = {v[0] for node in made.values() for v in node["inputs"].values() if isinstance(v, list)}
    assert links <= made.keys() and graph == personalize()
    assert not {node["class_type"] for node in made.values()} & set(LEFT_OUT)
    assert made[demo.LOADER]["inputs"]["ckpt_name"] == CHECKPOINT == FLOW_CHECKPOINT.name
    sampler, reads = made[demo.SAMPLER]["inputs"], made[demo.CAPTURE]["inputs"]
    assert sampler["model"] == [demo.INJECT, 0] and sampler["sampler_name"] == "euler"
    assert sampler["scheduler"] == reads["scheduler"] == "simple"
    assert sampler["steps"] == reads["steps"]


def test_the_flag_decides_the_archive_the_workflow_and_its_note_together():
    """FLOW_OFFERED in miniature/layout.py; with it .comfyignore loses weights/flow/, and dev.py workflows --run makes the workflow."""
    name = FLOW_CHECKPOINT.relative_to(ROOT).as_posix()
    assert name in files() and ignored(name) != FLOW_OFFERED
    assert (f"workflows/api/{NAME}.json" in files()) == (NAME in NOTES) == FLOW_OFFERED


@pytest.mark.parametrize("on", [False, True])
def test_the_workflow_follows_the_flag(tmp_path, monkeypatch, on):
    monkeypatch.setattr("kindred.miniature.layout.FLOW_OFFERED", on)
    (tmp_path / "personalize.json").write_text(json.dumps(personalize()))
    (written := tmp_path / f"{NAME}.json").write_text("{}")
    follow(tmp_path)
    assert written.exists() == on
    if on:
        assert json.loads(written.read_text("utf-8")) == flow_form(personalize())


def test_the_demo_knows_the_flow_miniature(capsys):
    given = demo.parse(["--miniature", "flow"])
    assert (given.steps, given.out.name, given.cfg) == (25, "kindred-demo-flow", 4.0)
    graph = demo.prepared(given, "photo.png", CHECKPOINT, 128)
    assert list(demo.columns(graph)) == ["self", "plain"]
    assert graph[demo.PHOTO]["inputs"]["image"] == "photo.png"
    plain = demo.parse([])
    assert (plain.steps, plain.out.name) == (50, "kindred-demo")
    for words in (["--checkpoint", "x"], ["--concept-weight", "1"]):
        with pytest.raises(SystemExit):
            demo.parse(["--miniature", "flow", *words])
        assert "does nothing here" in capsys.readouterr().err
