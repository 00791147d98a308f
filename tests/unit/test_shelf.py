"""What a run gave, as tools/client keeps it."""

from shelf import files_of


def test_pictures_that_load_reference_shows_are_no_result():
    graph = {
        "1": {"class_type": "KindredLoadReference", "inputs": {}},
        "2": {"class_type": "SaveImage", "inputs": {}},
    }
    shown, saved = (
        {"images": [{"filename": f"{name}.png", "subfolder": "", "type": kind}]}
        for name, kind in (("subject", "temp"), ("drawn", "output"))
    )
    results = list(files_of(graph, {"1": shown | {"text": ["a cat"]}, "2": saved}))
    assert results == [("KindredLoadReference", 1, "a cat"), ("SaveImage", 1, saved["images"][0])]
