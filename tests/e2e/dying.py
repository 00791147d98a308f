"""A process with the real host whose children save and are killed in the middle: python dying.py HOST, prints what they left as JSON.

Each child is a fork that writes through the nodes and dies at one moment, without a word: no exception, no cleaning up.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != TESTS.parent]
sys.path += [str(TESTS.parent / "tools" / "workshop"), str(TESTS / "host")]

from boot import boot  # noqa: E402

NODES = boot(Path(sys.argv[1]))

import torch  # noqa: E402
from kindred.models.concept.encoder import ConceptEncoder  # noqa: E402
from kindred.models.concept.file import load_concept_encoder  # noqa: E402
from kindred.models.concept.training_state import read_state  # noqa: E402
from kindred.models.reference.file import load_reference, save_reference  # noqa: E402
from kindred.nodes import host  # noqa: E402
from kindred.nodes import training as training_node  # noqa: E402
from kindred.nodes.library import SaveReference  # noqa: E402
from studio import bank_of, fresh_encoder, of_bank  # noqa: E402

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
}
with host.new_reference_path("kindred/reference") as (path, _):
    REFERENCES = path.parent
CONCEPTS = host.concept_folder()


def die(*given: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(module: object, writer: str, wanted: Callable[[Path], bool]) -> None:
    """The writer writes all, half is taken away, and the process dies: as far as a disk may have come."""
    write = getattr(module, writer)

    def cut(content: object, to: Path, *more: object) -> None:
        write(content, to, *more)
        if wanted(Path(to)):
            os.truncate(to, Path(to).stat().st_size // 2)
            die()

    setattr(module, writer, cut)


def at(moment: str, suffix: str, times: int = 1) -> None:
    """Arm this process to die at a moment of the `times`-th save of a file with this suffix."""
    seen: list[str] = []

    def wanted(path: Path) -> bool:
        hit = suffix in (path.parent if path.name == "file.partial" else path).name
        seen.extend([str(path)] * hit)
        return hit and len(seen) == times

    if moment == "half of it is written":
        for module, writer in (
            (sys.modules[save_reference.__module__], "save_file"),
            (sys.modules[ConceptEncoder.save.__module__], "save_file"),
            (torch, "save"),
        ):
            half_written(module, writer, wanted)
        return
    replace, sync, opened = os.replace, os.fsync, []

    def fsync(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if (
            moment == "it is written and not flushed"
            and name.endswith(".partial")
            and wanted(Path(name))
        ):
            die()
        if moment == "it is renamed" and opened and Path(name).is_dir():
            die()
        sync(handle)

    def rename(source: Path, target: Path) -> None:
        hit = moment in ("it is flushed and not renamed", "it is renamed") and wanted(Path(target))
        if hit and moment == "it is flushed and not renamed":
            die()
        replace(source, target)
        if hit:
            opened.append(target)

    os.replace, os.fsync = rename, fsync


def killed_while_it_writes() -> None:
    """The kernel ends the process at the first byte past the limit: a death of the writer's own, whoever it is."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def forked(work: Callable[[], object], arm: Callable[[], None] | None = None) -> int:
    """The exit code of a child that is armed and works: 0 where it lived, minus the signal where it died."""
    child = os.fork()
    if not child:
        try:
            if arm:
                arm()
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(path: Path) -> str | None:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() if path.exists() else None


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def listed() -> dict[str, list[str]]:
    """What the loaders offer of what was written here, and whether all of it loads."""
    import folder_paths

    folder_paths.filename_list_cache.clear()
    references = [name for name in host.reference_files() if (REFERENCES / name).exists()]
    encoders = [name for name in host.concept_files() if (CONCEPTS / name).exists()]
    for name in references:
        load_reference(host.reference_path(name))
    for name in encoders:
        load_concept_encoder(host.concept_path(name))
    return {"references": references, "encoders": encoders}


def emptied() -> None:
    for folder in (REFERENCES, CONCEPTS):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder)
        folder.mkdir()


MOMENTS = [
    "half of it is written",
    "it is written and not flushed",
    "it is flushed and not renamed",
    "it is renamed",
]
ARMS = {
    moment: lambda suffix, times=1, moment=moment: at(moment, suffix, times) for moment in MOMENTS
}
ARMS["the system stops it while it writes"] = lambda suffix, times=1: killed_while_it_writes()


