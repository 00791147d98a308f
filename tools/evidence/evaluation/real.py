"""The other ground: a checkpoint of the user's, photos and prompts, judged by CLIP, DINOv2, faces and an aesthetic head."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniature_host import Studio

from .catalogue import CONTROL, PLAIN_STORY, TABLE_2
from .ground import BOUNDS, Job, Setting, keep
from .rows import CONCEPT, Row, rows_of
from .tables import Column, Ground, Table

if TYPE_CHECKING:
    from .judges import Judge

COSINE = "CLIP's raw cosine with the prompt"
DLIB = "dlib"  # the word for --faces, where FaceNet has a file
INSTALL_DLIB = "pip install dlib-bin face-recognition-models"
TIME = Column("seconds", "seconds per picture", digits=1)
# the papers' columns first, in their order
REAL = {
    "personalize": Ground(
        "personalize",
        (
            Column("text", "CLIP text", "text_clip", 4, error=True),
            Column("face_2_minus_d", "face 2 - d", "face_closeness", 4, error=True),
            Column("aesthetic", "aesthetic", "aesthetic", 4, error=True),
            TIME,
            Column("seconds_reference", "to read the photo", digits=1),
            Column("image", "CLIP image", "image_clip", 4, error=True),
            Column("dino", "DINO", "dino", 4, error=True),
            Column("face_cosine", "face cosine", "face_cosine", 4),
            Column("face_distance", "face distance d", "face_distance", 4),
            Column("face_found", "faces found", "face_found"),
            Column("memory_gib", "peak GiB", "memory", 1),
            Column("unet_calls", "UNet calls", digits=0),
        ),
        "image",
        ("text",),
        ("identity", "identities"),
        COSINE,
    ),
    "story": Ground(
        "story",
        (
            Column("text", "CLIP text", "text_clip", 4, error=True),
            Column("consistency", "CLIP consistency", "consistency", 4, error=True),
            Column("dino_consistency", "DINO consistency", "dino_consistency", 4, error=True),
            Column("aesthetic", "aesthetic", "aesthetic", 4),
            TIME,
            Column("memory_gib", "peak GiB", "memory", 1),
            Column("unet_calls", "UNet calls", digits=0),
        ),
        "consistency",
        ("text",),
        ("set", "sets"),
        COSINE,
    ),
}
# what paper A reports (its Tables 1 and 2; its identity column can only be 2 - d or a like transform, method.md 2.5)
PAPER_A = """The paper's own numbers, on its own pictures; CLIP's variant, prompts and identities are not stated in it:

| | T-I consistency | identity | quality | time (s) |
|---|---:|---:|---:|---:|
| Textual Inversion | 0.2332 | 1.4261 | 6.4249 | 1000 |
| DreamBooth | 0.3032 | 1.5271 | 6.6285 | 500 |
| ELITE | 0.2109 | 1.2172 | 6.0725 | 50 |
| without injection | 0.3814 | 0.8392 | 6.6586 | |
| only cross-attention injection | 0.3227 | 1.3298 | 6.0573 | |
| only self-attention injection | 0.3164 | 1.3103 | 6.4166 | |
| full | 0.3526 | 1.4251 | 6.6489 | 10 |"""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
GIB = 2**30


@dataclass(frozen=True)
class Files:
    """What the user gives; a judge whose file is missing measures nothing."""

    checkpoint: Path
    prompts: Path
    subject: str = ""
    references: Path | None = None
    concept_encoder: Path | None = None
    concept_vision: Path | None = None  # the tower that IP-Adapter weights need
    clip_vision: Path | None = None
    clip_text: Path | None = None
    aesthetic: Path | None = None
    dino: Path | None = None
    faces: Path | str | None = None  # DLIB, or FaceNet's weights
    size: int = 0  # pixels of a side; 0: what the checkpoint was trained at
    batch: int = 4  # pictures that are sampled at once

    def __post_init__(self) -> None:
        for name, path in self.paths().items():
            if not (path.is_dir() if name == "references" else path.is_file()):
                raise SystemExit(
                    f"evaluate: --{name.replace('_', '-')} is {path}, but there is no such "
                    f"{'folder' if name == 'references' else 'file'}."
                )
        if (self.aesthetic or self.clip_text) and not self.clip_vision:
            raise SystemExit(
                "evaluate: --aesthetic and --clip-text judge what --clip-vision sees. Give CLIP ViT-L/14's tower as well."
            )
        if self.size % 8 or self.size < 0:
            raise SystemExit(
                f"evaluate: --size is {self.size}, which is no multiple of 8. Take {max(self.size // 8 * 8, 64)}."
            )

    def paths(self) -> dict[str, Path]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Path)}

    def photos(self) -> list[tuple[Path, str]]:
        """Every photo with the word of its subject: its folder's name, or --subject for those that lie in no folder of their own."""
        if self.references is None:
            return []
        files = sorted(
            path
            for path in self.references.rglob("*")
            if path.suffix.lower() in SUFFIXES and path.is_file()
        )
        photos = [
            (path, path.parent.name if path.parent != self.references else self.subject)
            for path in files
        ]
        if not photos:
            raise SystemExit(
                f"evaluate: --references is {self.references}, which holds no picture ({', '.join(SUFFIXES)})."
            )
        if nameless := [path.name for path, word in photos if not word]:
            raise SystemExit(
                f"evaluate: what does {nameless[0]} show? Give --subject, or put photos into folders named by their "
                "subjects."
            )
        return photos

    def sets(self) -> list[list[str]]:
        """The prompts, by the blank lines between them."""
        try:
            parts = re.split(
                r"\n\s*\n", self.prompts.read_text("utf-8-sig")
            )  # Notepad's mark is no part of a prompt
        except UnicodeDecodeError as error:
            raise SystemExit(
                f"evaluate: {self.prompts} is no UTF-8 text ({error}). Save it as UTF-8."
            ) from None
        if not (
            sets := [
                lines
                for part in parts
                if (lines := [line.strip() for line in part.splitlines() if line.strip()])
            ]
        ):
            raise SystemExit(
                f"evaluate: --prompts is {self.prompts}, which holds no prompt. Write one per line; {{subject}} stands for "
                "the word."
            )
        return sets

    def with_subject(self, lines: Sequence[str], word: str) -> tuple[str, ...]:
        """Prompts about a subject. SystemExit for one that does not name it: its mask could not be found."""
        named = tuple(line.replace("{subject}", word) for line in lines)
        edge = r"\b" if word.isascii() else ""  # Chinese words stand without spaces
        if without := [
            line
            for line in named
            if not re.search(f"{edge}{re.escape(word)}{edge}", line, re.IGNORECASE)
        ]:
            raise SystemExit(
                f"evaluate: the prompt {without[0]!r} does not name the subject {word!r}. Write {{subject}} where it belongs."
            )
        return named


