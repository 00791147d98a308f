"""Paper A's training-free half on every transformer of the host: laws on tiny random networks, one row per family."""

from __future__ import annotations

from functools import cache
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from studio import capture, inject, invert
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor

from kindred.models.injection import Recorder
from kindred.models.inversion import InversionTrajectory
from kindred.models.network.backbone import CROSS
from kindred.models.reference import ReferenceBank, SubjectTokens
from kindred.nodes import host
from kindred.nodes.host import joint
from kindred.nodes.host.sites import require_backbone

FAMILIES = tuple(READ)
WHITE = torch.ones(1, 32, 32)
HALF = torch.cat([torch.ones(1, 32, 16), torch.zeros(1, 32, 16)], 2)
FELT = 1e-3  # of the greatest value: an effect that cannot be rounding
SAME = 1e-5  # of the greatest value: what rounding may do


def flat(samples: Tensor) -> Tensor:
    """[b c (1) y x] -> [b c y x]."""
    return samples.squeeze(2) if samples.ndim == 5 else samples


def apart(one: Tensor, other: Tensor) -> float:
    """Their greatest difference, in the greatest value of the second."""
    return float((one - other).abs().max() / other.abs().max())


@cache
def plain(name: str) -> Tensor:
    return sample(tiny(name), name)


@cache
def bank_of(name: str, masked: bool = True, **how: Any) -> ReferenceBank:
    """A photo of random cells, inverted and read."""
    photo = {"samples": latent(name, seed=21)}
    steps = {"steps": 3, "scheduler": "simple"}
    mask = HALF if masked else WHITE
    return capture(tiny(name), photo, prompt(name, seed=4), **steps, mask=mask, **how)[0]


