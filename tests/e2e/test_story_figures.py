"""The story demo's figures, on renderings whose truth is known; not among the unit tests, since the autoencoder takes its time."""

from __future__ import annotations

import story_figures
from kindred.miniature import reader
from kindred.miniature.world import held_out_identity, render
from PIL import Image
from story_figures import HELD_OUT, SCENES, SECOND, SUBJECT, figures_of


def drawn(identity: int, kind: str, scenes, pose: int = 50) -> list[Image.Image]:
    return [
        Image.fromarray(render(held_out_identity(identity), kind, scene, pose + i).image)
        for i, scene in enumerate(scenes)
    ]


def test_figures_tell_one_subject_from_many(monkeypatch):
    """Renderings of one identity beside renderings of four; the subject of the photos beside another one."""
    few, limits = (
        reader.floor_and_ceiling,
        story_figures.limits,
    )  # of fewer renderings: the autoencoder takes its time
    monkeypatch.setattr(reader, "floor_and_ceiling", lambda *given: few(*given, count=10))
    monkeypatch.setattr(story_figures, "limits", lambda *given: limits(*given, count=4))
    scenes, more = SCENES["story"], SCENES["anchors"] + SCENES["more_pictures"]
    many = [drawn(i + 20, SUBJECT, scenes[i : i + 1])[0] for i in range(4)]
    saved = drawn(9, SECOND, more)
    figures = figures_of(
        {
            "plain": many,
            "story": drawn(31, SUBJECT, scenes),
            "photo_story": drawn(HELD_OUT, SUBJECT, scenes),
            "anchors": saved[:2],
            "more_pictures": saved[2:],
        }
    )
    for name in ("story", "photo_story", "more_pictures"):
        assert figures[f"consistency.{name}"] > figures["consistency.plain"] + 0.3
        assert figures[f"scene_accuracy.{name}"] == figures[f"class_accuracy.{name}"] == 1
    assert figures["consistency.floor"] + 0.3 < figures["consistency.ceiling"] < 1
    assert abs(figures["consistency.plain"] - figures["consistency.floor"]) < 0.2
    assert figures["identity.photo_story"] > 0.8 > 0.5 > figures["identity.plain"]
    assert figures["identity.floor"] + 0.4 < figures["identity.ceiling"]
    assert figures["layout_spread.story"] > 0 and figures["count.sets"] == 1
