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


def boot(host: Path, cpu: bool = True, pack: bool = True) -> ModuleType:
    """Start ComfyUI in process with a temporary base directory, load the pack, and let `kindred` mean the loaded one.

    pack: False leaves the host alone. Returns the host's `nodes` module. Raises RuntimeError when the folder is no ComfyUI or the
    pack does not load.
    """
    if not (host / "main.py").is_file():
        raise RuntimeError(f"KINDRED_HOST is {host}, which holds no main.py")
    base = tempfile.mkdtemp(prefix="kindred-host-")
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    sys.path.insert(0, str(host))
    argv, sys.argv = (
        sys.argv,
        ["main.py", *["--cpu"] * cpu, "--use-pytorch-cross-attention", "--base-directory", base],
    )
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  reads sys.argv now

        import nodes
    finally:
        sys.argv = argv
    for name in ("input", "output", "temp", "user"):
        (Path(base) / name).mkdir(exist_ok=True)
    if not pack:
        return nodes
    if not asyncio.run(nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")):
        raise RuntimeError("ComfyUI could not load the pack; its log above says why")
    loaded = str(ROOT).replace(".", "_x_")  # the host's own naming
    for name in [name for name in sys.modules if name == "kindred" or name.startswith("kindred.")]:
        del sys.modules[name]
    for name, module in list(sys.modules.items()):
        if name == loaded or name.startswith(loaded + "."):
            sys.modules["kindred" + name[len(loaded) :]] = module
    return nodes
