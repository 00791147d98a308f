"""The pack inside the real host."""
import sys

from client import ROOT


def test_the_host_loads_the_pack(pack, host):
    """The names that tests import are the modules that the host runs, not a second copy."""
    assert sys.modules["kindred"] is pack and pack.__file__ == str(ROOT / "__init__.py")
    offered = {name: node for name, node in host.NODE_CLASS_MAPPINGS.items() if name.startswith("Kindred")}
    assert all(node.RELATIVE_PYTHON_MODULE == f"custom_nodes.{ROOT.name}" for node in offered.values())
    assert all(sys.modules[node.__module__].__name__.startswith(pack.__name__) for node in offered.values())


def test_the_pack_leaves_only_its_two_names_at_the_door(pack):
    """V1's NODE_CLASS_MAPPINGS would silently win over comfy_entrypoint."""
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS") and callable(pack.comfy_entrypoint) and pack.WEB_DIRECTORY == "./web"
