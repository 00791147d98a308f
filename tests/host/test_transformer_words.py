"""The subject's mask by its words on every transformer of the host: a signal planted in its attention is found, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kindred.models.network.backbone import CROSS
from kindred.models.reference.recorder import Recorder
from kindred.models.subject.words import SubjectTokens
from kindred.nodes.host import joint
from kindred.nodes.host.sites import require_backbone
from studio import capture, inject
from test_encoders import HIDING
from test_transformers import FAMILIES, FELT, SAME, apart, bank_of, plain
from tiny_networks import READ, latent, prompt, sample, tiny
from torch import Tensor
from transformer_stories import SHARING, pictures, prompts_of, story

BESIDE = {"HunyuanDiT": 256}  # tokens of another encoder behind the rows
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
        apart = any(call and call[0] == CROSS for call in found.calls)
        least = rows + BESIDE.get(self.name, 0) if apart else count + rows
        if q.shape[1] < count or k.shape[1] < least or (apart and k.shape[1] != least):
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
@pytest.mark.parametrize("place", ["first", "last"])
def test_the_word_may_be_the_first_or_the_last(name: str, place: str, planted: Any) -> None:
    """I62."""
    path = bank_of(name).trajectory
    word = 0 if place == "first" else READ[name].words - 1
    planted(name, word=word)
    bank = capture(tiny(name), None, marked(name, word), inversion=path)[0]
    y, x = READ[name].grid
    assert bank.masks[y, x][0, : y // 2].all() and not bank.masks[y, x][0, y // 2 :].any()


def padded(positive: list, more: int = 5) -> list:
    """The same text with loud rows behind it that its mask hides."""
    [[text, extras]] = positive
    mask = extras.get("attention_mask", torch.ones(text.shape[:2], dtype=torch.long))
    rows = torch.cat([text, 20.0 * torch.ones_like(text[:, :1]).repeat(1, more, 1)], 1)
    return [[rows, extras | {"attention_mask": torch.nn.functional.pad(mask, (0, more))}]]


@pytest.mark.parametrize("name", HIDING)
def test_rows_that_a_mask_hides_move_no_map(name: str) -> None:
    """I62: where lines are filled up to one length, each has the maps of itself alone."""
    path, how = bank_of(name).trajectory, {"mask_steps": 3}
    own, filled = (
        capture(tiny(name), None, text, inversion=path, **how)[0].maps
        for text in (marked(name, WORD), padded(marked(name, WORD)))
    )
    assert own.shape == filled.shape and apart(filled, own) < SAME


@pytest.mark.parametrize("name", HIDING)
def test_a_story_by_word_is_that_of_its_lines_alone(name: str) -> None:
    """I62: the pictures share where the words are, however many rows stand hidden behind the lines."""
    model = story(name, masks=None, **SHARING)
    own, filled = (
        pictures(model, name, positive=text)
        for text in (prompts_of(name, (0, 1, 2)), padded(prompts_of(name, (0, 1, 2))))
    )
    assert apart(filled, own) < 5e-4 < FELT < apart(own, pictures(tiny(name), name))


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
    live, held = (
        capture(tiny(name), None, marked(name, WORD), inversion=path, keeps=k)[0]
        for k in ("automatic", "keys and values")
    )
    assert held.bytes and all(
        torch.equal(live.masks[grid], held.masks[grid]) for grid in live.masks
    )


def test_a_prompt_without_a_subject_asks_for_a_mask_and_names_the_family() -> None:
    with pytest.raises(ValueError) as error:
        capture(tiny("Flux"), None, prompt("Flux"), inversion=bank_of("Flux").trajectory)
    words = str(error.value)
    assert "marks no subject word" in words and "Flux" in words and "wire a mask" in words


def test_words_that_the_network_does_not_read_ask_for_a_mask() -> None:
    with pytest.raises(ValueError) as error:
        capture(tiny("Flux"), None, marked("Flux", 77), inversion=bank_of("Flux").trajectory)
    assert (
        "cat" in str(error.value)
        and "Flux" in str(error.value)
        and "Wire a mask" in str(error.value)
    )


def test_blocks_that_read_no_text_are_no_mask_blocks() -> None:
    path = bank_of("SD3.5").trajectory
    with pytest.raises(ValueError, match="no attention block matches 'self'"):
        capture(tiny("SD3.5"), None, marked("SD3.5", WORD), inversion=path, mask_blocks="self")
