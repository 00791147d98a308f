"""Which networks nodes/host/networks refuses, and in what words: every class of the host is a row or has a reason."""

from __future__ import annotations

import importlib.util
import inspect
import pydoc
import re

import comfy.model_base
import pytest
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from kindred.nodes.host import networks
from kindred.nodes.host.networks import UNHEARD, require_network
from tiny_networks import READ, REFUSED, build, tiny
from torch import nn


def test_every_refused_package_is_one_of_this_host():
    for name in UNHEARD:
        assert importlib.util.find_spec(name)


def described(kind: type) -> bool:
    """Whether a class of networks is a UNet, a row of the table or refused with a reason."""
    names = tuple(f"{k.__module__}.{k.__qualname__}" for k in kind.__mro__)
    return issubclass(kind, UNetModel) or networks._row(names) is not None


def test_every_network_of_this_host_is_read_or_refused_with_its_reason():
    """A newcomer is described, or says why not: docs/adding_a_network.md."""
    source = inspect.getsource(comfy.model_base)
    names = set(re.findall(r"unet_model=([\w.]+)", source)) - {"unet_model"}
    found = {getattr(comfy.model_base, name, None) or pydoc.locate(name) for name in names}
    assert len(found) > 40 and not [kind.__name__ for kind in found if not described(kind)]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_words(name):
    with pytest.raises(ValueError) as error:
        require_network(tiny(name), "Ref-UNet Feature Capture")
    words = str(error.value)
    assert words.startswith(f"Ref-UNet Feature Capture: {REFUSED[name].config} cannot be read: ")
    assert reason(name) in words and words.endswith("or another that docs/networks.md lists.")


def reason(name: str) -> str:
    if name == "HunyuanImage21Refiner":
        return "it refines a finished picture"
    return "it makes videos"


class ComfyFluxWrapper(nn.Module):
    """A name that another pack gives to a network around which nothing is heard."""


class Unknown(nn.Module):
    """A network that nobody has described."""


@pytest.mark.parametrize("network, why, remedy", [
    (ComfyFluxWrapper, "kernels of its own (nunchaku)", "Load the same model in bf16, fp8 or GGUF instead."),
    (Unknown, "does not know the network Unknown", "Remove the node that puts a network of its own there.")])  # fmt: skip
def test_a_foreign_network_is_refused(network, why, remedy):
    model = tiny("Flux").clone()
    model.add_object_patch("diffusion_model", network())
    with pytest.raises(ValueError) as error:
        require_network(model, "Node")
    assert (
        str(error.value).startswith("Node: Flux cannot be read: ")
        and why in str(error.value)
        and str(error.value).endswith(remedy)
    )


def test_a_foreign_heir_of_a_host_class_is_refused_by_its_name():
    import comfy.ldm.qwen_image.model

    heir = type(
        "NunchakuQwenImageTransformer2DModel",
        (comfy.ldm.qwen_image.model.QwenImageTransformer2DModel,),
        {},
    )
    model = build(READ["QwenImage"])
    model.model.diffusion_model.__class__ = heir
    with pytest.raises(ValueError, match="nunchaku"):
        require_network(model, "Node")
