"""A story in small: its settings, the parts of its calls, and one call of its shared attention."""

from __future__ import annotations

import torch
from kindred.models.network.call import AttnCall, Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run
from kindred.models.story.plan import Schedule, StorySettings
from kindred.models.story.sources import Layout
from kindred.models.story.story import Story
from kindred.models.subject.words import SubjectTokens
from small_attention import sdpa_attend
from torch import Tensor, nn

LATENT = GRID = (4, 6)
N, C, HEADS, TEXT = 24, 8, 2, 5
BLOCK, MAP, OUT = ("output", 1, 0), ("middle", 0, 0), ("input", 1, 0)
LAYOUT = Layout({BLOCK: 1, MAP: 2, OUT: 1}, frozenset({BLOCK, OUT}), 1, 1)
SIGMAS, TIMES = (10.0, 5.0, 2.0, 1.0, 0.5, 0.2), (900.0, 800.0, 500.0, 261.0, 100.0, 20.0)
CAT = SubjectTokens(("cat",), ((2,),))
COND, UNCOND, OTHER = (
    Part(Role.COND, None, TEXT, subject=CAT),
    Part(Role.UNCOND, None, TEXT),
    Part(),
)
AREA = Part(Role.COND, (4, 6, 0, 0), TEXT, subject=CAT)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spots(pictures: int, seed: int = 3, grid: tuple[int, int] = LATENT) -> Tensor:
    """Masks as a user draws them, [b y x]."""
    return (
        torch.rand((pictures, *grid), generator=torch.Generator().manual_seed(seed)) < 0.4
    ).float()


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def told(pictures: int = 3, masks: Tensor | None = None, sigma: float = 1.0, **changed) -> Story:
    """A story at a step; without masks it finds them itself."""
    given = {"anchors": 0, "inject": (0.0, 0.0), "blend_until": 5.0, **changed}
    settings = StorySettings(frozenset({BLOCK}), (MAP,), **given)
    story = Story(
        settings,
        Schedule(SIGMAS, TIMES, settings),
        LAYOUT,
        pictures,
        LATENT,
        torch.device("cpu"),
        user_masks=masks,
    )
    story.begin_step(sigma)
    return story


def call(
    *parts: Part,
    block: tuple[str, int, int] = BLOCK,
    grid: tuple[int, int] = GRID,
    cross: bool = False,
) -> AttnCall:
    return AttnCall(block, grid, parts, LATENT, cross)


def own(pictures: int, parts: int, seed: int = 40) -> list[Tensor]:
    return [rand(parts * pictures, N, C, seed=seed + i) for i in range(3)]


def attend(story: Story, parts: tuple[Part, ...], qkv: list[Tensor], kernel=sdpa_attend) -> Tensor:
    run = Run(sites={BLOCK: BlockSite(nn.Identity(), 1)}, active=[story], watchers=[story])
    return run.attend(call(*parts), kernel, *qkv, HEADS)