@cache
def itself(name: str) -> ReferenceBank:
    """The plain picture's own way through the noise, read as if it were a photo's."""
    seen: dict[float, Tensor] = {}

    def noted(executor: Any, x: Tensor, timestep: Tensor, *args: Any) -> Tensor:
        seen[float(timestep.flatten()[0])] = flat(x).float().clone()
        return executor(x, timestep, *args)

    model = tiny(name).clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "noted", noted)
    sample(model, name)
    sigmas = sorted(seen)
    way = torch.stack([torch.zeros_like(seen[sigmas[0]]), *(seen[s] for s in sigmas)])
    trajectory = InversionTrajectory(
        torch.tensor([0.0, *sigmas]),
        way,
        "fireflow",
        "",
        host.model_key(tiny(name)),
        "simple",
        noise=host.noise_of(tiny(name), "test"),
    )
    return capture(tiny(name), None, prompt(name), inversion=trajectory, mask=WHITE)[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_is_felt_and_gone_with_its_node(name: str) -> None:
    model = inject(tiny(name), bank_of(name))
    assert apart(sample(model, name), plain(name)) > FELT
    assert torch.equal(sample(tiny(name), name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_that_reads_itself_stays_as_it_is(name: str) -> None:
    """At its own positions, with the text's share kept, at every weight."""
    for weight in (0.5, 3.0):
        assert apart(sample(inject(tiny(name), itself(name), weight), name), plain(name)) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_outside_of_its_window_nothing_is_touched(name: str) -> None:
    model = inject(tiny(name), bank_of(name), start_percent=0.98, end_percent=0.99)
    assert torch.equal(sample(model, name), plain(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_held_or_read_anew_the_reference_is_the_same(name: str) -> None:
    live, held = bank_of(name), bank_of(name, keeps="keys and values")
    assert live.live and not live.bytes and not held.live and held.bytes
    pictures = [sample(inject(tiny(name), bank), name) for bank in (live, held)]
    assert apart(*pictures) < SAME


@pytest.mark.parametrize("name", FAMILIES)
def test_an_inversion_and_its_latent_lead_to_the_same_reference(name: str) -> None:
    photo = {"samples": latent(name, seed=21)}
    path, noise, _ = invert(tiny(name), photo, prompt(name, seed=4), steps=3, scheduler="simple")
    bank = capture(tiny(name), None, prompt(name, seed=4), inversion=path, mask=HALF)[0]
    assert torch.equal(bank.trajectory.latents, bank_of(name).trajectory.latents)
    assert noise["samples"].shape == photo["samples"].shape and bank.trajectory.latents.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", [
    {"cfg": 1.0}, {"pictures": 3}, {"sampler": "heun"}, {"sampler": "euler_ancestral"}, {"sampler": "dpmpp_2m_sde"}, {"steps": 5},
], ids=str)  # fmt: skip
def test_it_is_felt_however_one_samples(name: str, how: dict[str, Any]) -> None:
    with_it, without = (sample(m, name, **how) for m in (inject(tiny(name), bank_of(name)), tiny(name)))
    assert with_it.isfinite().all() and apart(with_it, without) > FELT


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_keeps_its_share_unless_told_otherwise(name: str) -> None:
    """Where text and picture are in one softmax, plain concatenation dims the text; where they are apart it changes nothing."""
    kept, dimmed = (
        sample(inject(tiny(name), itself(name), 3.0, text_share=share), name)
        for share in ("kept", "plain")
    )
    joint = require_backbone(tiny(name), "test").joint
    assert apart(kept, plain(name)) < SAME and (apart(dimmed, plain(name)) > FELT) is joint


# the mask by the words ----------------------------------------------------------------------------

WORD = 3  # the row of the CONDITIONING that the subject's word is


@dataclass
class Planted:
    """The host's attention with a picture whose upper half looks at one row of the text, and whose lower half at all others."""

    name: str
    word: int = WORD
    passes: int = 0
    heard: int = 0  # calls in which it was planted

    def joined(self, q: Tensor, k: Tensor, v: Tensor, heads: int, kwargs: Any) -> tuple:
        q, k, v, restored = joint_layout(q, k, v, heads, kwargs)
        found, count = require_backbone(tiny(self.name), "test"), READ[self.name].grid
        count = count[0] * count[1]
        rows = rows_of(self.name)
        text = found.text(k.shape[1], count, rows)
        least = rows if any(call and call[0] == CROSS for call in found.calls) else count + rows
        if q.shape[1] < count or k.shape[1] < least or (least == rows) is not (k.shape[1] == rows):
            return q, k, v, restored
        self.heard += 1
        picture = found.picture(q.shape[1], count)
        q, k = q.clone(), k.clone()
        towards = torch.randn(q.shape[-1], generator=torch.Generator().manual_seed(3))
        upper = torch.arange(count) < count // 2
        q[:, picture] = torch.where(upper, 9.0, -9.0)[:, None] * towards
        k[:, text] = 0.0
        k[:, text.start + self.word] = towards
        return q, k, v, restored


joint_layout = joint.joined


def rows_of(name: str) -> int:
    extras = prompt(name)[0][1]
    return extras["text_input_ids"].shape[1] if name == "HiDreamO1" else READ[name].words


def marked(name: str, *places: int) -> list:
    """A prompt whose subject stands at these rows."""
    return prompt(name, seed=4, kindred_subject=SubjectTokens(("cat",), (places,)))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def plant(name: str, word: int = WORD) -> Planted:
        signal = Planted(name, word)
        begin = Recorder.begin_pass

        def counted(recorder: Recorder) -> None:
            signal.passes += 1
            begin(recorder)

        monkeypatch.setattr(joint, "joined", signal.joined)
        monkeypatch.setattr(Recorder, "begin_pass", counted)
        return signal

    return plant


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mask_is_where_the_picture_looks_at_the_word(name: str, planted: Any) -> None:
    """By its word alone, in as many calls as mask_steps says."""
    path = bank_of(name).trajectory
    signal = planted(name)
    bank = capture(tiny(name), None, marked(name, WORD), inversion=path)[0]
    y, x = READ[name].grid
    upper = torch.zeros(1, y, x, dtype=torch.bool)
    upper[:, : y // 2] = True
    assert signal.heard and signal.passes == 2 and bank.live
    assert torch.equal(bank.masks[y, x], upper)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_word_is_not_the_subject(name: str, planted: Any) -> None:
    """Its map is dark where the planted one is light."""
    path = bank_of(name).trajectory
    planted(name, word=WORD + 1)
    bank = capture(tiny(name), None, marked(name, WORD), inversion=path)[0]
    y, x = READ[name].grid
    lower = torch.zeros(1, y, x, dtype=torch.bool)
    lower[:, y // 2 :] = True
    assert torch.equal(bank.masks[y, x], lower)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reference_found_by_its_word_is_felt(name: str) -> None:
    photo = {"samples": latent(name, seed=21)}
    bank, mask = capture(tiny(name), photo, marked(name, WORD), steps=3, scheduler="simple")
    assert 0 < bank.masks[READ[name].grid].float().mean() < 1 and 0 < mask.mean() < 1
    assert apart(sample(inject(tiny(name), bank), name), plain(name)) > FELT


@pytest.mark.parametrize("name", ["Flux2", "QwenImage", "SD3.5", "HiDream"])
def test_a_longer_negative_beside_it_moves_no_word(name: str, planted: Any) -> None:
    """FLUX.2 pads both to one length, so they share a pass; elsewhere they are two."""
    planted(name)
    longer = prompt(name, 3, READ[name].words + 3)
    path = bank_of(name).trajectory
    bank = capture(tiny(name), None, marked(name, WORD), inversion=path, negative=longer)[0]
    y, x = READ[name].grid
    assert bank.masks[y, x][0, : y // 2].all() and not bank.masks[y, x][0, y // 2 :].any()


@pytest.mark.parametrize("name", ["Flux", "ZImage", "Anima"])
def test_held_or_not_the_words_find_the_same_mask(name: str) -> None:
    path = bank_of(name).trajectory
    live, held = (capture(tiny(name), None, marked(name, WORD), inversion=path, keeps=k)[0] for k in ("automatic", "keys and values"))
    assert held.bytes and all(torch.equal(live.masks[grid], held.masks[grid]) for grid in live.masks)


def test_a_prompt_without_a_subject_asks_for_a_mask_and_names_the_family() -> None:
    with pytest.raises(ValueError) as error:
        capture(tiny("Flux"), None, prompt("Flux"), inversion=bank_of("Flux").trajectory)
    words = str(error.value)
    assert "marks no subject word" in words and "Flux" in words and "wire a mask" in words


def test_words_that_the_network_does_not_read_ask_for_a_mask() -> None:
    with pytest.raises(ValueError) as error:
        capture(tiny("Flux"), None, marked("Flux", 77), inversion=bank_of("Flux").trajectory)
    assert "cat" in str(error.value) and "Flux" in str(error.value) and "Wire a mask" in str(error.value)


def test_blocks_that_read_no_text_are_no_mask_blocks() -> None:
    path = bank_of("SD3.5").trajectory
    with pytest.raises(ValueError, match="no attention block matches 'self'"):
        capture(tiny("SD3.5"), None, marked("SD3.5", WORD), inversion=path, mask_blocks="self")
