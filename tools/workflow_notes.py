"""What each shipped workflow says on the canvas: its title and its note. tools/workflows.py puts them there."""
from __future__ import annotations

from dataclasses import dataclass

YOURS = """**Your own checkpoint.** Everything here runs on *kindred_miniature*, a small model of a small world that ships with the pack. \
For SD1.5, SD2.x or SDXL: choose it in **Checkpoint**; """
SIZES = "set every **width** and **height** to 512 (SD1.5), 768 (SD2.1) or 1024 (SDXL); cfg 5 to 7; "
PHOTO = "upload your photo in **Load Photo**; name what it shows in **What the photo shows**, and use the same word in every prompt; "
ENCODER = "choose a **concept encoder** made for that family (IP-Adapter full-face weights work), or bypass that node (Ctrl+B)"
MEMORY = "SDXL needs much memory for 50 steps: choose *decoder* in **blocks**, or take 25 steps."


@dataclass(frozen=True)
class Note:
    title: str
    text: str   # what it does and what to look at
    yours: str  # what to change for a real checkpoint


def _personal(*more: str) -> str:
    return YOURS + PHOTO + SIZES + "; ".join(filter(None, more)) + (". " if more else "") + MEMORY


NOTES = {
    "personalize": Note(
        "Personalize from one photo",
        "One photo, new pictures of the same subject; nothing is trained. The photo is inverted, its features are read at every step "
        "(left), and every new picture looks at them while it is made. The concept encoder reads the photo as part of the prompt.\n\n"
        "Turn **strength** of either node: 0 is the plain picture, 1 all of it.", _personal(ENCODER)),
    "self_attention_only": Note(
        "Self-attention injection alone",
        "The half of *personalize* that needs no encoder and works with any checkpoint.", _personal("steps and scheduler of **Read the "
                                                                                                      "subject** follow the sampler's")),
    "concept_only": Note(
        "Concept encoder alone",
        "The photo as part of the prompt: quick, no inversion, poses are free; finer marks are lost.",
        YOURS + "upload your photo in **Load Photo**; " + SIZES + "choose a **concept encoder** made for that family (IP-Adapter full-face "
                "weights work)."),
    "ablation": Note(
        "What each half brings",
        "Paper A's figure: plain, each half alone, both; the same noise in every row. The scores below are the miniature's reader; wire "
        "**Load CLIP Vision** into them for real photos.", _personal(ENCODER)),
    "personalize_hires": Note(
        "Personalize, then larger",
        "The second pass looks at the same reference: its features are read anew at the noise levels that it asks for.",
        _personal("**Larger** 1.5 to 2 times that, **denoise** 0.4 to 0.6 (the miniature knows one size and draws larger ones badly)",
                  ENCODER)),
    "personalize_controlnet": Note(
        "Personalize with ControlNet",
        "The silhouette says where and how, the photo says who. Any ControlNet of the host goes here.",
        _personal("choose a **ControlNet** made for it and its kind of picture (openpose, depth, canny)", ENCODER)),
    "two_subjects": Note(
        "Two subjects in one picture",
        "Each photo is read by its own half of the picture (**target_mask**), and each half has its own prompt. Masks may have any shape.",
        _personal("make the masks of **Who stands where** as large as the picture")),
    "story": Note(
        "One subject in several pictures",
        "ConsiStory: the pictures of one batch share their subject, with no photo and no training. **strength** turns it; *dropout* and "
        "*query_blend* keep the poses apart.",
        YOURS + "write your prompts, one per line, and the **subject** word that all of them contain; " + SIZES + "four SDXL pictures at "
                "once want 24 GB; fewer at a time with *Keep a subject for later*."),
    "story_ablation": Note(
        "What sharing and injection bring",
        "The same noise three times: plain, shared self-attention alone, and with feature injection. The scores compare every pair.",
        YOURS + "write your prompts; " + SIZES + "wire **Load CLIP Vision** into the scores."),
    "story_save_subject": Note(
        "Keep a subject for later",
        "Samples two pictures and writes their subject into one file of output/kindred. *More pictures of a saved subject* goes on "
        "from it, today or on another machine.",
        YOURS + "write your prompts; " + SIZES + "remember steps, sampler and scheduler: further pictures take the same."),
    "story_more_pictures": Note(
        "More pictures of a saved subject",
        "The subject comes out of a file, here one that ships with the pack. One picture at a time or many; none changes another.",
        "**Your own subject.** Make it with *Keep a subject for later*, choose its file in **The saved subject**, its checkpoint in "
        "**Checkpoint**, and the steps, sampler and scheduler that it was made with."),
    "story_from_photo": Note(
        "A story about the subject of photos",
        "The photos are inverted and stand in as anchors: every picture of the story looks at them. Two photos are better than one.",
        _personal("bypass **Another photo of it** if there is one only")),
    "invert_and_inspect": Note(
        "Inversion, and what is read on the way",
        "The photo goes back to noise and forth again: the closer it comes back, the better its features. The preview shows where the "
        "subject was found, and the file keeps it for *Load Reference*.", _personal("write the **prompt** plainly, as the photo is")),
    "train_concept_encoder": Note(
        "Train a concept encoder",
        "Trains the shipped encoder further on two photos and compares before and after. The file lands in models/concept_encoders.",
        YOURS + "load your pictures with **Load Image Dataset from Folder**; start from **Load CLIP Vision** (ViT-L) instead of an "
                "encoder; the paper takes 100,000 steps at 1e-5. For days of training, `tools/train_concept_encoder.py` is the same loop."),
}
