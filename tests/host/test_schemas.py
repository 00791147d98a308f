"""Ids, order and ranges of what is saved into workflows do not drift unnoticed: object_info.json is the record."""

import copy

import pytest
import schemas


@pytest.fixture(scope="module")
def shape(host):
    return schemas.shape(schemas.object_info(host.NODE_CLASS_MAPPINGS), schemas.host_lists())


def test_the_nodes_are_as_recorded(shape):
    told = schemas.differences(schemas.read(schemas.GOLDEN), shape)
    assert not told, "\n".join(["Saved workflows and programs rely on these:", *told, schemas.HOW])


def test_the_record_holds_no_files_and_none_of_the_hosts_lists(shape):
    """Else another machine, or the host's next version, would differ."""
    choices = {
        (key, entry["id"]): entry["options"]
        for key, node in shape.items()
        for entry in node["inputs"]
        if "options" in entry
    }
    assert (
        choices["KindredLoadReference", "file"]
        == choices["KindredConceptEncoderLoad", "file"]
        == "files"
    )
    assert choices["KindredAnchorSampler", "sampler_name"] == "the host's samplers"
    assert (
        choices["KindredDDIMInvert", "scheduler"]
        == choices["KindredAnchorSampler", "scheduler"]
        == "the host's schedulers"
    )
    assert choices["KindredDDIMInvert", "method"] == [
        "ddim",
        "edit-friendly ddpm",
        "fireflow",
        "forward noise",
    ]


def drop(node):
    del node["inputs"][1]


def swap(node):
    node["inputs"][0], node["inputs"][1] = node["inputs"][1], node["inputs"][0]


def append(node):
    node["inputs"].append({"id": "more", "type": "INT", "required": True, "default": 1})


def widen(node):
    next(entry for entry in node["inputs"] if entry["id"] == "weight")["max"] = 99.0


def fold(node):
    next(entry for entry in node["inputs"] if entry["id"] == "weight").pop("advanced", None)
    next(entry for entry in node["inputs"] if entry["id"] == "blocks").pop("advanced")


def retype(node):
    node["outputs"][0]["type"] = "LATENT"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (drop, "input reference is gone (it was number 2)"),
        (swap, "inputs stand in another order: model, reference"),
        (append, "input more is new (number "),
        (widen, "input weight: max was 10.0, is 99.0"),
        (fold, "input blocks: advanced was True, is 'not set'"),
        (retype, "output model: type was 'MODEL', is 'LATENT'"),
        (lambda node: node.update(category="Elsewhere"), "category was 'Kindred', is 'Elsewhere'"),
    ],
)
def test_a_drift_is_named(shape, change, sentence):
    other = copy.deepcopy(shape)
    change(other["KindredMaskedSelfAttnInject"])
    told = schemas.differences(shape, other)
    assert [line for line in told if line.startswith("KindredMaskedSelfAttnInject: " + sentence)], (
        told
    )
    assert all(line.startswith("KindredMaskedSelfAttnInject: ") for line in told)


def test_nodes_that_come_and_go_are_named(shape):
    fewer = {key: node for key, node in shape.items() if key != "KindredDDIMInvert"}
    assert schemas.differences(shape, fewer) == ["KindredDDIMInvert: the node is gone"]
    assert schemas.differences(fewer, shape) == ["KindredDDIMInvert: the node is new"]
    assert schemas.differences(shape, copy.deepcopy(shape)) == []


def test_a_growing_input_is_known_socket_by_socket():
    """The frontend names the sockets images.image0 and so on, and looks for their tooltips in the locales alone."""
    taken = {"required": {"image": ["IMAGE", {"tooltip": "a row"}]}}
    spec = {"tooltip": "rows", "template": {"input": taken, "prefix": "picture", "max": 2}}
    assert list(schemas.grown("images", spec)) == [
        ("images.picture0", "a row"),
        ("images.picture1", "a row"),
    ]
    assert list(schemas.grown("images", {"tooltip": "no template"})) == []
    assert schemas.without_words(spec) == {
        "template": {"input": {"required": {"image": ["IMAGE", {}]}}, "prefix": "picture", "max": 2}
    }


def test_what_changed_since_its_translation_is_told():
    words = {"KindredX": {"display_name": "X", "inputs": {"a": {"name": "a", "tooltip": "old"}}}}
    made_from = {path: schemas.fingerprint(text) for path, text in schemas.flat(words).items()}
    assert schemas.stale(words, made_from) == []
    words["KindredX"]["inputs"] |= {"a": {"name": "a", "tooltip": "new"}, "b": {"name": "b"}}
    assert schemas.stale(words, made_from) == [
        "KindredX.inputs.a.tooltip: new",
        "KindredX.inputs.b.name: b",
    ]


@pytest.mark.parametrize("how", ["added", "replaced"])
@pytest.mark.parametrize(
    "name, field, which",
    [
        ("KindredRefUNetCapture", "scheduler", "SCHEDULERS"),
        ("KindredDDIMInvert", "scheduler", "SCHEDULERS"),
        ("KindredAnchorSampler", "scheduler", "SCHEDULERS"),
        ("KindredAnchorSampler", "sampler_name", "SAMPLERS"),
    ],
)
def test_what_a_pack_that_loads_later_adds_is_offered(node, monkeypatch, name, field, which, how):
    """In the host's own list object, or by another list in its place: as the host's KSampler offers it."""
    import comfy.samplers

    theirs = list(getattr(comfy.samplers.KSampler, which))
    if how == "added":
        monkeypatch.setattr(
            comfy.samplers.KSampler, which, theirs
        )  # an object of the test's own, so that it can be added to
        theirs.append("a stranger's")
    else:
        monkeypatch.setattr(comfy.samplers.KSampler, which, [*theirs, "a stranger's"])
    inputs = node(name).INPUT_TYPES()["required"]
    assert "a stranger's" in inputs[field][1]["options"]
