"""What Kindred costs beside the plain sampler, measured in one run: ratios of process time, interleaved rounds, medians.

Random weights in the host's own configurations: the arithmetic does not care. Cases: extra_b1 (our hooks, nothing injected),
cached (the reference's features are kept), live (the Ref-UNet runs beside the sampler), cold (inversion included), concept
(the concept encoder's tokens); b1 and b4 are one and four pictures. Sizes are latent cells: 64 is 512 pixels.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from boot import boot
from checkout import version

CASES = ("extra_b1", "cached_b1", "cached_b4", "live_b1", "live_b4", "cold_b1", "concept_b1")
TOKENS = 257  # of a CLIP ViT-L


class Bench:
    """One random model in the host of this process, and the jobs that are timed on it."""

    def __init__(self, host: Path, family: str, latent: int, steps: int) -> None:
        import torch
        self.torch, self.nodes, self.family, self.latent, self.steps = torch, boot(host), family, latent, steps
        import comfy.utils
        from kindred.models.reference import SubjectTokens
        from networks import build_model, random_prompt
        comfy.utils.set_progress_bar_enabled(False)
        self.model = build_model(family)
        self.positive, self.negative = random_prompt(family, 1), random_prompt(family, 2)
        self.coarse = random_prompt(family, 3, subject=SubjectTokens(("cat",), ((5,),)))
        self.photo = {"samples": torch.randn(1, 4, latent, latent, generator=torch.Generator().manual_seed(3))}
        self.mask = torch.zeros(1, latent, latent)
        self.mask[:, latent // 4:latent * 3 // 4, latent // 4:latent * 3 // 4] = 1  # a subject on a quarter of the picture
        self.calls = 0
        self.model.model.diffusion_model.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def node(self, name: str, **inputs: Any) -> tuple[Any, ...]:
        with self.torch.inference_mode():
            return self.nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs).result

    def capture(self, steps: int) -> Any:
        return self.node("KindredRefUNetCapture", model=self.model, positive=self.coarse, latent=self.photo, steps=steps,
                         scheduler="ddim_uniform", mask=self.mask)[0]

    def self_injected(self, bank: Any) -> Any:
        return self.node("KindredMaskedSelfAttnInject", model=self.model, reference=bank, weight=1.0)[0]

    def concept(self) -> Any:
        """Random tokens in the place of an encoder's."""
        from kindred.models.attention import WeightMode
        from kindred.models.injection import Merge
        from kindred.models.reference import Half, Halves
        from kindred.nodes import host
        from kindred.nodes.concept import ConceptInjection
        layers = host.cross_layers(self.model, "bench")[1]
        made = {block: (self.torch.randn(1, TOKENS, c), self.torch.randn(1, TOKENS, c)) for block, c in layers}
        return host.inject(self.model, ConceptInjection({Half.COND: made}, 1, 1.0, WeightMode.LOGIT_BIAS, Merge.CONCAT, 1e9, 0.0,
                                                        Halves.COND))

    def sample(self, model: Any, pictures: int) -> None:
        latent = {"samples": self.torch.zeros(pictures, 4, self.latent, self.latent)}
        with self.torch.inference_mode():
            self.nodes.common_ksampler(model, 1, self.steps, 7.0, "euler", "ddim_uniform", self.positive, self.negative, latent)

    def jobs(self, cases: Sequence[str]) -> dict[str, tuple[Callable[[], None], int]]:
        """Case -> what is timed, and the pictures of the plain run it is compared with."""
        bank, other = self.capture(self.steps), self.capture(5 if self.steps != 5 else 4)
        empty = self.self_injected(bank)
        empty.model_options["transformer_options"]["kindred"] = ()
        models = {"extra": empty, "cached": self.self_injected(bank), "live": self.self_injected(other), "concept": self.concept()}
        found: dict[str, tuple[Callable[[], None], int]] = {}
        for case in cases:
            kind, _, pictures = case.partition("_b")
            if kind == "cold":
                found[case] = (lambda: self.sample(self.self_injected(self.capture(self.steps)), 1)), 1
            else:
                found[case] = (lambda m=models[kind], n=int(pictures): self.sample(m, n)), int(pictures)
        return found

    def run(self, cases: Sequence[str], rounds: int) -> dict[str, float]:
        """Rounds of plain and every case in turn; the first round warms up and does not count."""
        jobs = self.jobs(cases)
        plain = {n: (lambda n=n: self.sample(self.model, n)) for n in sorted({n for _, n in jobs.values()})}
        times: dict[Any, list[float]] = {key: [] for key in (*plain, *jobs)}
        figures: dict[str, float] = {}
        for turn in range(rounds + 1):
            for key, job in (*plain.items(), *((case, job) for case, (job, _) in jobs.items())):
                sys.stderr.write(f"\r\033[K  round {turn} of {rounds}: {key if isinstance(key, str) else f'plain, {key} pictures'}")
                self.calls, start = 0, time.process_time()
                job()
                if turn:
                    times[key].append(time.process_time() - start)
                if isinstance(key, str):
                    figures[f"unet_calls.{self.family}.{key}"] = self.calls
        sys.stderr.write("\n")
        print(f"{self.family}, latent {self.latent}, {self.steps} steps, {rounds} rounds, process time\n")
        print("| case | times plain | least | most |")
        print("|---|---|---|---|")
        for case, (_, n) in jobs.items():
            ratios = [a / b for a, b in zip(times[case], times[n])]
            figures[f"time.{self.family}.{case}"] = statistics.median(ratios)
            print(f"| {case} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")
        return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("sd15", "sd21", "sdxl", "tiny"), default="sd15")
    parser.add_argument("--latent", type=int, default=32, help="side in latent cells (default %(default)s; 64 is 512 pixels)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", action="append", choices=CASES, help="repeat it for several (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    parser.add_argument("--host", type=Path, default=os.environ.get("KINDRED_HOST"), help="ComfyUI's folder (dev.py gives it)")
    given = parser.parse_args(argv)
    given.host = Path(given.host or parser.error("--host is missing; run it as: python3 dev.py bench"))
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    figures = Bench(given.host, given.family, given.latent, given.steps).run(given.case or CASES, given.rounds)
    if given.json:
        report = {"command": "bench", "version": version(), "seed": 1, "figures": figures}
        given.json.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
