"""What the nodes have promised: the golden record of their shape, the English locale, and which translations are out of date.

python3 tools/workshop/schemas.py               what differs from tests/host/object_info.json and locales/en
python3 tools/workshop/schemas.py --accept      write both anew: the change is meant
python3 tools/workshop/schemas.py --stale       English strings that changed since their Chinese was written
python3 tools/workshop/schemas.py --translated  the Chinese was looked at: it is up to date now

Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from terminal import run_program

ROOT = Path(__file__).resolve().parents[2]
GOLDEN, MADE_FROM = (
    ROOT / "tests" / "host" / "object_info.json",
    ROOT / "tests" / "host" / "translated_from.json",
)
LOCALES = ROOT / "locales"
HOW = "If that is meant: python3 tools/workshop/schemas.py --accept"
WORDS = {"tooltip", "display_name"}  # told by the locales, free to change
FILE = re.compile(r".+\.(safetensors|ckpt|pt|pth|bin|png|jpg|jpeg|webp)( \[\w+\])?")

Nodes = Mapping[str, Any]  # id -> the host's object_info of a node of the pack


def object_info(classes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The host's own answer for each node of the pack, from its NODE_CLASS_MAPPINGS."""
    return {
        name: node.GET_NODE_INFO_V1()
        for name, node in classes.items()
        if name.startswith("Kindred")
    }


def host_lists() -> dict[str, list[str]]:
    """Choices that belong to the host, which may add to them."""
    from comfy.samplers import KSampler

    return {
        "the host's samplers": list(KSampler.SAMPLERS),
        "the host's schedulers": list(KSampler.SCHEDULERS),
    }


def inputs(node: Mapping[str, Any]) -> Iterator[tuple[str, bool, str, dict[str, Any]]]:
    """(id, required, type, options) in the order of the widgets; hidden inputs are no promise."""
    for kind in ("required", "optional"):
        for name, (wire, *options) in node["input"].get(kind, {}).items():
            yield name, kind == "required", wire, dict(options[0]) if options else {}


