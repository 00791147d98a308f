"""What is timed: the host in this process, a random model of one of its own configurations, and the pack's nodes on it.

Random weights do the same arithmetic as trained ones; only what they attend to means nothing, so the subject is drawn, not found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boot import ATTENTION, boot

from benching.catalogue import PLAIN, Key, windows
from benching.clocks import Clock
from benching.rounds import Job, Lap

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOKENS = 257  # of a CLIP ViT-L
CFG, SAMPLER, SCHEDULER = 7.0, "euler", "ddim_uniform"
Part = Callable[[Any], Any]  # takes what the part before it gave


@dataclass(frozen=True)
class Setting:
    """What a run is measured with."""

    family: str
    latent: int  # side in latent cells
    steps: int
    dtype: str
    device: str
    attention: str
    threads: int
    subject: float  # share of the picture


def refuse_other_attention(attention: str) -> None:
    """RuntimeError when the host's choice was another one."""
    from comfy.ldm.modules.attention import optimized_attention

    flag, wanted = ATTENTION[attention]
    if optimized_attention.__name__ != wanted:
        raise RuntimeError(
            f"--attention {attention}: the host was asked for {wanted} with {flag}, but took "
            f"{optimized_attention.__name__}. Another "
            "version of it may call it otherwise; take the ComfyUI that tools/workshop/pins names."
        )


