"""The files of the archive are enough: unpacked elsewhere, in a folder of another name, they give the same nodes and the same files."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import schemas
from archive import ROOT, shipped

SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import boot, schemas
boot.ROOT = Path(sys.argv[2])
told = schemas.object_info(boot.boot(Path(os.environ["KINDRED_HOST"])).NODE_CLASS_MAPPINGS)
import folder_paths
miniature = folder_paths.get_full_path("checkpoints", "kindred_miniature.safetensors")
print("told", json.dumps([told, miniature, [m.__file__ for n, m in sys.modules.items() if n.startswith("kindred") and m.__file__]]))
"""


@pytest.mark.slow
def test_the_archive_is_the_pack(host, tmp_path):
    folder, names = tmp_path / "Kindred-main", shipped()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "tools" / "workshop"), str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    answer = [line for line in run.stdout.splitlines() if line.startswith("told ")]
    assert answer, run.stderr[-2000:]
    told, miniature, modules = json.loads(answer[0][5:])
    assert modules and all(path.startswith(str(folder)) for path in (*modules, miniature))
    here = schemas.object_info(host.NODE_CLASS_MAPPINGS)
    assert {node.pop("python_module") for node in told.values()} == {"custom_nodes.Kindred-main"}
    assert told == json.loads(
        json.dumps(
            {
                key: {k: v for k, v in node.items() if k != "python_module"}
                for key, node in here.items()
            }
        )
    )
    assert {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    } == set(names), "the pack wrote into itself"