def reference(moment: str) -> dict[str, object]:
    """One reference is there, the second is being saved; then it is saved again."""
    emptied()
    first, second = bank_of(), bank_of(seed=8)
    SaveReference.execute(first)
    kept = digest(REFERENCES / "reference_00001_.safetensors")
    code = forked(lambda: SaveReference.execute(second), lambda: ARMS[moment](".safetensors"))
    told = {
        "code": code,
        "left": left(REFERENCES),
        "listed": listed()["references"],
        "older": digest(REFERENCES / "reference_00001_.safetensors") == kept,
    }
    again = forked(lambda: SaveReference.execute(second))
    names = [name for name in left(REFERENCES) if name.endswith(".safetensors")]
    return told | {
        "again": again,
        "after": left(REFERENCES),
        "listed after": listed()["references"],
        "same": of_bank(load_reference(REFERENCES / names[-1])) == of_bank(second),
    }


def encoder(moment: str) -> dict[str, object]:
    """An encoder is being saved under the name of an older one."""
    emptied()
    path, older, newer = (
        CONCEPTS / "faces.safetensors",
        fresh_encoder(seed=1),
        fresh_encoder(seed=2),
    )
    newer.save(path)
    wanted = digest(path)
    older.save(path)
    kept = digest(path)
    code = forked(lambda: newer.save(path), lambda: ARMS[moment](".safetensors"))
    told = {
        "code": code,
        "left": left(CONCEPTS),
        "listed": listed()["encoders"],
        "older": digest(path) == kept,
        "newer": digest(path) == wanted,
    }
    again = forked(lambda: newer.save(path))
    return told | {
        "again": again,
        "after": left(CONCEPTS),
        "listed after": listed()["encoders"],
        "same": digest(path) == wanted,
    }


def trained(moment: str, suffix: str) -> dict[str, object]:
    """Concept Encoder Train saves every step; the second save of that file is the last. Then the same is queued again."""
    import numpy as np
    from kindred.miniature.world import CLASSES, SCENES, random_identity, render

    training_node.SMALL_TOWER = TOWER
    with torch.inference_mode():
        model, clip, vae = NODES.CheckpointLoaderSimple().load_checkpoint(
            "kindred_miniature.safetensors"
        )
    photo = (
        torch.from_numpy(
            np.stack([render(random_identity(0), CLASSES[0], SCENES[0], 0).image])
        ).float()
        / 255
    )

    def train(name: str) -> None:
        given = {
            "model": model,
            "clip": clip,
            "vae": vae,
            "save_name": name,
            "steps": 3,
            "learning_rate": 3e-3,
            "batch": 1,
            "size": 64,
            "tower": training_node.SMALL,
            "save_every": 1,
        }
        with torch.inference_mode():
            training_node.ConceptEncoderTrain.execute(
                images=[photo], prompt=["a photo"], **{k: [v] for k, v in given.items()}
            )

    path, state = CONCEPTS / "new.safetensors", CONCEPTS / "new.training"
    if not (CONCEPTS / "whole.safetensors").exists():
        emptied()
        forked(lambda: train("whole"))
    code = forked(lambda: train("new"), lambda: ARMS[moment](suffix, 2))
    told = {
        "code": code,
        "left": [name for name in left(CONCEPTS) if "new" in name],
        "listed": listed()["encoders"],
        "steps": [load_concept_encoder(path).config.training["steps"], read_state(state)["step"]],
    }
    again = forked(lambda: train("new"))
    told |= {
        "again": again,
        "after": [name for name in left(CONCEPTS) if "new" in name],
        "listed after": listed()["encoders"],
        "same": digest(path) == digest(CONCEPTS / "whole.safetensors"),
    }
    for name in told["after"]:
        (CONCEPTS / name).unlink()
    return told


def main() -> None:
    bank_of(), bank_of(seed=8)
    gc.collect()
    told = {f"reference: {moment}": reference(moment) for moment in ARMS}
    told |= {f"encoder: {moment}": encoder(moment) for moment in ARMS}
    emptied()
    for suffix, moments in ((".training", MOMENTS[::2]), ("new.safetensors", MOMENTS[2:])):
        told |= {f"training, {suffix}: {moment}": trained(moment, suffix) for moment in moments}
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
