"""Something that happens while Concept Encoder Train trains."""

from __future__ import annotations

from kindred.models.concept.training import Trainer


def at_step(monkeypatch, number, act):
    """Do something once step `number` is done."""
    step = Trainer.step

    def wrapped(self):
        loss = step(self)
        if self.step_number == number:
            act(self)
        return loss

    monkeypatch.setattr(Trainer, "step", wrapped)