@dataclass(frozen=True)
class RealSetting(Setting):
    """A run on the user's files."""

    files: Files | None = None

    def of(self, job: Job) -> dict[str, Any]:
        """As on the miniature, with the photo and all prompts, or the set, and every file by name, size and time."""
        import torch

        files = self.files
        facts = {
            name: state(path)
            for name, path in files.paths().items()
            if name not in ("references", "prompts")
        } | ({"faces": DLIB} if files.faces == DLIB else {})
        if job.task == "personalize":
            path, word = files.photos()[job.case]
            case = [
                path.relative_to(files.references).as_posix(),
                *state(path)[1:],
                word,
                files.sets(),
            ]
        else:
            case = files.sets()[job.case]
        return super().of(job) | {
            "ground": facts,
            "case": case,
            "subject": files.subject,
            "size": files.size,
            "batch": files.batch,
            "device": str(torch.accelerator.current_accelerator() or "cpu"),
        }


def state(path: Path) -> list[Any]:
    """What changes when a file does."""
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def tables(files: Files, task: str) -> list[Table]:
    """Table 2's rows on every photo, or a story beside the plain prompts on every set. SystemExit where a file is missing for them."""
    story = task == "story" or (task == "all" and not files.references)
    if not (files.clip_vision or files.dino or (files.faces and not story)):
        raise SystemExit(
            f"evaluate: nothing would be judged. Give --clip-vision or --dino{'' if story else ' or --faces'}."
        )
    wanted = []
    if task == "personalize" or (task == "all" and files.references):
        wanted.append(personalize_table(files))
    if story:
        wanted.append(story_table(files))
    return wanted


def personalize_table(files: Files) -> Table:
    if not files.references:
        raise SystemExit("evaluate: --task personalize needs --references, a folder of photos.")
    rows = {
        name: inputs
        for name, inputs in TABLE_2.items()
        if CONTROL not in inputs and (files.concept_encoder or "concept" not in inputs)
    }
    every = [line for part in files.sets() for line in part]
    for _, word in files.photos():
        files.with_subject(every, word)
    return Table(
        "table_2",
        "Paper A, Tables 1 and 2",
        "personalize",
        rows_of("personalize", rows),
        len(files.photos()),
    )


def story_table(files: Files) -> Table:
    if not files.subject:
        raise SystemExit(
            "evaluate: --task story needs --subject, the word that the prompts of every set share."
        )
    for number, lines in enumerate(files.sets(), 1):
        files.with_subject(lines, files.subject)
        if len(lines) < 2:
            raise SystemExit(
                f"evaluate: set {number} of {files.prompts} is one prompt, and a story has 2 at least. Sets are parted by "
                "blank lines."
            )
    return Table(
        "story",
        "Paper B, Fig. 8",
        "story",
        rows_of("story", {"plain": PLAIN_STORY, "story": ""}),
        len(files.sets()),
    )