def outputs(node: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(name, type, tooltip, whether a list) of each output."""
    tips = node["output_tooltips"] or [None] * len(node["output"])
    return [
        (name, wire, tip or "", is_list)
        for name, wire, tip, is_list in zip(
            node["output_name"], node["output"], tips, node["output_is_list"]
        )
    ]


def without_words(content: Any) -> Any:
    """Options without what the locales tell. What is off is not told either: the host's next version may leave it out."""
    if isinstance(content, dict):
        return {
            k: without_words(v)
            for k, v in content.items()
            if k not in WORDS and (k == "default" or v is not None and v is not False)
        }
    return (
        [without_words(part) for part in content] if isinstance(content, list | tuple) else content
    )


def grown(name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(id, tooltip) of each socket that a growing input can have; the frontend takes their tooltips from the locales alone."""
    template = options.get("template") or {}
    for entry, (_, *own) in (
        (e, spec) for kind in template.get("input", {}).values() for e, spec in kind.items()
    ):
        tip = (own[0] if own else {}).get("tooltip") or ""
        yield from (
            (f"{name}.{part}", tip)
            for part in template.get("names")
            or [f"{template.get('prefix') or entry}{number}" for number in range(template["max"])]
        )


def shape(nodes: Nodes, lists: Mapping[str, list[str]]) -> dict[str, Any]:
    """What saved workflows and programs rely on: everything but the words, the files at hand and the host's own lists."""
    shapes = {}
    for key, node in nodes.items():
        entries = []
        for name, required, wire, options in inputs(node):
            facts = without_words(options)
            choices = facts.get("options")
            if isinstance(choices, list):
                known = next(
                    (title for title, members in lists.items() if choices == members), None
                )
                files = choices and all(isinstance(c, str) and FILE.fullmatch(c) for c in choices)
                facts["options"] = known or ("files" if files else choices)
            entries.append({"id": name, "type": wire, "required": required, **facts})
        shapes[key] = {
            "display_name": node["display_name"],
            "category": node["category"],
            "inputs": entries,
            "outputs": [
                {"name": name, "type": wire, **({"list": True} if is_list else {})}
                for name, wire, _, is_list in outputs(node)
            ],
            **{
                flag: True
                for flag in ("output_node", "is_input_list", "deprecated", "experimental")
                if node[flag]
            },
        }
    return shapes


def _entries(
    title: str, old: list[dict[str, Any]], new: list[dict[str, Any]], key: str
) -> Iterator[str]:
    before, now = (
        {entry[key]: (place, entry) for place, entry in enumerate(entries, 1)}
        for entries in (old, new)
    )
    yield from (
        f"{title} {name} is gone (it was number {before[name][0]})"
        for name in before
        if name not in now
    )
    yield from (
        f"{title} {name} is new (number {now[name][0]})" for name in now if name not in before
    )
    both = [name for name in before if name in now]
    if both != [name for name in now if name in before]:
        yield f"{title}s stand in another order: {', '.join(before)} became {', '.join(now)}"
    for name in both:
        was, has = before[name][1], now[name][1]
        yield from (
            f"{title} {name}: {fact} was {was.get(fact, 'not set')!r}, is {has.get(fact, 'not set')!r}"
            for fact in {**was, **has}
            if was.get(fact) != has.get(fact)
        )


def differences(old: Nodes, new: Nodes) -> list[str]:
    """One sentence per change from one shape() to another; none where nothing drifted."""
    sentences = [f"{name}: the node is gone" for name in old if name not in new]
    sentences += [f"{name}: the node is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        was, has = old[name], new[name]
        for title, key in (("input", "id"), ("output", "name")):
            sentences += [
                f"{name}: {line}"
                for line in _entries(title, was[f"{title}s"], has[f"{title}s"], key)
            ]
        sentences += [
            f"{name}: {fact} was {was.get(fact)!r}, is {has.get(fact)!r}"
            for fact in {**was, **has}
            if fact not in ("inputs", "outputs") and was.get(fact) != has.get(fact)
        ]
    return sentences


def locale_key(name: str) -> str:
    """The frontend looks ids up with their dots replaced, for a dot is a step in its messages."""
    return name.replace(".", "_")


def english(nodes: Nodes) -> dict[str, dict[str, Any]]:
    """File stem -> content of locales/en, from the schemas."""
    words = {}
    for key, node in nodes.items():
        taken = {}
        for name, _, _, options in inputs(node):
            taken[locale_key(name)] = {
                "name": options.get("display_name") or name,
                "tooltip": options.get("tooltip") or "",
            }
            taken |= {
                locale_key(socket): {"name": socket.split(".")[-1], "tooltip": tip}
                for socket, tip in grown(name, options)
            }
        shown = {
            str(place): {"name": name, "tooltip": tip}
            for place, (name, _, tip, _) in enumerate(outputs(node))
        }
        words[locale_key(key)] = {
            "display_name": node["display_name"],
            "description": node["description"],
            "inputs": taken,
            **({"outputs": shown} if shown else {}),
        }
    categories = {part: part for node in nodes.values() for part in node["category"].split("/")}
    return {"nodeDefs": words, "main": {"nodeCategories": categories}}


def flat(content: Any, path: str = "") -> dict[str, str]:
    """Nested objects as path -> string."""
    if not isinstance(content, dict):
        return {path: content}
    return {
        key: value
        for name, part in content.items()
        for key, value in flat(part, f"{path}.{name}" if path else name).items()
    }


def fingerprint(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def stale(words: Mapping[str, Any], made_from: Mapping[str, str]) -> list[str]:
    """The English strings whose Chinese was written for another sentence, or for none."""
    return [
        f"{path}: {text}"
        for path, text in flat(words).items()
        if made_from.get(path) != fingerprint(text)
    ]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def in_the_environment(arguments: list[str]) -> int:
    """This program again, in dev.py's Python with its host."""
    from environment import Refusal, clean_environment, setup

    try:
        place = setup()
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return subprocess.run(
        [str(place.python), __file__, *arguments],
        env=clean_environment(KINDRED_HOST=str(place.host)),
    ).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accept", action="store_true", help="write the record and locales/en")
    parser.add_argument(
        "--stale", action="store_true", help="tell which Chinese strings are out of date"
    )
    parser.add_argument("--translated", action="store_true", help="remember that none is")
    chosen = parser.parse_args(arguments)
    if not os.environ.get("KINDRED_HOST"):
        return in_the_environment(sys.argv[1:] if arguments is None else arguments)
    from boot import boot

    nodes = object_info(boot(Path(os.environ["KINDRED_HOST"])).NODE_CLASS_MAPPINGS)
    now, words = shape(nodes, host_lists()), english(nodes)
    sentences = differences(read(GOLDEN), now)
    sentences += [
        f"locales/en/{stem}.json is not what the nodes say"
        for stem, content in words.items()
        if read(LOCALES / "en" / f"{stem}.json") != content
    ]
    if chosen.accept:
        write(GOLDEN, now)
        for stem, content in words.items():
            write(LOCALES / "en" / f"{stem}.json", content)
    if chosen.translated:
        write(MADE_FROM, {path: fingerprint(text) for path, text in flat(words).items()})
    if chosen.stale:
        sentences = stale(words, read(MADE_FROM))
    unaccepted = [HOW] if sentences and not (chosen.accept or chosen.stale) else []
    print("\n".join([*sentences, *unaccepted]) if sentences else "Nothing changed.")
    return 1 if sentences and not chosen.accept else 0


if __name__ == "__main__":
    run_program(main)
