"""What the server tells the page about the pack's words, and the help pages that it hands out."""

import json

import pytest
from checkout import ROOT


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_server_tells_the_locales(client, language):
    told = client.json("/i18n")[language]
    files = {
        stem: json.loads((ROOT / "locales" / language / f"{stem}.json").read_text("utf-8"))
        for stem in ("main", "nodeDefs")
    }
    assert told["nodeCategories"]["Kindred"] == files["main"]["nodeCategories"]["Kindred"]
    assert {
        key: words for key, words in told["nodeDefs"].items() if key.startswith("Kindred")
    } == files["nodeDefs"]
    assert files["nodeDefs"].keys() == {
        key for key in client.object_info() if key.startswith("Kindred")
    }


def test_the_server_hands_out_a_help_page_for_each_language(client):
    """Where the page asks for them: extensions/PACK/docs/NODE/LANGUAGE.md, else NODE.md; pictures beside the latter."""
    for place in (
        "KindredConsiStory.md",
        "KindredConsiStory/zh.md",
        "images/KindredConsiStory.jpg",
    ):
        told = client.request(f"/extensions/kindred/docs/{place}")
        assert told == (ROOT / "web" / "docs" / place).read_bytes()
