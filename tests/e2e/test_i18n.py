"""What the server tells the page about the pack's words."""

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
