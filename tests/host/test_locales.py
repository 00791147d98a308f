"""Every word of every node in English and in every other language: nothing lacks, nothing is left over, nothing is untranslated."""

import re

import pytest
import schemas

# the compiler of the frontend's messages gives these a meaning of their own
SPECIAL = re.compile(r"[{}@|]")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
LANGUAGES = sorted(folder.name for folder in schemas.LOCALES.iterdir())
# names that are written in Latin letters in Chinese too: the host's own translation does so
SAME = {"clip", "vae", "cfg", "sigmas", "latent"}


@pytest.fixture(scope="module")
def words(host):
    return schemas.english(schemas.object_info(host.NODE_CLASS_MAPPINGS))


@pytest.fixture(scope="module")
def chinese():
    return {
        stem: schemas.read(schemas.LOCALES / "zh" / f"{stem}.json") for stem in ("nodeDefs", "main")
    }


def first(lines, most=15):
    """As many as one reads."""
    return "\n".join(
        [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
    )


@pytest.mark.parametrize("stem", ["nodeDefs", "main"])
def test_english_is_what_the_nodes_say(words, stem):
    told, want = (
        schemas.flat(schemas.read(schemas.LOCALES / "en" / f"{stem}.json")),
        schemas.flat(words[stem]),
    )
    wrong = [
        f"{path}: {told.get(path)!r} instead of {want.get(path)!r}"
        for path in {**want, **told}
        if told.get(path) != want.get(path)
    ]
    assert not wrong, f"locales/en is made by a program:\n{first(wrong)}\n{schemas.HOW}"


@pytest.mark.parametrize("stem", ["nodeDefs", "main"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language_has_the_same_entries(words, language, stem):
    want, told = (
        schemas.flat(words[stem]),
        schemas.flat(schemas.read(schemas.LOCALES / language / f"{stem}.json")),
    )
    assert all(text.strip() for text in told.values())
    lacking = [
        f"{path} is not translated: {text}" for path, text in want.items() if path not in told
    ]
    left = [f"{path} translates nothing" for path in told if path not in want]
    assert not lacking + left, first(lacking + left)


def test_every_string_says_something(words):
    """Also in English: an input without a tooltip would have an empty one here."""
    for stem, content in words.items():
        assert not [path for path, text in schemas.flat(content).items() if not text.strip()]


def test_chinese_is_chinese(words, chinese):
    for stem, content in chinese.items():
        want = schemas.flat(words[stem])
        for path, text in schemas.flat(content).items():
            latin = path.endswith(".name") and want.get(path) in SAME
            assert latin or (CHINESE.search(text) and text != want.get(path)), (
                f"{stem}: {path}: {text!r}"
            )


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_string_is_a_program_to_the_frontend(language):
    for path in (schemas.LOCALES / language).iterdir():
        assert not {
            key: text
            for key, text in schemas.flat(schemas.read(path)).items()
            if SPECIAL.search(text)
        }


def test_chinese_calls_nodes_by_their_chinese_names(words, chinese):
    """Who reads it finds no node under its English name, and chooses options by the words that stand in the list."""
    names = [node["display_name"] for node in words["nodeDefs"].values()]
    strays = [
        f"{path}: {name}"
        for path, text in schemas.flat(chinese["nodeDefs"]).items()
        for name in names
        if name in text
    ]
    assert not strays, first(strays)


def test_chinese_keeps_the_words_of_the_options(host, chinese):
    """The frontend does not translate what stands in a list: a tooltip that explains the choices names them as they are."""
    told = schemas.flat(chinese["nodeDefs"])
    for key, node in schemas.object_info(host.NODE_CLASS_MAPPINGS).items():
        for name, _, _, options in schemas.inputs(node):
            for choice in options.get("options", []):
                if f"{choice}:" in options["tooltip"]:
                    translated = told.get(f"{key}.inputs.{name}.tooltip", "")
                    assert f"{choice}\N{FULLWIDTH COLON}" in translated, (
                        f"{key}.{name}: {choice} is not explained"
                    )


def test_the_languages_and_their_files():
    assert {"en", "zh"} <= set(LANGUAGES)
    for language in LANGUAGES:
        assert sorted(path.name for path in (schemas.LOCALES / language).iterdir()) == [
            "main.json",
            "nodeDefs.json",
        ]