class Ground:
    """One model and everything the cases need, each made when it is first asked for."""

    channels, cfg, scheduler = 4, CFG, SCHEDULER

    def __init__(self, host: Path, setting: Setting, own_weights: bool = False) -> None:
        """own_weights: memory of its own for each, as a loaded checkpoint has, and not views of a few buffers."""
        import torch

        torch.set_num_threads(setting.threads)
        self.torch, self.setting = torch, setting
        self.nodes = boot(host, setting.device == "cpu", attention=setting.attention)
        refuse_other_attention(setting.attention)
        import comfy.utils
        from comfy.samplers import calculate_sigmas

        comfy.utils.set_progress_bar_enabled(False)
        self.model = self._model(own_weights or setting.device == "cuda")
        self.unet = self.model.model.diffusion_model
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = calculate_sigmas(sampling, self.scheduler, setting.steps).cpu()[
            :-1
        ]  # some steps give one more
        self.times = self._times(sampling)
        self.kept: dict[str, Any] = {}  # banks, by what they are for
        self.prompts: dict[int, list] = {}  # by pictures
        self.negative = self.random_text(2)
        self.rows: list[int] = []  # of the UNet calls since it was cleared
        self.unet.register_forward_pre_hook(lambda module, args: self.rows.append(args[0].shape[0]))
        side, cells = setting.latent * 8, round(setting.latent * 8 * setting.subject**0.5)
        first = (side - cells) // 2
        self.mask = torch.zeros(1, side, side)
        self.mask[:, first : first + cells, first : first + cells] = 1

    def random_text(self, seed: int) -> list:
        """CONDITIONING of random features."""
        from networks import random_prompt

        return random_prompt(self.setting.family, seed)

    def _times(self, sampling: Any) -> list[float]:
        """Of each step, falling from 999 to 0: what is left of the schedule's percent."""
        return sampling.timestep(self.sigmas).float().tolist()

    def _build(self) -> Any:
        """A fresh ModelPatcher in float32."""
        from networks import build_model

        return build_model(self.setting.family)

    def _model(self, own: bool) -> Any:
        """As the host would load a checkpoint in this dtype: weights of the dtype it computes in, so that it casts nothing."""
        import comfy.model_management as management

        model, dtype = self._build(), getattr(self.torch, DTYPES[self.setting.dtype])
        unet = model.model.diffusion_model
        for module in unet.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = False
        for parameter in unet.parameters():
            if own or parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype, copy=True)
        unet.dtype = dtype
        management.archive_model_dtypes(unet)
        if self.setting.device == "cuda":
            return type(model)(
                model.model, management.get_torch_device(), management.unet_offload_device()
            )
        return model

    # nodes -----------------------------------------------------------------------------------------------------------------------

    def node(self, name: str, **inputs: Any) -> tuple[Any, ...]:
        with self.torch.inference_mode():
            return self.nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs).result

    def prompt(self, pictures: int) -> list:
        """Subject Prompts' CONDITIONING of so many pictures, made once: drawing it would be timed."""
        if pictures not in self.prompts:
            self.prompts[pictures] = self._prompt(pictures)
        return self.prompts[pictures]

    def _prompt(self, pictures: int) -> list:
        from kindred.models.subject.words import SubjectTokens

        rows = [self.random_text(50 + i)[0] for i in range(pictures)]
        more = {
            "kindred_subject": SubjectTokens(("cat",), ((5,),) * pictures, (((5,),) * pictures,))
        } | {
            k: self.torch.cat([extras[k] for _, extras in rows])
            for k in rows[0][1]
            if k == "pooled_output"
        }
        return [[self.torch.cat([cross for cross, _ in rows]), rows[0][1] | more]]

    def empty(self, pictures: int) -> dict[str, Any]:
        """LATENT of zeros."""
        side = self.setting.latent
        return {"samples": self.torch.zeros(pictures, self.channels, side, side)}

    def capture(self, steps: int, scheduler: str = "", both: bool = False, **more: Any) -> Any:
        drawn = self.torch.Generator().manual_seed(3)
        photo = self.torch.randn(self.empty(1)["samples"].shape, generator=drawn)
        more |= {"negative": self.negative} if both else {}
        return self.node(
            "KindredRefUNetCapture",
            model=self.model,
            positive=self.prompt(1),
            latent={"samples": photo},
            steps=steps,
            scheduler=scheduler or self.scheduler,
            mask=self.mask,
            **more,
        )[0]

    def injected(self, bank: Any, model: Any = None, **inputs: Any) -> Any:
        return self.node(
            "KindredMaskedSelfAttnInject", model=model or self.model, reference=bank, **inputs
        )[0]

    def story(self, **inputs: Any) -> Any:
        return self.node(
            "KindredConsiStory",
            model=self.model,
            **{"masks": self.mask} | windows(self.times) | inputs,
        )[0]

    def concept(self, model: Any, halves: str) -> Any:
        """Random tokens in the place of an encoder's: it runs once, before sampling."""
        from kindred.models.attention.parts import Merge
        from kindred.models.attention.weights import WeightMode
        from kindred.models.network.call import Half, Halves
        from kindred.nodes import host
        from kindred.nodes.concept import ConceptInjection

        chosen, drawn = Halves(halves), self.torch.Generator().manual_seed(4)
        tokens = {
            half: {
                block: tuple(self.torch.randn(1, TOKENS, c, generator=drawn) for _ in "kv")
                for block, c in host.cross_layers(self.model, "bench")[1]
            }
            for half in (Half.COND, *[Half.UNCOND] * (chosen is Halves.BOTH))
        }
        return host.inject(
            model,
            ConceptInjection(tokens, 1, 1.0, WeightMode.LOGIT_BIAS, Merge.CONCAT, 0.0, 1.0, chosen),
        )

    def passed_through(self) -> Any:
        """Every attention replaced by a function that calls the host's own and nothing else."""
        from comfy.ldm.modules.attention import optimized_attention
        from kindred.nodes.host import attention_sites

        model = self.model.clone()

        def same(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
            return optimized_attention(
                q,
                k,
                v,
                options["n_heads"],
                attn_precision=options["attn_precision"],
                transformer_options=options,
            )

        for name, number, index in attention_sites(self.unet):
            model.set_model_attn1_replace(same, name, number, index)
            model.set_model_attn2_replace(same, name, number, index)
        return model

    def anchors(self, **inputs: Any) -> Any:
        """Two kept anchors."""
        return self.node(
            "KindredAnchorSampler",
            model=self.story(**inputs),
            seed=1,
            steps=self.setting.steps,
            cfg=self.cfg,
            sampler_name=SAMPLER,
            scheduler=self.scheduler,
            positive=self.prompt(2),
            negative=self.negative,
            latent_image=self.empty(2),
        )[1]

    def live_bank(self) -> Any:
        bank = self.capture(2, "karras")
        if held := [s for s in self.sigmas.tolist() if bank.step_of(s) is not None]:
            raise RuntimeError(
                f"live with --steps {self.setting.steps}: the bank holds sigma {held[0]:.4g}, which the sampler asks for, "
                "so that it is not live there. Take other --steps."
            )
        return bank

    def _kept(self, what: str) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "bank": lambda: self.capture(self.setting.steps),
            "both": lambda: self.capture(self.setting.steps, both=True),
            "live": self.live_bank,
            "anchors": lambda: self.anchors(feature_injection=0.0),
            "story": self.anchors,
        }
        if what not in self.kept:
            self.kept[what] = makers[what]()
        return self.kept[what]

    def model_of(self, case: str) -> Any:
        """The MODEL that a case samples with."""
        alone = {"feature_injection": 0.0, "query_blend": 0.0}
        makers: dict[str, Callable[[], Any]] = {
            PLAIN: lambda: self.model,
            "pass_through": self.passed_through,
            "extra": self._hooks_alone,
            "cached": lambda: self.injected(self._kept("bank")),
            "cached_both": lambda: self.injected(self._kept("both"), halves="both"),
            "weighted": lambda: self.injected(self._kept("bank"), weight=2.0),
            "live": lambda: self.injected(self._kept("live")),
            "live_half": lambda: self.injected(self._kept("live"), blocks="encoder"),
            "concept": lambda: self.concept(self.model, "both"),
            "concept_cond": lambda: self.concept(self.model, "cond only"),
            "cached_concept": lambda: self.injected(
                self._kept("bank"), self.concept(self.model, "cond only")
            ),
            "shared": lambda: self.story(**alone),
            "shared_all": lambda: self.story(**alone, anchors=0, dropout=0.0, halves="both"),
            "shared_words": lambda: self.story(**alone, masks=None),
            "blended": lambda: self.story(feature_injection=0.0),
            "story": self.story,
            "story_official": lambda: self.story(order="official"),
            "more": lambda: self.story(feature_injection=0.0, reference=self._kept("anchors")),
            "more_story": lambda: self.story(reference=self._kept("story")),
        }
        return makers[case]()

    def _hooks_alone(self) -> Any:
        from kindred.nodes import host

        model = host.inject(self.model, None)
        model.model_options["transformer_options"][host.KEY] = ()
        return model

    # jobs ------------------------------------------------------------------------------------------------------------------------

    def sample(self, model: Any, pictures: int) -> Any:
        """KSampler -> samples [b c y x]."""
        with self.torch.inference_mode():
            return self.nodes.common_ksampler(
                model,
                1,
                self.setting.steps,
                self.cfg,
                SAMPLER,
                self.scheduler,
                self.prompt(pictures),
                self.negative,
                self.empty(pictures),
            )[0]["samples"]

    def parts(self, key: Key) -> list[Part]:
        """What is timed of a case, one after another; the last gives the samples."""
        case, pictures = key
        if case == "cold":
            return [
                lambda _: self.capture(self.setting.steps),
                lambda bank: self.sample(self.injected(bank), pictures),
            ]
        model = self.model_of(case)
        return [lambda _: self.sample(model, pictures)]

    def job(self, key: Key, clock: Clock) -> Job:
        parts = self.parts(key)

        def lap() -> Lap:
            result, seconds, calls, rows, peaks = None, [], [], 0, []
            for part in parts:
                self.rows.clear()
                result, reading = clock.measure(lambda part=part, result=result: part(result))
                seconds.append(reading.seconds)
                calls.append(len(self.rows))
                rows += sum(self.rows)
                peaks += [reading.peak] if reading.peak else []
            return Lap(
                tuple(seconds),
                tuple(calls),
                rows,
                max(peaks, default=None),
                bool(self.torch.isfinite(result).all()),
            )

        return lap

    # memory ----------------------------------------------------------------------------------------------------------------------

    def row_bytes(self) -> tuple[int, int]:
        """One picture's tokens at one step: of all blocks, of those that a story keeps."""
        from kindred.nodes.host import attention_sites

        width = self.torch.finfo(getattr(self.torch, DTYPES[self.setting.dtype])).bits // 8
        sizes = {
            block: width
            * (-(-self.setting.latent // site.divisor)) ** 2
            * site.module.attn1.to_k.in_features
            for block, site in attention_sites(self.unet).items()
        }
        return sum(sizes.values()), sum(n for b, n in sizes.items() if b[0] == "output")

    def estimate(self, keys: Sequence[Key]) -> str:
        """What will be held beside the sampling itself, in words."""
        s = self.setting
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in self.unet.parameters()
        }
        every, decoder = self.row_bytes()
        cases, sizes = {case for case, _ in keys}, [f"weights {size(sum(storages.values()))}"]
        for names, halves in (
            ({"cached", "weighted", "cached_concept", "cold"}, 1),
            ({"cached_both"}, 2),
        ):
            if cases & names:
                whole = every * halves * len(self.times)
                sizes.append(
                    f"features of the reference{' in both halves' * (halves - 1)} {size(round(whole * s.subject))} "
                    f"({size(whole)} while it is read)"
                )
        if cases & {"more", "more_story"}:
            sizes.append(
                f"kept anchors up to {size(round(decoder * 2 * 2 * s.subject) * len(self.times))}"
            )
        import comfy.model_management as management

        free = size(int(management.get_free_memory(management.get_torch_device())))
        return f"Memory beside the sampling itself: {', '.join(sizes)}. Free now: {free}."


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
