"""The short form of the suite asks every law, and every network many of them."""

from gate import MANY, left_to_the_long_form

FAMILIES = [f"family{i}" for i in range(30)]


def cells(law: str, file: str = "test_networks") -> list[str]:
    return [f"tests/host/{file}.py::test_{law}[{name}]" for name in FAMILIES]


def test_a_law_of_many_cells_is_asked_of_a_third():
    assert len(cells("felt")) - len(left_to_the_long_form(cells("felt"))) == 10


def test_every_network_is_asked_of_some_of_twenty_laws():
    laws = [cell for i in range(20) for cell in cells(f"law{i}")]
    asked = set(laws) - left_to_the_long_form(laws)
    assert {cell.partition("[")[2][:-1] for cell in asked} == set(FAMILIES)


def test_what_is_left_does_not_depend_on_what_else_was_collected():
    both = left_to_the_long_form(cells("felt") + cells("kept"))
    assert both & set(cells("felt")) == left_to_the_long_form(cells("felt"))


def test_laws_of_few_cells_and_other_files_are_asked_whole():
    few = cells("felt")[: MANY - 1]
    assert not left_to_the_long_form(
        [*few, *cells("felt", "test_story"), "tests/host/test_networks.py::test_one"]
    )
