"""Load Photo in the real host: the examples, the input folder, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch
from kindred.nodes.photos import EXAMPLES, LoadPhoto, offer_examples
from PIL import Image


def listed() -> list[str]:
    return next(i for i in LoadPhoto.define_schema().inputs if i.id == "image").options


def test_the_examples_come_first_and_load_without_anything_in_the_input_folder():
    offer_examples()
    names = listed()[: len(EXAMPLES)]
    assert names == [f"kindred_{path.name} [temp]" for path in EXAMPLES]
    for name, path in zip(names, EXAMPLES):
        image, mask = LoadPhoto.execute(name).result
        with Image.open(path) as picture:
            assert image.shape == (1, picture.height, picture.width, 3)
        assert not mask.any()


def test_an_example_comes_back_where_somebody_emptied_the_temp_folder():
    offer_examples()
    for file in Path(folder_paths.get_temp_directory()).glob("kindred_reference.png"):
        file.unlink()
    assert LoadPhoto.validate_inputs("kindred_reference.png [temp]") is True
    assert LoadPhoto.execute("kindred_reference.png [temp]").result[0].shape[0] == 1


def test_a_picture_of_the_input_folder_is_listed_and_read_as_load_image_reads_it():
    import nodes

    path = Path(folder_paths.get_input_directory(), "kindred_test_photo.png")
    picture = Image.new("RGBA", (24, 16), (255, 0, 0, 128))
    picture.save(path)
    try:
        assert path.name in listed()
        ours, theirs = LoadPhoto.execute(path.name).result, nodes.LoadImage().load_image(path.name)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        before = LoadPhoto.fingerprint_inputs(path.name)
        picture.save(path, optimize=False, compress_level=0)
        assert LoadPhoto.fingerprint_inputs(path.name) != before
    finally:
        path.unlink()


@pytest.mark.parametrize("name", ["gone.png", "gone.png [temp]", ""])
def test_what_is_not_there_is_a_sentence(name):
    answer = LoadPhoto.validate_inputs(name)
    assert isinstance(answer, str) and repr(name) in answer and "Choose" in answer
