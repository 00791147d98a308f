"""The real ComfyUI in this process, on the CPU, with the pack loaded by the host's own loader: for tests and measurements."""

from __future__ import annotations

import asyncio
import atexit
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from checkout import ROOT

ATTENTION = {  # the host's flag, and what it then calls its attention
    "pytorch": ("--use-pytorch-cross-attention", "attention_pytorch"),
    "sub-quadratic": ("--use-quad-cross-attention", "attention_sub_quad"),
}


def boot(host: Path, cpu: bool = True, pack: bool = True, attention: str = "pytorch") -> ModuleType:
    """Start ComfyUI in process with a temporary base directory, load the pack, and let `kindred` mean the loaded one.

    pack: False leaves the host alone. Returns the host's `nodes` module. Raises RuntimeError when the folder is no ComfyUI or the
    pack does not load.
    """
    nodes = start(host, cpu, attention)
    if pack:
        load_pack(nodes)
    return nodes


def start(host: Path, cpu: bool, attention: str) -> ModuleType:
    """The host alone. It reads its command line once, while it is imported, so the first start of a process decides."""
    if not (host / "main.py").is_file():
        raise RuntimeError(
            f"{host} holds no main.py. Name ComfyUI's own folder with --host or KINDRED_HOST, or run through dev.py."
        )
    base = tempfile.mkdtemp(prefix="kindred-host-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    sys.path.insert(0, str(host))
    flag, wanted = ATTENTION[attention]
    argv, sys.argv = sys.argv, ["main.py", *["--cpu"] * cpu, flag, "--base-directory", base]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv now

        import nodes
    finally:
        sys.argv = argv
    for name in ("input", "output", "temp", "user"):
        (Path(base) / name).mkdir(exist_ok=True)
    return nodes


def load_pack(nodes: ModuleType) -> None:
    """By the host's own loader; `import kindred` then gives what was loaded."""
    if not asyncio.run(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")):
        raise RuntimeError("ComfyUI could not load the pack; its log above says why")
    loaded = str(ROOT).replace(".", "_x_")  # the host's own naming
    for name in [name for name in sys.modules if name == "kindred" or name.startswith("kindred.")]:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name == loaded or name.startswith(loaded + "."):
            sys.modules["kindred" + name[len(loaded) :]] = module
