"""Every node is complete for the person who meets it: a workflow to see it in, a page with a picture, words in two languages.

That each input and output has a tooltip, and each node aliases to be found by, is stated in test_pack.py.
"""

import json
import re

import pytest
import schemas
from archive import ROOT

import nodes

PICTURE = re.compile(r"!\[[^\]]+\]\((images/[^)\s]+)\)")
NODES = schemas.object_info(nodes.NODE_CLASS_MAPPINGS)


@pytest.fixture(scope="module")
def used():
    """Node id -> the canvas workflows that it stands in, subgraphs included."""
    found = {}
    for path in sorted((ROOT / "workflows").glob("*.json")):
        content = json.loads(path.read_text("utf-8"))
        graphs = [content, *content.get("definitions", {}).get("subgraphs", [])]
        for kind in {node["type"] for graph in graphs for node in graph["nodes"]}:
            found.setdefault(kind, []).append(path.name)
    return found


@pytest.mark.parametrize("key", NODES)
def test_stands_in_a_workflow(key, used):
    assert used.get(key), f"no workflow in workflows/ shows {NODES[key]['display_name']}"


@pytest.mark.parametrize("key", NODES)
def test_has_a_page_with_a_picture(key):
    text = (ROOT / "web" / "docs" / f"{key}.md").read_text("utf-8")
    assert text.startswith(f"# {NODES[key]['display_name']}\n")
    pictures = PICTURE.findall(text)
    assert pictures, "the page shows no picture"
    for name in pictures:
        head = (ROOT / "web" / "docs" / name).read_bytes()[:8]
        assert head.startswith((b"\xff\xd8\xff", b"\x89PNG")), f"{name} is no picture"


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("key", NODES)
def test_has_a_locale_entry(key, language):
    entry = schemas.read(schemas.LOCALES / language / "nodeDefs.json")[key]
    assert entry["display_name"] and entry["inputs"]


@pytest.mark.parametrize("key", NODES)
def test_has_a_chinese_page_with_the_same_pictures_and_inputs(key):
    """ComfyUI asks for NODE/zh.md first where the language is Chinese, and takes pictures from docs/ for both."""
    english = (ROOT / "web" / "docs" / f"{key}.md").read_text("utf-8")
    page = (ROOT / "web" / "docs" / key / "zh.md").read_text("utf-8")
    entry = schemas.read(schemas.LOCALES / "zh" / "nodeDefs.json")[key]
    assert page.startswith(f"# {entry['display_name']}\n")
    assert PICTURE.findall(page) == PICTURE.findall(english)
    named = [told["name"] for name, told in entry["inputs"].items() if f"**{name}**" in english]
    assert not [name for name in named if f"**{name}**" not in page]


def test_no_page_is_left_of_a_node_that_is_gone():
    pages = ROOT / "web" / "docs"
    assert {path.stem for path in pages.glob("*.md")} == set(NODES)
    assert {path.parent.name for path in pages.glob("*/*.md")} == set(NODES)
