"""Laws of the user's own files: what a photo shows, what is asked for, and what is refused before anything is loaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from evaluate import fill, measured
from evaluation.ground import BOUNDS, Job
from evaluation.journal import Journal
from evaluation.options import chosen, parse
from evaluation.real import DLIB, REAL, Files, RealSetting, tables
from evaluation.rows import Row

PROMPTS = (
    "a {subject} on a beach\na cat in the snow\n\n\n a {subject} at night \na photo of a Cat\n"
)


@pytest.fixture
def files(tmp_path) -> Files:
    for name in (
        "refs/cat/b.png",
        "refs/cat/deep/a.JPG",
        "refs/own.webp",
        "refs/notes.txt",
        "model.safetensors",
        "vision.safetensors",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return Files(
        tmp_path / "model.safetensors",
        tmp_path / "prompts.txt",
        "cat",
        tmp_path / "refs",
        clip_vision=tmp_path / "vision.safetensors",
    )


def test_a_photos_folder_names_its_subject(files):
    assert [(path.name, word) for path, word in files.photos()] == [
        ("b.png", "cat"),
        ("a.JPG", "deep"),
        ("own.webp", "cat"),
    ]
    with pytest.raises(SystemExit, match="what does own.webp show.*--subject"):
        replace(files, subject="").photos()


def test_blank_lines_part_the_sets(files):
    assert files.sets() == [
        ["a {subject} on a beach", "a cat in the snow"],
        ["a {subject} at night", "a photo of a Cat"],
    ]
    files.prompts.write_text(" \n\n")
    with pytest.raises(
        SystemExit, match="prompts.txt, which holds no prompt.*{subject} stands for"
    ):
        files.sets()


def test_a_mark_before_the_text_is_no_prompt(files):
    files.prompts.write_text("a cat", "utf-8-sig")
    assert files.sets() == [["a cat"]]
    files.prompts.write_bytes("ein K\xe4tzchen".encode("latin-1"))
    with pytest.raises(SystemExit, match="prompts.txt is no UTF-8 text"):
        files.sets()


def test_every_prompt_names_the_subject(files):
    cat, line = (
        "\u732b",
        "\u4e00\u53ea\u732b\u5728\u6d77\u6ee9\u4e0a",
    )  # a cat, on a beach: no spaces between words
    assert files.with_subject([line], cat) == (line,)
    assert files.with_subject(files.sets()[1], "cat") == ("a cat at night", "a photo of a Cat")
    with pytest.raises(SystemExit, match="'a cat in the snow' does not name the subject 'dog'"):
        files.with_subject(files.sets()[0], "dog")
    with pytest.raises(SystemExit, match="does not name the subject"):
        files.with_subject(["a category"], "cat")


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"checkpoint": Path("gone.safetensors")},
            "--checkpoint is gone.safetensors, but there is no such file",
        ),
        ({"references": Path("gone")}, "--references is gone, but there is no such folder"),
        (
            {"clip_vision": None, "clip_text": "prompts"},
            "--clip-text judge what --clip-vision sees",
        ),
        ({"size": 100}, "--size is 100, which is no multiple of 8. Take 96"),
    ],
)
def test_files_that_do_not_fit_are_named(files, change, said):
    change = {
        name: files.prompts if value == "prompts" else value for name, value in change.items()
    }
    with pytest.raises(SystemExit, match=said):
        replace(files, **change)


def test_photos_make_table_2_and_sets_a_story(files):
    one_word = replace(files, references=files.references / "cat")
    (files.references / "cat" / "deep" / "a.JPG").unlink()
    (table,) = tables(one_word, "all")
    assert (table.name, table.count, [row.name for row in table.rows]) == (
        "table_2",
        1,
        ["plain", "self"],
    )
    assert [
        row.name
        for row in tables(replace(one_word, concept_encoder=files.checkpoint), "personalize")[
            0
        ].rows
    ] == ["plain", "cross", "self", "full"]
    (table,) = tables(replace(one_word, references=None), "all")
    assert (table.task, table.count, [row.name for row in table.rows]) == (
        "story",
        2,
        ["plain", "story"],
    )


@pytest.mark.parametrize(
    "change, task, said",
    [
        ({"clip_vision": None}, "all", "nothing would be judged"),
        ({"clip_vision": None, "faces": "model"}, "story", "nothing would be judged"),
        ({"references": None}, "personalize", "needs --references"),
        ({"subject": "", "references": None}, "story", "--task story needs --subject"),
        ({}, "personalize", "'a cat in the snow' does not name the subject 'deep'"),
    ],
)
def test_what_makes_no_table_is_refused(files, change, task, said):
    with pytest.raises(SystemExit, match=said):
        tables(
            replace(
                files,
                **{
                    name: files.checkpoint if value == "model" else value
                    for name, value in change.items()
                },
            ),
            task,
        )


def test_a_story_has_two_prompts(files):
    files.prompts.write_text("a cat\n\na cat by day\na cat by night")
    with pytest.raises(SystemExit, match="set 1 of .* is one prompt, and a story has 2"):
        tables(files, "story")


def test_a_file_that_changed_is_measured_anew(files):
    setting, job = (
        RealSetting(Path("host"), 50, 7.5, "c", files),
        Job("personalize", Row("self"), 0, 0),
    )
    first = Journal.key(setting.of(job))
    assert Journal.key(RealSetting(Path("host"), 50, 7.5, "c", replace(files)).of(job)) == first
    os.utime(files.checkpoint, ns=(1, 1))
    assert Journal.key(setting.of(job)) != first
    first = Journal.key(setting.of(job))
    files.prompts.write_text("a {subject} elsewhere")
    assert Journal.key(setting.of(job)) != first
    first = Journal.key(setting.of(job))
    os.utime(files.references / "cat" / "b.png", ns=(1, 1))
    assert Journal.key(setting.of(job)) != first
    first = Journal.key(setting.of(job))
    (files.references / "cat" / "a.png").write_bytes(b"x")  # another photo becomes the first
    assert Journal.key(setting.of(job)) != first


def test_faces_are_judged_by_dlib_where_the_word_says_so(files, tmp_path, monkeypatch):
    """dlib's net has no file of the user's; a file of that name is ./dlib."""
    for name in ("host", "dlib"):
        (tmp_path / name).mkdir() if name == "host" else (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    words = ["--checkpoint", "model.safetensors", "--prompts", "prompts.txt", "--host", "host"]
    words += ["--references", "refs/cat", "--subject", "cat", "--faces"]
    by_word, by_file = (parse([*words, faces]).files for faces in (DLIB, "./dlib"))
    assert by_word.faces == DLIB and by_file.faces == Path("dlib")
    assert "faces" not in by_word.paths() and "faces" in by_file.paths()
    job = Job("personalize", Row("self"), 0, 0)
    grounds = [
        RealSetting(Path("host"), 50, 7.5, "c", files).of(job)["ground"]
        for files in (by_word, by_file)
    ]
    assert grounds[0]["faces"] == DLIB and grounds[1]["faces"][:2] == ["dlib", 1]
    with pytest.raises(SystemExit, match="nothing would be judged"):
        tables(by_word, "story")
    with pytest.raises(SystemExit, match="no such file"):
        parse([*words, "dlip"])


def test_only_what_was_measured_is_a_column(files, tmp_path):
    values = {
        "dino": [0.5],
        "dino_consistency": [0.4],
        "seconds": 1.0,
        "memory_gib": 2.0,
        "unet_calls": 50,
    }
    ground = measured(REAL["personalize"], {"plain": {0: [values]}})
    assert [column.key for column in ground.columns] == [
        "seconds",
        "dino",
        "memory_gib",
        "unet_calls",
    ] and ground.identity == "dino"
    assert (
        measured(REAL["story"], {"plain": {0: [values | {"face_cosine": [0.5]}]}}).identity
        == "dino_consistency"
    )
    setting = RealSetting(
        Path("host"), 50, 7.5, "c", replace(files, references=files.references / "cat")
    )
    journal, table = Journal(tmp_path / "journal.jsonl"), tables(setting.files, "story")[0]
    journal.add(setting.of(Job("story", BOUNDS, 0, 0)), {})
    said = {"judged_by": {"text": "raw cosine (CLIP ViT-L)", "image": "no column of this table"}}
    journal.add(
        setting.of(Job("story", table.rows[0], 0, 0)),
        {"consistency": [0.7, 0.9], "text": [0.2, 0.3], **values, **said},
    )
    (one,) = fill([table], 1, journal, setting, REAL)
    assert one.judged_by() == "- CLIP text: raw cosine (CLIP ViT-L)"
    assert "of the way" not in one.markdown() and one.figures()[
        "consistency.plain"
    ] == pytest.approx(0.8)
    assert one.csv().splitlines()[0].split(",").count("text") == 1
    assert one.figures()["text_clip.plain"] == pytest.approx(0.25) and one.scores["plain"][
        "text"
    ].mean == pytest.approx(0.25)


def asked(files: Files, *words: str):
    return parse(
        [
            "--checkpoint",
            str(files.checkpoint),
            "--prompts",
            str(files.prompts),
            "--clip-vision",
            str(files.clip_vision),
            "--subject",
            "cat",
            "--host",
            "nowhere",
            *words,
        ]
    )


def test_the_command_line_of_ones_own(files, capsys):
    given = asked(files)
    assert (given.cfg, given.processes, given.files.subject) == (7.5, 1, "cat") and [
        t.name for t in chosen(given)
    ] == ["story"]
    assert [chosen(asked(files, "--count", count))[0].count for count in ("1", "9")] == [1, 2]
    (own,) = chosen(asked(files, "--task", "story", "--variant", "strong: weight=2"))
    assert [row.name for row in own.rows] == ["plain", "strong"] and own.count == 2
    files.prompts.write_text("{subject}")
    with pytest.raises(
        SystemExit, match="'x' sets an input of Cross-Attn Detail Inject. Give a --concept-encoder"
    ):
        chosen(
            asked(
                files,
                "--references",
                str(files.references),
                "--task",
                "personalize",
                "--variant",
                "x: concept.weight=2",
            )
        )
    with pytest.raises(
        SystemExit, match="'x' sets mask to 'true', which is known of rendered photos alone"
    ):
        chosen(
            asked(
                files,
                "--references",
                str(files.references),
                "--task",
                "personalize",
                "--variant",
                "x: mask=true",
            )
        )


@pytest.mark.parametrize(
    "words, said",
    [
        (["--subject", "cat"], "--subject needs a --checkpoint"),
        (["--checkpoint", "x"], "--checkpoint needs --prompts"),
        (
            ["--checkpoint", "x", "--prompts", "y", "--table", "pareto"],
            "--table is the miniature's",
        ),
        (
            ["--checkpoint", "x", "--prompts", "y", "--task", "miniature"],
            "--task miniature is the miniature's",
        ),
    ],
)
def test_words_that_do_not_belong_together(words, said, capsys):
    with pytest.raises(SystemExit):
        parse([*words, "--host", "nowhere"])
    assert said in capsys.readouterr().err