class RealStudio(Studio):
    """A checkpoint of the user's in the host of this process, on its GPU if there is one."""

    def __init__(self, setting: RealSetting) -> None:
        import torch

        self.files = setting.files
        self.batch = self.files.batch
        accelerated = torch.accelerator.is_available()
        super().__init__(setting.host, setting.steps, setting.cfg, cpu=not accelerated)
        if accelerated:  # loading and compiling are nobody's time
            self.steps = 1
            self.sample(self.model, self.prompts(["warm-up"]), 1, 0)
            self.steps = setting.steps

    def load(self) -> tuple[Any, Any, Any]:
        import comfy.sd
        from demo_report import native_size

        files = self.files
        self.size = files.size or native_size(files.checkpoint)
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(files.checkpoint))[:3]
        if clip is None or vae is None:
            lacks = "text encoder" if clip is None else "VAE"
            raise ValueError(
                f"evaluate: {files.checkpoint} holds no {lacks}. Give a whole checkpoint."
            )
        return model, clip, vae

    @cached_property
    def encoder(self) -> Any:
        import folder_paths

        path = self.files.concept_encoder
        folder_paths.add_model_folder_path("concept_encoders", str(path.parent))
        tower = {}
        if self.files.concept_vision:
            import comfy.clip_vision

            tower = {"clip_vision": comfy.clip_vision.load(str(self.files.concept_vision))}
        return self.run("KindredConceptEncoderLoad", file=path.name, **tower)[0]


class Real:
    """The user's checkpoint, and paper A's and paper B's ways to measure it."""

    def __init__(self, setting: RealSetting) -> None:
        self.files = setting.files
        try:
            self.studio = RealStudio(
                setting
            )  # boots the host, before anything of the pack is imported
            self.judges = list(judges(self.files))
        except ValueError as error:  # it names the file and the remedy
            raise SystemExit(str(error)) from error
        from .personalize import Personalize
        from .story import Story

        self.tasks = {
            "personalize": Personalize(self.studio, self.photo),
            "story": Story(self.studio, self.set),
        }

    def __call__(self, job: Job) -> dict[str, Any]:
        if job.row == BOUNDS:
            if job.pictures and job.task == "personalize":
                keep(self.photo(job.case).photo, job.pictures)
            return {}
        if (torch := self.studio.torch).cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        values, images = self.tasks[job.task].measure(job.row, job.case, job.seed)
        if job.pictures:
            keep(images, job.pictures)
        return values

    def photo(self, number: int) -> Any:
        from pictures import read_picture, square

        from .personalize import Subject

        path, word = self.files.photos()[number]
        prompts = self.files.with_subject(
            [line for part in self.files.sets() for line in part], word
        )
        photo = self.studio.picture(square(read_picture(path), self.studio.size))
        return Subject(
            photo,
            word,
            f"a photo of a {word}",
            prompts,
            lambda images: self.judged(images, prompts, (photo[0],)),
        )

    def set(self, number: int) -> Any:
        from .story import StorySet

        prompts = self.files.with_subject(self.files.sets()[number], self.files.subject)
        return StorySet(
            self.files.subject, prompts, lambda images: self.judged(images, prompts, ())
        )

    def judged(
        self, images: Any, prompts: tuple[str, ...], photos: tuple[Any, ...]
    ) -> dict[str, Any]:
        from .judges import Request

        values: dict[str, Any] = {
            "memory_gib": peak_memory(self.studio.torch)
        }  # before the judges take theirs
        for judge in self.judges:
            values |= judge(images.float().cpu(), Request(prompts, photos))
        return values | {
            "judged_by": {
                column.name: column.meaning for judge in self.judges for column in judge.columns
            }
        }


def judges(files: Files) -> Iterator[Judge]:
    """Those whose files were given."""
    from .faces import load_faces
    from .judges import Clip, Dino, load_head, load_text, load_vision

    if files.clip_vision:
        yield Clip(
            load_vision(files.clip_vision),
            load_text(files.clip_text) if files.clip_text else None,
            load_head(files.aesthetic) if files.aesthetic else None,
        )
    if files.dino:
        yield Dino(load_vision(files.dino))
    if files.faces:
        yield load_faces(files.faces)


def peak_memory(torch: Any) -> float:
    """GiB: on a GPU the most that was allocated since the last reset, else the most that this process ever held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        GIB if sys.platform == "darwin" else 2**20
    )  # bytes, or KiB


def refuse(rows: Sequence[Row], files: Files) -> None:
    """SystemExit for what only the miniature knows, and for what needs a file that was not given."""
    if not files.concept_encoder and (wrong := [row.name for row in rows if row.of(CONCEPT)]):
        raise SystemExit(
            f"evaluate: row {wrong[0]!r} sets an input of Cross-Attn Detail Inject. Give a --concept-encoder."
        )
    if wrong := [row.name for row in rows if row.get("rival", "none") != "none"]:
        raise SystemExit(
            f"evaluate: row {wrong[0]!r} sets rival, which is measured on the miniature alone. "
            "Leave out --checkpoint."
        )
    if wrong := [row.name for row in rows if row.get("mask", "word") == "true"]:
        raise SystemExit(
            f"evaluate: row {wrong[0]!r} sets mask to 'true', which is known of rendered photos alone."
        )
    if wrong := [row.name for row in rows if row.get("photo", "own") == "another"]:
        raise SystemExit(
            f"evaluate: row {wrong[0]!r} sets photo to 'another', and the miniature alone has a photo of another subject in the "
            "same pose. Put the other photo into a folder of its own."
        )
