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

    def __init__(self, host: Path, setting: Setting, own_weights: bool = False) -> None:
        """own_weights: memory of its own for each, as a loaded checkpoint has, and not views of a few buffers."""
        import torch

        torch.set_num_threads(setting.threads)
        self.torch, self.setting = torch, setting
        self.nodes = boot(host, setting.device == "cpu", attention=setting.attention)
        refuse_other_attention(setting.attention)
        import comfy.utils
        from comfy.samplers import calculate_sigmas
        from kindred.nodes.host import attention_sites
        from networks import random_prompt

        comfy.utils.set_progress_bar_enabled(False)
        self.model = self._model(own_weights or setting.device == "cuda")
        self.unet = self.model.model.diffusion_model
        self.sites = attention_sites(self.unet)
        sampling = self.model.get_model_object("model_sampling")
        self.sigmas = calculate_sigmas(sampling, SCHEDULER, setting.steps).cpu()[
            :-1
        ]  # some steps give one more
        self.times = sampling.timestep(self.sigmas).float().tolist()
        self.kept: dict[str, Any] = {}  # banks, by what they are for
        self.prompts: dict[int, list] = {}  # by pictures
        self.negative = random_prompt(setting.family, 2)
        self.rows: list[int] = []  # of the UNet calls since it was cleared
        self.unet.register_forward_pre_hook(lambda module, args: self.rows.append(args[0].shape[0]))
        side, cells = setting.latent * 8, round(setting.latent * 8 * setting.subject**0.5)
        first = (side - cells) // 2
        self.mask = torch.zeros(1, side, side)
        self.mask[:, first : first + cells, first : first + cells] = 1

    def _model(self, own: bool) -> Any:
        """As the host would load a checkpoint in this dtype: weights of the dtype it computes in, so that it casts nothing."""
        import comfy.model_management as management
        from networks import build_model

        model, dtype = (
            build_model(self.setting.family),
            getattr(self.torch, DTYPES[self.setting.dtype]),
        )
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
        from networks import random_prompt

        rows = [random_prompt(self.setting.family, 50 + i)[0] for i in range(pictures)]
        more = {
            "kindred_subject": SubjectTokens(("cat",), ((5,),) * pictures, (((5,),) * pictures,))
        } | {
            k: self.torch.cat([extras[k] for _, extras in rows])
            for k in rows[0][1]
            if k == "pooled_output"
        }
        return [[self.torch.cat([cross for cross, _ in rows]), rows[0][1] | more]]

    def capture(self, steps: int, scheduler: str = SCHEDULER, both: bool = False) -> Any:
        photo = self.torch.randn(
            1,
            4,
            self.setting.latent,
            self.setting.latent,
            generator=self.torch.Generator().manual_seed(3),
        )
        more = {"negative": self.negative} if both else {}
        return self.node(
            "KindredRefUNetCapture",
            model=self.model,
            positive=self.prompt(1),
            latent={"samples": photo},
            steps=steps,
            scheduler=scheduler,
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

        for name, number, index in self.sites:
            model.set_model_attn1_replace(same, name, number, index)
            model.set_model_attn2_replace(same, name, number, index)
        return model

    def anchors(self, **inputs: Any) -> Any:
        """Two kept anchors."""
        latent = {"samples": self.torch.zeros(2, 4, self.setting.latent, self.setting.latent)}
        return self.node(
            "KindredAnchorSampler",
            model=self.story(**inputs),
            seed=1,
            steps=self.setting.steps,
            cfg=CFG,
            sampler_name=SAMPLER,
            scheduler=SCHEDULER,
            positive=self.prompt(2),
            negative=self.negative,
            latent_image=latent,
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
        latent = {
            "samples": self.torch.zeros(pictures, 4, self.setting.latent, self.setting.latent)
        }
        with self.torch.inference_mode():
            return self.nodes.common_ksampler(
                model,
                1,
                self.setting.steps,
                CFG,
                SAMPLER,
                SCHEDULER,
                self.prompt(pictures),
                self.negative,
                latent,
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

    def estimate(self, keys: Sequence[Key]) -> str:
        """What will be held beside the sampling itself, in words."""
        s = self.setting
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in self.unet.parameters()
        }
        width = self.torch.finfo(getattr(self.torch, DTYPES[s.dtype])).bits // 8

        def row(blocks: Sequence[Any]) -> int:  # bytes of one picture's tokens at one step
            return (
                sum(
                    (-(-s.latent // self.sites[b].divisor)) ** 2
                    * self.sites[b].module.attn1.to_k.in_features
                    for b in blocks
                )
                * width
            )

        cases, sizes = {case for case, _ in keys}, [f"weights {size(sum(storages.values()))}"]
        every, decoder = row(list(self.sites)), row([b for b in self.sites if b[0] == "output"])
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
