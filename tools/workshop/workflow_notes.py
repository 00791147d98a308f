"""What each shipped workflow says on the canvas: its title and its note. tools/workshop/workflows.py puts them there.

Names in ** ** are titles of the workflow's own nodes, or their inputs; a test looks them up.
"""

from __future__ import annotations

from dataclasses import dataclass

YOURS = """**Your own checkpoint.** Everything here runs on *kindred_miniature*, a small model of a small world that ships with the pack. \
For SD1.5, SD2.x or SDXL choose yours in **Checkpoint**. """
SIZES = "Set each **width** and **height** to 512 (SD1.5), 768 (SD2.1) or 1024 (SDXL), and **cfg** to 5 to 7. "
PHOTO = "Upload your photo in **Photo of the subject**, say what it shows in **What the photo shows**, and use that word in every prompt. "
STEPS = "Change **steps** and **scheduler** in **Read the subject** and in the samplers together. "
ENCODER = (
    "An encoder fits one family: choose one for yours in **Concept encoder** (IP-Adapter full-face weights work, with Load CLIP "
    "Vision wired into it), or bypass **{reader}** (Ctrl+B). "
)
MEMORY = "SDXL takes much memory for 50 steps: write *decoder* into **blocks**, or take 25 steps."
SAMPLED = "The paper samples with DDIM, 50 steps, CFG 5 and ComfyUI's FreeU (b1 1.1, b2 1.2, s1 0.6, s2 0.4)"
SCORES = "The scores are the miniature's reader and mean nothing for other pictures: wire Load CLIP Vision into them. "
READER = "Let them read it as part of the prompt"


@dataclass(frozen=True)
class Note:
    title: str
    text: str  # what it does and what to look at
    yours: str  # what to change for a real checkpoint


def _personal(*more: str) -> str:
    return YOURS + PHOTO + SIZES + STEPS + "".join(more) + MEMORY


