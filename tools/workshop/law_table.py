"""Writes the table of laws in docs/networks.md: every family of transformers against every law, from a run of the tests.

python3 tools/workshop/law_table.py             runs them (two minutes) and writes the table
python3 tools/workshop/law_table.py --from FILE  takes the JUnit report of a run that there was

Runs in the environment of dev.py, or with KINDRED_HOST in the Python at hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "client"))

from terminal import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "networks.md"
BEGIN, END = "<!-- laws: tools/workshop/law_table.py writes this -->", "<!-- end of laws -->"
ROOM = "tests/host"
LAWS = {  # heading of a column: file and test
    "calls": "test_networks.py::test_a_pass_makes_the_calls_that_the_backbone_says",
    "place": "test_networks.py::test_one_changed_patch_is_one_changed_token_of_the_picture",
    "keys": "test_networks.py::test_keys_beside_another_text_are_those_that_the_backbone_turns",
    "turned": "test_networks.py::test_keys_turned_to_another_place_are_those_that_the_host_makes_there",
    "noise": "test_networks.py::test_noise_is_mixed_as_the_host_mixes_it",
    "felt, gone": "test_transformers.py::test_a_reference_is_felt_and_gone_with_its_node",
    "itself": "test_transformers.py::test_a_picture_that_reads_itself_stays_as_it_is",
    "text": "test_transformers.py::test_the_text_keeps_its_share_unless_told_otherwise",
    "window": "test_transformers.py::test_outside_of_its_window_nothing_is_touched",
    "stands": "test_placed_references.py::test_each_place_is_felt_and_a_middle_of_one_size_is_its_own",
    "held, live": "test_transformers.py::test_held_or_read_anew_the_reference_is_the_same",
    "inverted": "test_transformers.py::test_an_inversion_and_its_latent_lead_to_the_same_reference",
    "samplers": "test_transformers.py::test_it_is_felt_however_one_samples",
    "saved": "test_transformers.py::test_a_saved_reference_draws_the_same_picture",
    "sizes": "test_transformers.py::test_odd_sizes_and_other_texts_are_read_too",
    "drawn": "test_transformers.py::test_a_reference_is_drawn",
    "word": "test_transformer_words.py::test_the_mask_is_where_the_picture_looks_at_the_word",
    "concept": "test_transformer_concepts.py::test_a_photo_is_felt_and_gone_with_its_node",
    "silent": "test_transformer_concepts.py::test_values_of_zero_are_the_plain_picture",
    "rows": "test_transformer_concepts.py::test_rows_of_the_text_stay_as_they_are",
    "split": "test_transformer_concepts.py::test_halves_in_two_calls_are_halves_in_one",
    "both": "test_transformer_concepts.py::test_both_injections_in_either_order",
    "shared": "test_transformer_stories.py::test_the_others_are_felt_and_gone_with_the_node",
    "nothing": "test_transformer_stories.py::test_where_nothing_is_shared_no_bit_changes",
    "windows": "test_transformer_stories.py::test_outside_of_their_windows_blending_and_injection_change_no_bit",
    "order": "test_transformer_stories.py::test_the_order_of_the_pictures_is_irrelevant",
    "extras": "test_transformer_stories.py::test_extras_change_neither_the_anchors_nor_one_another",
    "equal": "test_transformer_stories.py::test_equal_pictures_stay_as_they_are_and_the_text_keeps_its_share",
    "story, samplers": "test_transformer_stories.py::test_it_is_felt_however_one_samples",
    "halves": "test_transformer_stories.py::test_cond_and_uncond_in_one_call_or_in_two",
    "blended, mixed": "test_transformer_stories.py::test_blended_queries_and_injected_features_are_felt",
    "by word": "test_transformer_stories.py::test_the_word_finds_the_subject",
}
MEANINGS = {
    "calls": "a pass makes the attention calls that the table above says",
    "place": "one changed patch of the picture is one changed token where the picture is looked for",
    "keys": "keys beside another text are the same, or the same once turned (1e-6)",
    "turned": "keys turned to another place are those that the network makes there (1e-5)",
    "noise": "the noise is mixed as ComfyUI mixes it",
    "felt, gone": "another photo changes the picture; without the node the plain picture is back, bit for bit",
    "itself": "a picture that reads itself stays as it is, at every weight (1e-5)",
    "text": "the prompt keeps its share, and only *plain* dims it",
    "window": "outside of its steps a reference changes no bit",
    "stands": "each place of a reference is another picture; centred, a photo of the picture's size is at its own place (1e-5)",
    "held, live": "a reference that is held and one that is read anew draw the same picture (1e-5)",
    "inverted": "DDIM Invert and a latent lead to the same reference, finite at full noise",
    "samplers": "CFG 1, three pictures, heun, an ancestral and an SDE sampler, other steps",
    "saved": "saved and loaded, live or held: the same picture, bit for bit",
    "sizes": "a photo of another and odd size, a prompt of another length",
    "drawn": "Reference Preview's latents are as the family's VAE takes them",
    "word": "the mask found by a word is where the picture looks at it, by a planted signal",
    "concept": "another photo of a concept changes the picture; without the node the plain picture is back, bit for bit",
    "silent": "a concept whose values are 0 is the plain picture, bit for bit",
    "rows": "where a concept is read, the text's rows keep every bit",
    "split": "the halves of guidance read a concept in two calls as in one (1e-5)",
    "both": "both injections of paper A on one MODEL, in either order (1e-5)",
    "shared": "a story's pictures feel one another; without the node the plain ones are back, bit for bit",
    "nothing": "strength 0, dropout 1, black masks, one picture alone: the plain pictures, bit for bit",
    "windows": "blending and injection outside of their windows change no bit",
    "order": "the order of the pictures does not matter where all read all (5e-4)",
    "extras": "further pictures change neither the anchors nor one another (5e-4)",
    "equal": "equal pictures that read one another stay as they are, and only *plain* dims the prompt (1e-5)",
    "story, samplers": "a whole story with CFG 1, heun and an SDE sampler, and of four steps",
    "halves": "cond and uncond in one call or in two (5e-4)",
    "blended, mixed": "query blending and feature injection are felt, each alone",
    "by word": "a story whose subject is found by its word; its first step is plain",
}


def family_of(name: str, families: Sequence[str]) -> str | None:
    """The family in a test's parameters: "test_x[heun-Flux]" -> "Flux"."""
    parameters = re.search(r"\[(.*)\]$", name)
    if not parameters:
        return None
    inner = parameters[1]
    return next(
        (f for f in families if inner == f or inner.endswith(f"-{f}") or inner.startswith(f"{f}-")),
        None,
    )


