"""A prompt of which the host finds a mistake before anything runs, in all of it or in a part."""

import pytest
from client import Client, PromptRefused
from fake_host import FakeHost

SENTENCE = "Subject Prompts: line 2, 'a bird', does not contain the subject 'cat'. Write it there."
MISTAKES = {
    "5": {
        "class_type": "KindredSubjectPrompts",
        "errors": [
            {
                "type": "custom_validation_failed",
                "message": "Custom validation failed for node",
                "details": f"{name} - {SENTENCE}",
            }
            for name in ("prompts", "subject", "style")
        ],
    },
    "7": {
        "class_type": "KSampler",
        "errors": [
            {"type": "value_bigger_than_max", "message": "Value 9 too big", "details": "cfg"}
        ],
    },
}


@pytest.mark.parametrize("whole", [True, False])
def test_each_sentence_is_said_once_and_nothing_runs(whole):
    """Where a mistake reaches a part alone, ComfyUI takes the prompt and would run the rest."""
    with FakeHost() as host:
        host.hold, host.mistakes, host.refuse = True, MISTAKES, int(whole)
        with pytest.raises(PromptRefused) as refused:
            Client(host.url).queue({"1": {}}, "an-id")
        assert refused.value.nodes == {"5": [SENTENCE], "7": ["Value 9 too big: cfg"]}
        assert host.posts == host.cancelled == ([] if whole else ["an-id"])
        assert host.states.get("an-id") == (None if whole else "cancelled") and not host.wrong


def test_a_prompt_without_mistakes_is_left_to_run():
    with FakeHost() as host:
        assert Client(host.url).queue({"1": {}}, "an-id") == "an-id" and not host.cancelled