NOTES = {
    "personalize": Note(
        "Personalize from one photo",
        "One photo, new pictures of the same subject; nothing is trained. The photo is inverted, its features are read at every step "
        "(left), and every new picture looks at them while it is made. The concept encoder reads the photo as part of the prompt.\n\n"
        "Turn **strength** of either node: 0 is the plain picture, 1 all of it.",
        _personal(ENCODER.format(reader=READER)),
    ),
    "self_attention_only": Note(
        "Self-attention injection alone",
        "The half of *personalize* that needs no encoder and works with any checkpoint.",
        _personal(),
    ),
    "concept_only": Note(
        "Concept encoder alone",
        "The photo as part of the prompt: quick, no inversion, poses are free; finer marks are lost.",
        YOURS
        + "Upload your photo in **Photo of the subject** and write your prompts. "
        + SIZES
        + "Choose an encoder for that family in "
        "**Concept encoder** (IP-Adapter full-face weights work, with Load CLIP Vision wired into it).",
    ),
    "ablation": Note(
        "What each half brings",
        "Paper A's figure: plain, each half alone, both; the same noise in every row.",
        _personal(
            "An encoder fits one family: choose one for yours in **Concept encoder**. ", SCORES
        ),
    ),
    "personalize_hires": Note(
        "Personalize, then larger",
        "The second pass looks at the same reference: its features are read anew at the noise levels that it asks for. The miniature knows "
        "one size and draws larger ones badly.",
        _personal(
            "**Larger** is 1.5 to 2 times that, with **denoise** 0.4 to 0.6 in **Second pass**. ",
            ENCODER.format(reader=READER),
        ),
    ),
    "personalize_controlnet": Note(
        "Personalize with ControlNet",
        "The silhouette says where and how, the photo says who. Any ControlNet of the host goes here.",
        _personal(
            "Choose a ControlNet for that family in **ControlNet**, and in **Silhouette** the picture it reads (a pose, a depth map, "
            "edges). ",
            ENCODER.format(reader=READER),
        ),
    ),
    "two_subjects": Note(
        "Two subjects in one picture",
        "Each photo is read by its own half of the picture (**target_mask**), and each half has its own prompt. Masks may have any shape.",
        YOURS
        + "Upload your photos, say what they show, and use those words in the prompts. Photos: 512 x 512 (SD1.5) or 1024 x 1024 "
        "(SDXL). **Nothing** and **Size**: twice as wide; **Half of the picture**: as the photos. **cfg** 5 to 7. "
        + MEMORY,
    ),
    "story": Note(
        "One subject in several pictures",
        "ConsiStory: the pictures of one batch share their subject, with no photo and no training. **strength** turns it; **dropout** "
        f"and **query_blend** keep the poses apart.\n\n{SAMPLED}, as *A story with FreeU* does; this one is without FreeU.",
        YOURS
        + "Write your prompts, one per line, and the **subject** word that all of them contain. "
        + SIZES
        + "The pictures are "
        "sampled together and need memory together; *Keep a subject for later* takes fewer at a time.",
    ),
    "story_freeu": Note(
        "A story with FreeU",
        f"*One subject in several pictures*, sampled as the ConsiStory paper does. {SAMPLED}: skip connections count less and the "
        "features that come from below count more. The numbers are for SDXL; of the miniature's features **b1** and **s1** touch none. "
        "Bypass **What the paper samples with** (Ctrl+B) to see what it does.",
        YOURS
        + "Write your prompts, one per line, and the **subject** word that all of them contain. "
        + SIZES
        + "For SD1.5 FreeU's "
        "authors take other numbers: b1 1.5, b2 1.6, s1 0.9, s2 0.2.",
    ),
    "story_ablation": Note(
        "What sharing and injection bring",
        "The same noise three times: plain, shared self-attention alone, and with feature injection. The scores compare every pair.",
        YOURS + "Write your prompts, one per line, and their **subject** word. " + SIZES + SCORES,
    ),
    "story_save_subject": Note(
        "Keep a subject for later",
        "Samples two pictures and writes their subject into one file of output/kindred. *More pictures of a saved subject* goes on "
        "from it, today or on another machine.",
        YOURS
        + "Write your prompts and their **subject** word. "
        + SIZES
        + "Remember size, steps, sampler and scheduler: further pictures "
        "take the same.",
    ),
    "story_more_pictures": Note(
        "More pictures of a saved subject",
        "The subject comes out of a file, here one that ships with the pack. One picture at a time or many; none changes another.",
        "**Your own subject.** Make one with *Keep a subject for later*, on SD1.5, SD2.x or SDXL. Choose its file in **The saved "
        "subject** and its checkpoint in **Checkpoint**, and take the **width**, **height**, **cfg**, **steps**, **sampler_name** and "
        "**scheduler** that it was made with.",
    ),
    "story_from_photo": Note(
        "A story about the subject of photos",
        "The photos are inverted and stand in as anchors: every picture of the story looks at them. Two photos are better than one.",
        YOURS
        + "Upload yours in **Photo of the subject** and **Another photo of it** (the same one twice, if there is one only), say what "
        "they show in **What the photos show**, and use that word in every prompt. "
        + SIZES
        + STEPS
        + "SDXL takes much memory for "
        "50 steps: take 25.",
    ),
    "invert_and_inspect": Note(
        "Inversion, and what is read on the way",
        "The photo goes back to noise and forth again: the closer it comes back, the better its features. The preview shows where the "
        "subject was found, and the file keeps it for *Load Reference*.",
        YOURS
        + "Upload your photo in **Photo of the subject** and say plainly what it shows. Set **width** and **height** to 512 "
        "(SD1.5), 768 (SD2.1) or 1024 (SDXL). **cfg** stays 1, or the photo does not come back; **steps** are the same in "
        "**Back to noise**, **Sample from that noise** and every sampler that will read the file.",
    ),
    "train_concept_encoder": Note(
        "Train a concept encoder",
        "Trains the shipped encoder a little further on two photos and compares before and after: it shows how training goes, in less than "
        "a minute, not how far. The file lands in models/concept_encoders.",
        YOURS
        + "Load your pictures with Load Image Dataset from Folder into **Train it on them**, write what they show into **prompt**, "
        "and wire Load CLIP Vision (ViT-L) there instead of **Concept encoder**. Then delete **The encoder as it came** and "
        "**Before**: the miniature's encoder fits no other family. "
        + SIZES
        + "The paper takes 100,000 steps at 1e-5; for days of "
        "training, tools/workshop/train_concept_encoder.py is the same loop.",
    ),
}
