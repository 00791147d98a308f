"""A UNet in small, a sampler and a story on it, driven through the hooks that nodes/host/ has in the host."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from kindred.models.network.call import AttnCall, Part, Role
from kindred.models.network.sites import BlockSite
from kindred.models.run import Run
from kindred.models.story.anchors import AnchorRecorder
from kindred.models.story.plan import Schedule, StorySettings
from kindred.models.story.sources import AnchorSource, Layout, QueryRecorder
from kindred.models.story.story import Story
from kindred.models.subject.words import SubjectTokens
from small_attention import sdpa_attend
from torch import Tensor, nn

GRID = (4, 6)
C, HEADS, TEXT = 8, 2, 5
ENCODER, MIDDLE, COARSE, FINE = (
    ("input", 1, 0),
    ("middle", 0, 0),
    ("output", 0, 0),
    ("output", 1, 0),
)
DIVISORS = {ENCODER: 1, MIDDLE: 2, COARSE: 2, FINE: 1}
SIGMAS, TIMES = (
    (10.0, 6.0, 4.0, 2.5, 1.5, 0.8, 0.3),
    (950.0, 880.0, 700.0, 500.0, 261.0, 150.0, 20.0),
)
COND, UNCOND = (
    Part(Role.COND, None, TEXT, subject=SubjectTokens(("cat",), ((2,),))),
    Part(Role.UNCOND, None, TEXT),
)
BOTH = ((UNCOND, COND),)


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


class Attention(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        for i, name in enumerate(("to_q", "to_k", "to_v", "to_out")):
            layer = nn.Linear(C, C, bias=False, dtype=torch.float64)
            layer.weight = nn.Parameter(rand(C, C, seed=10 * seed + i) / 2, requires_grad=False)
            setattr(self, name, layer)


class Block(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Attention(2 * seed), Attention(2 * seed + 1)


BLOCKS = {block: Block(i) for i, block in enumerate(DIVISORS)}
SITES = {block: BlockSite(module, DIVISORS[block]) for block, module in BLOCKS.items()}
INTO, OUT_OF = rand(4, C, seed=1), rand(C, 4, seed=2) / 3


def unet(run: Run, x: Tensor, parts: tuple[Part, ...], text: Tensor) -> Tensor:
    """x [b 4 y x], text [b m c] -> [b 4 y x], with the host's hooks in the host's order (nodes/host/attention.py)."""
    h = torch.einsum("bcyx,cd->bdyx", x, INTO)
    for block, site in SITES.items():
        if block[0] == "output":
            for watcher in run.watchers:
                watcher.output_block(block[1], h, parts)
        small = F.avg_pool2d(h, site.divisor)
        call = AttnCall(block, tuple(small.shape[2:]), parts, GRID)
        tokens, (one, two) = small.flatten(2).mT, (site.module.attn1, site.module.attn2)
        n = queries = F.layer_norm(tokens, (C,))
        for watcher in run.watchers:
            queries = watcher.self_tokens(call, queries)
        out = one.to_out(
            run.attend(call, sdpa_attend, one.to_q(queries), one.to_k(n), one.to_v(n), HEADS)
        )
        for watcher in run.watchers:
            out = watcher.self_output(call, out)
        added = tokens + out
        n, call = F.layer_norm(added, (C,)), replace(call, cross=True)
        q, k, v = 2 * two.to_q(n), two.to_k(text), two.to_v(text)
        for watcher in run.watchers:
            watcher.cross(call, q, k, HEADS)
        added = added + two.to_out(run.attend(call, sdpa_attend, q, k, v, HEADS))
        change = (added - tokens).mT.unflatten(2, call.grid)
        h = h + change.repeat_interleave(site.divisor, 2).repeat_interleave(site.divisor, 3)
    return torch.einsum("bcyx,cd->bdyx", h, OUT_OF)


@dataclass
class Studio:
    """A sampler, as nodes/host/wrappers.py and stages.py drive one."""

    x: Tensor  # [b 4 y x] noise
    text: Tensor  # [b m c]
    story: Story | None = None
    calls: tuple[tuple[Part, ...], ...] = BOTH
    times: int = 1  # each noise level is asked at
    replay: bool = True
    asked: list[float] = field(default_factory=list)  # UNet calls

    def predict(self, x: Tensor, sigma: float) -> Tensor:
        story = self.story
        run = Run(sites=SITES, active=[story] if story else [], watchers=[story] if story else [])
        if story:
            story.begin_step(sigma)
        out = {}
        for parts in self.calls:
            rows, text = (
                x.repeat(len(parts), 1, 1, 1) / (1 + sigma**2) ** 0.5,
                torch.cat([self.text * (p is COND) for p in parts]),
            )
            if story and story.wants_vanilla(parts):
                plain = QueryRecorder(story.settings.blocks)
                unet(Run(sites=SITES, watchers=[plain]), rows, parts, text)
                story.vanilla = plain.tokens
                self.asked.append(sigma)
            out |= dict(
                zip((p.role for p in parts), unet(run, rows, parts, text).chunk(len(parts)))
            )
            self.asked.append(sigma)
            if story:
                story.vanilla = {}
        if story and story.recorder:
            story.recorder.latent(sigma, x)
        return out[Role.UNCOND] + 2 * (out[Role.COND] - out[Role.UNCOND])

    def stage(self, known: dict[float, Tensor]) -> Tensor:
        x, first = self.x, self.story and self.story.stage == 1
        for sigma, after in zip(SIGMAS, (*SIGMAS[1:], 0.0)):
            if first or sigma not in known:
                for _ in range(self.times):
                    eps = self.predict(x, sigma)
                if first and sigma > self.story.schedule.first_injection:
                    known[sigma] = eps
            else:
                eps = known[sigma]
            x = x + (after - sigma) * eps
            if first and self.story.first_stage_ends:
                break
        return x

    def sample(self) -> Tensor:
        known: dict[float, Tensor] = {}
        if self.story and self.story.stage:
            self.stage(known)
            self.story.begin_second_stage()
        x = self.stage(known if self.replay else {})
        if self.story:
            self.story.finish()
        return x


def told(
    pictures: int,
    source: AnchorSource | None = None,
    masks: Tensor | None = None,
    recorder: AnchorRecorder | None = None,
    **changed,
) -> Story:
    given = {"anchors": 2, "blend_until": 6.0, "inject": (6.0, 2.5), "dropout": 0.3, **changed}
    settings = StorySettings(frozenset({COARSE, FINE}), (MIDDLE, COARSE), **given)
    story = Story(
        settings,
        Schedule(SIGMAS, TIMES, settings),
        Layout(DIVISORS, frozenset({ENCODER, FINE}), 1, 1),
        pictures,
        GRID,
        torch.device("cpu"),
        source,
        masks,
        recorder,
    )
    if recorder:
        recorder.count = story.anchor_count
    return story


NOISE, TEXTS = 10 * rand(5, 4, *GRID, seed=3), rand(5, TEXT, C, seed=4)


def made(rows: list[int], story: Story | None, **how) -> Tensor:
    return Studio(NOISE[rows], TEXTS[rows], story, **how).sample()


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).flatten(1).abs().amax(1).min() > 1e-3)


def attn(block=FINE, parts: tuple[Part, ...] = (UNCOND, COND), grid=GRID) -> AttnCall:
    return AttnCall(block, grid, parts, GRID)


def spots(pictures: int, seed: int = 3) -> Tensor:
    return (
        torch.rand((pictures, *GRID), generator=torch.Generator().manual_seed(seed)) < 0.5
    ).float()
