"""What the host says of its prompts and calls, as values."""

from uuid import uuid4

from kindred.models.network.call import Part, Role
from kindred.models.run import Run, Said
from kindred.nodes.host.calls import named_parts, said_in


def test_prompts_get_names_of_their_own() -> None:
    """The host gives the twin of an area prompt the same uuid; PerpNeg and DualCFG have kinds of their own."""
    twin = uuid4()
    conds = {
        "positive": [{"uuid": twin}, {"uuid": twin, "area": (2, 3, 0, 1)}],
        "negative": [{"uuid": twin, "area": None}],
        "middle": [{"uuid": twin}],
        "empty_negative_prompt": [{"uuid": twin}],
    }
    parts = named_parts(conds)
    assert [entry["uuid"] for kind in conds.values() for entry in kind] == [*parts]
    assert len(parts) == 5
    cond, uncond = Part(Role.COND), Part(Role.UNCOND)
    assert [*parts.values()] == [cond, Part(Role.COND, (2, 3, 0, 1)), uncond, cond, uncond]


def test_a_call_is_read_from_the_options() -> None:
    options = {
        "uuids": ["a", "b"],
        "original_shape": [12, 4, 10, 14],
        "block": ("output", 4),
        "block_index": 1,
        "activations_shape": [12, 8, 5, 7],
    }
    assert said_in(options) == Said(("a", "b"), 12, (10, 14), ("output", 4, 1), (5, 7))
    assert said_in({}) == Said((), 0, None, None, ())


def test_several_tiles_stand_one_behind_the_other() -> None:
    """Tiled diffusion hands so many times the rows of the pictures."""
    run = Run(pictures=2, translate=said_in)
    run.expect({"a": Part(Role.COND), "b": Part(Role.UNCOND)})
    for rows, tiles in ((4, 1), (8, 2), (12, 3), (6, 1)):
        parts = run.parts_of({"uuids": ["a", "b"], "original_shape": [rows, 4, 8, 8]})
        assert [part.role for part in parts] == [Role.COND, Role.UNCOND] * tiles