def outcomes(report: Path, families: Sequence[str]) -> Mapping[tuple[str, str], list[bool]]:
    """(family, test) -> whether each of its cases passed, of a JUnit report."""
    passed: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name, file = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
        family = family_of(name, families)
        if family is not None:
            test = f"{file}.py::{name.partition('[')[0]}"
            failed = any(child.tag in ("failure", "error", "skipped") for child in case)
            passed[family, test].append(not failed)
    return passed


def table(passed: Mapping[tuple[str, str], list[bool]], families: Sequence[str]) -> str:
    """The page's part between its two marks."""
    lines = [
        f"| family | {' | '.join(LAWS)} |",
        f"| --- |{' --- |' * len(LAWS)}",
    ]
    for family in families:
        cells = [_cell(passed.get((family, test), [])) for test in LAWS.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    meanings = [f"* *{law}*: {text}." for law, text in MEANINGS.items()]
    return "\n".join([BEGIN, *lines, "", *meanings, END])


def _cell(cases: list[bool]) -> str:
    """How many cases of a law hold; nothing where the law does not ask this family."""
    if not cases:
        return ""
    return str(len(cases)) if all(cases) else f"**{sum(cases)} of {len(cases)}**"


def families_read() -> list[str]:
    """The names of the tiny networks that are read, in their order."""
    text = (ROOT / ROOM / "tiny_networks.py").read_text("utf-8")
    rows = text[text.index("READ: dict") : text.index("REFUSED: dict")]
    return re.findall(r'^    "([^"]+)": Family\(', rows, re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="report", type=Path, metavar="FILE", help="a JUnit report")
    chosen = parser.parse_args(arguments)
    families = families_read()
    with tempfile.TemporaryDirectory() as folder:
        report, code = chosen.report or Path(folder, "report.xml"), 0
        if chosen.report is None:
            tests = [
                f"{ROOM}/{file}" for file in dict.fromkeys(t.split("::")[0] for t in LAWS.values())
            ]
            options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *tests, *options], cwd=ROOT
            ).returncode
        written = table(outcomes(report, families), families)
    page = PAGE.read_text("utf-8")
    before, after = page[: page.index(BEGIN)], page[page.index(END) + len(END) :]
    PAGE.write_text(before + written + after, "utf-8")
    return code


if __name__ == "__main__":
    run_program(main)
