"""Banks in small, of photos and of generated anchors, and their files."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from kindred.models.noise.inversion import InversionTrajectory
from kindred.models.noise.path import Flow
from kindred.models.reference.bank import (
    AnchorFeatures,
    BankBuilder,
    Half,
    Layer,
    ReferenceBank,
    ReferencePrompt,
    SubjectTokens,
)
from kindred.models.reference.file import FORMAT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SIGMAS = torch.tensor([0.0, 0.5, 2.0, 9.0])
T, R, Y, X = 3, 2, 4, 6
BLOCKS = {
    ("input", 1, 0): ((4, 6), 3),
    ("middle", 0, 0): ((2, 3), 5),
    ("middle", 0, 1): ((2, 3), 5),
}  # block -> grid, channels
LAYERS = tuple(Layer(block, *told) for block, told in BLOCKS.items())
EMPTY = torch.zeros(0)  # float32, whatever the features are


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def masks() -> dict:
    fine, coarse = torch.zeros(R, 4, 6, dtype=torch.bool), torch.zeros(R, 2, 3, dtype=torch.bool)
    fine[0, 1, 2:5] = fine[1, 3, 0] = True
    coarse[0, 0, 1] = coarse[1, 1, 2] = coarse[1, 0, 0] = True
    return {(4, 6): fine, (2, 3): coarse}


def prompts() -> dict:
    """One tensor stands in both halves, and a float that no short decimal names; order of the extras is theirs."""
    pooled = rand(1, 7, seed=20)
    subject = SubjectTokens(("red panda", "fox"), ((3, 4, 9), ()), (((3, 4), ()), ((9,), ())))
    return {
        Half.COND: ReferencePrompt(
            'a "red" \N{PANDA FACE}',
            rand(1, 77, 8, seed=21),
            {
                "pooled_output": pooled,
                "width": 1024,
                "guidance": 0.1 + 0.2,
                "kindred_text": "a / b",
                "flags": torch.tensor([True, False]),
                "crop": torch.tensor(3),
            },
            subject,
        ),
        Half.UNCOND: ReferencePrompt("", rand(2, 77, 8, seed=22).half(), {"pooled_output": pooled}),
    }


def photo_bank(
    dtype: torch.dtype | None = None, edit_friendly: bool = False, maps: bool = True
) -> ReferenceBank:
    builder = BankBuilder(dtype)
    for step in range(T):
        for half in Half:
            builder.add(
                half,
                step,
                {
                    b: rand(R, y * x, c, seed=100 * step + i + 10 * (half is Half.UNCOND))
                    for i, (b, ((y, x), c)) in enumerate(BLOCKS.items())
                },
            )
    noise = rand(T, R, 4, Y, X, seed=2) if edit_friendly else None
    path = InversionTrajectory(
        SIGMAS,
        rand(T + 1, R, 4, Y, X, seed=1),
        "ddim",
        "a cat",
        "SD15 0a",
        "normal, 3 steps",
        noise,
    )
    return builder.finish(
        {b: grid for b, (grid, _) in BLOCKS.items()},
        masks(),
        path,
        prompts(),
        "SD15 0a",
        rand(T, R, 3, 4, seed=5) if maps else None,
    )


def flow_bank(scale: float = 1.0, edit_friendly: bool = False) -> ReferenceBank:
    """The same photo on a flow, up to sigma 1."""
    bank = photo_bank(edit_friendly=edit_friendly)
    return replace(
        bank,
        trajectory=replace(
            bank.trajectory, sigmas=torch.tensor([0.0, 0.4, 0.8, 1.0]), noise=Flow(scale)
        ),
    )


def kept(seed: int, lengths: tuple[int, ...]) -> dict:
    """Other positions at every step; on the finer grid twice as many."""
    gen = torch.Generator().manual_seed(seed)
    return {
        (y, x): [
            torch.randperm(R * y * x, generator=gen)[: n * (1 + (y == 4))].sort().values
            for n in lengths
        ]
        for y, x in ((4, 6), (2, 3))
    }


def rows_of(kept: dict, seed: int, dtype: torch.dtype) -> list[Tensor]:
    made = [sum(len(kept[layer.grid][i]) * layer.channels for layer in LAYERS) for i in range(T)]
    return [rand(n, seed=seed + i).to(dtype) if n else EMPTY for i, n in enumerate(made)]


def anchor_bank(dtype: torch.dtype = torch.float16, injected: bool = True) -> ReferenceBank:
    """As generated anchors leave it: rows of other lengths at every step, and none where the first stage did not come."""
    last, first = kept(1, (5, 0, 8)), kept(2, (0, 4, 3))
    made = AnchorFeatures(
        last,
        {half: rows_of(first, 40 + i, dtype) for i, half in enumerate(Half)},
        first,
        [EMPTY, *(rand(3 * 5, seed=60 + i).to(dtype) for i in range(2))]
        if injected
        else [EMPTY] * T,
        LAYERS[1:2] if injected else (),
        rand(R, 6, 5, seed=62) if injected else None,
        torch.tensor([1, 7, 11]) if injected else None,
        {"dropout": 0.5, "seed": 2**53 + 1, "method": "shared"},
    )
    return replace(
        photo_bank(dtype),
        features={half: rows_of(last, 50 + i, dtype) for i, half in enumerate(Half)},
        anchors=made,
    )


BANKS = {
    "a flow": flow_bank,
    "a flow with louder noise": lambda: flow_bank(8.0),
    "an edit-friendly flow": lambda: flow_bank(edit_friendly=True),
    "a photo": photo_bank,
    "a photo in half precision": lambda: photo_bank(torch.float16),
    "bfloat16": lambda: photo_bank(torch.bfloat16),
    "an edit-friendly path": lambda: photo_bank(edit_friendly=True, maps=False),
    "anchors": anchor_bank,
    "anchors in float32": lambda: anchor_bank(torch.float32),
    "anchors without feature injection": lambda: anchor_bank(injected=False),
    "anchors that had one stage": lambda: replace(
        anchor_bank(),
        anchors=replace(
            anchor_bank().anchors,
            first={},
            first_kept={},
            outputs=(),
            output_layers=(),
            features=None,
            subject=None,
            settings={},
        ),
    ),
}


def same(a, b, where: str = "bank") -> None:
    """Bit for bit, with dtypes and the order of mappings; sequences may be lists or tuples."""
    if isinstance(a, Tensor):
        assert (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.device == b.device
            and torch.equal(a, b)
        ), where
    elif is_dataclass(a):
        assert type(a) is type(b), where
        for f in fields(a):
            same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, dict):
        assert list(a) == list(b) and list(map(type, a)) == list(map(type, b)), where
        for key in a:
            same(a[key], b[key], f"{where}[{key}]")
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple)) and len(a) == len(b), where
        for i, (one, other) in enumerate(zip(a, b)):
            same(one, other, f"{where}[{i}]")
    else:
        assert type(a) is type(b) and a == b, where


def described(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[FORMAT])


def rewrite(path: Path, told: dict | str | None = None, **changed: Tensor | None) -> None:
    """The same file with another description or other tensors; None takes one out."""
    told = described(path) if told is None else told
    tensors = load_file(path) | {name: value for name, value in changed.items()}
    save_file(
        {k: v for k, v in tensors.items() if v is not None},
        path,
        {FORMAT: told if isinstance(told, str) else json.dumps(told)},
    )
