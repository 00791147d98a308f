"""What each shipped workflow says on the canvas: its title and its note. tools/workshop/workflows.py puts them there.

Names in ** ** are titles of the workflow's own nodes, or their inputs; a test looks them up.
"""

from __future__ import annotations

from dataclasses import dataclass

from flow_workflow import NAME, offered

# what to change for a checkpoint of one's own: a line each, from the second on
YOURS = (
    "This workflow uses *kindred_miniature*, a tiny trained model of a cartoon world, so that it runs at once. It draws only cats, dogs, "
    "birds, fish and robots in eight places, at 128 pixels. To use SD1.5, SD2.x or SDXL:\n\n- Choose yours in **Checkpoint**."
)
PAINT = (
    "\n- If **Where the subject was found** is wrong, right-click **Photo of the subject**, open the mask editor, paint the subject and "
    "wire that node's *mask* into **Read the subject**."
)
SIZES = "\n- Set each **width** and **height**, and **cfg**, as the table says."
PHOTO = (
    "\n- Upload your photo in **Photo of the subject**, write what it shows into **The subject in a word**, and use that word in every "
    "line of **New pictures, one per line**. **What the photo shows** makes a sentence from its **style** and that word."
)
STEPS = "\n- Keep **steps** and **scheduler** the same in **Read the subject** and in the samplers."
ONCE = (
    "\n- **Steps of all**, **Seed of all** and **cfg of all** go to every sampler. Keep **scheduler** the same in **Read the subject** "
    "and in the four samplers; three of them are closed: click the dot or arrow before the title to open one."
)
ENCODER = (
    "\n- Choose an encoder of that family in **Concept encoder** and wire Load CLIP Vision into it, as the table says, or bypass "
    "**{reader}** (Ctrl+B) and set **preset** of **Let the new pictures look at it** to *identity*."
)
ONE_PLACE = (
    "\n- Set **width**, **height**, **cfg** and **steps** once, as the table says: they go to every node inside."
    "\n- To use this node in a workflow of your own, double-click the canvas and search for its name."
)
MEMORY = "\n- Where memory is short take fewer steps, or write *decoder* into **blocks**."
TABLE = """| checkpoint | width, height | cfg | steps | a photo takes | encoder | its CLIP Vision |
|---|---|---|---|---|---|---|
| SD1.5 | 512 | 5 to 7 | 25 to 50 | 23 MB a step | ip-adapter-full-face_sd15.safetensors | CLIP ViT-H |
| SD2.1 | 768 | 5 to 7 | 25 to 50 | 52 MB a step | one that you train | as trained |
| SDXL | 1024 | 5 to 7 | 25 | 210 MB a step | one that you train | as trained |

A photo takes main memory (RAM), here for all blocks in half precision; with a mask only the subject's share. Put encoders into \
models/concept_encoders, CLIP Vision into models/clip_vision. **FLUX, Qwen-Image, Z-Image, SD3.5**: use *personalize_flux* and \
the templates like it; their notes name files, steps and guidance."""
SAMPLED = "The paper samples with DDIM, 50 steps, CFG 5 and ComfyUI's FreeU (b1 1.1, b2 1.2, s1 0.6, s2 0.4)"
SCORES = "\n- These scores only work for the miniature. For your pictures connect Load CLIP Vision."
READER = "Let them read it as part of the prompt"
# what the workflows for transformers hold, a line each; a test compares them with the nodes
CHOICES = {
    "personalize_flux": "*FLUX.1 dev* (template *personalize_flux*): 20 steps, euler, simple, Flux Guidance 3.5 without cfg, "
    "1024 x 1024, blocks *single*. The photo is inverted at guidance 1 and read at the guidance of the pictures. Files: "
    "flux1-dev.safetensors, clip_l.safetensors, t5xxl_fp16.safetensors (or t5xxl_fp8_e4m3fn.safetensors), ae.safetensors.",
    "personalize_flux2": "*FLUX.2 Klein, base* (template *personalize_flux2*): 20 steps, euler, Flux2Scheduler, cfg 5, "
    "1024 x 1024, blocks *single*. Files: flux-2-klein-base-4b-fp8.safetensors, qwen_3_4b.safetensors, flux2-vae.safetensors.",
    "personalize_qwen_image": "*Qwen-Image* (template *personalize_qwen_image*): 20 steps (50 for the best), euler, simple, cfg 4, "
    "shift 3.1, 1328 x 1328, blocks *decoder*. Files: qwen_image_fp8_e4m3fn.safetensors, qwen_2.5_vl_7b_fp8_scaled.safetensors, "
    "qwen_image_vae.safetensors.",
    "personalize_z_image": "*Z-Image Turbo* (template *personalize_z_image*): 8 steps, res_multistep, simple, cfg 1, shift 3, "
    "1024 x 1024, blocks *decoder*, the photo by *forward noise*. Files: z_image_turbo_bf16.safetensors, qwen_3_4b.safetensors, "
    "ae.safetensors.",
    "personalize_sd35": "*SD3.5 large* (template *personalize_sd35*): 28 steps, euler, sgm_uniform, cfg 4.5, 1024 x 1024, "
    "blocks *all*. Files: sd3.5_large.safetensors, clip_l.safetensors, clip_g.safetensors, t5xxl_fp16.safetensors.",
}
KIN = (
    "*FLUX.1 schnell*: as FLUX.1 dev, with 4 steps, without guidance, the photo by *forward noise* (the *method* of DDIM Invert).",
    "*FLUX.2 dev*: as Klein, with flux2_dev_fp8mixed.safetensors and mistral_3_small_flux2_bf16.safetensors, cfg 1, and Flux Guidance 4 "
    "behind both prompts, the photo's too.",
    "*Qwen-Image with a Lightning LoRA*: 8 steps, cfg 1; the LoRA stands before the shift, and DDIM Invert with *forward noise* "
    "before Ref-UNet Feature Capture, as in *personalize_z_image*.",
    "*Z-Image base*: as Turbo, with z_image_bf16.safetensors, 30 to 50 steps, cfg 3 to 5, an empty negative, the photo by *fireflow*.",
    "*Chroma*: as Qwen-Image, with Chroma1-HD.safetensors, Load CLIP of type *chroma* with t5xxl_fp16.safetensors, ae.safetensors, "
    "without the shift, 26 to 40 steps, cfg 4, 1024 x 1024, blocks *single*; all lines with the same number of tokens.",
    "*SD3.5 without its VAE (a diffusion model alone)*: Load Diffusion Model and Load VAE in place of the checkpoint.",
)
CHOOSE = "- Choose your own files in the loaders; the canvas offers those that are missing, where ComfyUI knows a link."
TOGETHER = "\n- Steps, schedule and size are the same for the photo and the pictures: change them together."
LIVE = (
    " The photo is read again in every step, beside the pictures: one extra model call a step, however many pictures there are."
    "\n\nTurn **strength**: 0 is the plain picture, bit for bit, 1 all of the likeness."
)
EQUAL = (
    "\n- Z-Image and Chroma need the same number of tokens in all lines of **New pictures, one per line**; if they differ, sample the "
    "lines one by one. Qwen-Image takes any lines."
)
FAMILY_BLOCKS = (
    "**blocks**, in both nodes: published methods read in FLUX's single blocks, in the later half of Qwen-Image's and Z-Image's, and in "
    "all of SD3.5's; early blocks bring more of the photo's layout along. Nothing was measured on these weights here. **end_percent** "
    "below 1 leaves the last steps to the prompt."
)
FAMILY_MEMORY = (
    "Memory: in a step, every block that is read holds two numbers for each channel of each token on the subject (FLUX.1 at 1024 x 1024, "
    "38 blocks, a subject on a quarter of the picture: 0.5 GB). To need less, use fewer **blocks**, a smaller mask or a **token_share** of "
    "0.5, or sample the pictures one by one."
)


@dataclass(frozen=True)
class Note:
    title: str
    text: str  # what it does and what to look at
    yours: str  # what to change for a real checkpoint


def _personal(*more: str, paint: str = PAINT, steps: str = STEPS) -> str:
    return YOURS + PHOTO + paint + SIZES + steps + "".join(more) + MEMORY


def _family(title: str, text: str, *more: str) -> Note:
    """A workflow for one family of transformers; every note has the lines of all of them."""
    lines = "\n".join(f"- {line}" for line in (*CHOICES.values(), *KIN))
    return Note(
        title,
        "One photo, new pictures of the same subject; nothing is trained. " + text + LIVE,
        CHOOSE
        + PHOTO
        + PAINT
        + TOGETHER
        + "".join(more)
        + f"\n\n### What to choose\n\n{lines}\n\n{FAMILY_BLOCKS}\n\n{FAMILY_MEMORY}",
    )


NOTES = {
    "personalize": Note(
        "Personalize from one photo",
        "One photo, new pictures of the same subject; nothing is trained. Kindred reads the photo once (left), and every new "
        "picture looks at what was read while it is made. The concept encoder reads the photo as part of the prompt.\n\n"
        "**strength** of either node: 0 ignores the photo, 1 copies most. **preset** has ready settings.",
        _personal(ENCODER.format(reader=READER)),
    ),
    "personalize_app": Note(
        "New pictures from my photo",
        "Choose a photo, say in a word what it shows, write a line for each new picture, press Run. As an app it shows only these fields; "
        "*Enter node graph* in its menu leads here, and the icon on *Personalize from my photo* opens the nodes inside. **likeness** is "
        "how much of the subject comes through: 0 is the plain picture. **preset** has ready settings.",
        YOURS + "\n- Upload yours in **Your photo**, and use its word in every line." + ONE_PLACE,
    ),
    "story_app": Note(
        "One character in several pictures",
        "Write a line for each picture and the word for their subject, press Run. As an app it shows only these fields; *Enter node "
        "graph* in its menu leads here, and the icon on *Story of one character* opens the nodes inside. **likeness** is how alike "
        "the subjects become: 0 leaves the plain pictures.",
        YOURS + ONE_PLACE + "\n- The pictures are sampled together and need memory together.",
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
        + "\n- Upload your photo in **Photo of the subject** and write your prompts."
        + SIZES
        + "\n- Choose an encoder of that family in **Concept encoder** and wire Load CLIP Vision into it, as the table says.",
    ),
    "ablation": Note(
        "What each half brings",
        "Compare: without Kindred, each method alone, both; the same noise in every row. It is the figure of the paper.",
        _personal(
            "\n- Choose an encoder of that family in **Concept encoder**, as the table says.",
            SCORES,
            paint="",
            steps=ONCE,
        ),
    ),
    "personalize_hires": Note(
        "Personalize, then larger",
        "The second pass looks at the same reference: its features are read anew at the noise levels that it asks for. The miniature knows "
        "one size and draws larger ones badly.",
        _personal(
            "\n- Set **Larger** to 1.5 to 2 times that size, and **denoise** in **Second pass** to 0.4 to 0.6.",
            ENCODER.format(reader=READER),
        ),
    ),
    "personalize_controlnet": Note(
        "Personalize with ControlNet",
        "The silhouette says where and how, the photo says who. Any ControlNet of the host goes here.",
        _personal(
            "\n- Choose a ControlNet for that family in **ControlNet**, and in **Silhouette** the picture it reads (a pose, a depth map, "
            "edges).",
            ENCODER.format(reader=READER),
        ),
    ),
    "two_subjects": Note(
        "Two subjects in one picture",
        "Each photo is read by its own half of the picture (**target_mask**), and each half has its own prompt. Masks may have any shape.",
        YOURS
        + "\n- Upload your photos, write what they show into **Left subject in a word** and **Right subject in a word**, and use "
        "those words in **Left** and **Right**."
        "\n- Set the photos' **width** and **height** as the table says, **Half of the picture** to the same, **Nothing** and **Size** to "
        "twice the width, and **cfg**." + MEMORY,
    ),
    "story": Note(
        "One subject in several pictures",
        "ConsiStory: the pictures of one batch share their subject, with no photo and no training. **strength** is the dial; **dropout** "
        "(and **query_blend**, an advanced input) keep the poses apart."
        f"\n\n{SAMPLED}, as *story_freeu* does; this one is without FreeU.",
        YOURS
        + "\n- Write your prompts, one per line, and the **subject** word that all of them contain."
        + SIZES
        + "\n- The pictures are sampled together and need memory together; *story_save_subject* takes fewer at a time.",
    ),
    "story_freeu": Note(
        "A story with FreeU",
        f"*story*, sampled as the ConsiStory paper does. {SAMPLED}: skip connections count less and the "
        "features of deeper layers count more. The numbers are for SDXL; on the miniature **b1** and **s1** have no effect. "
        "Bypass **What the paper samples with** (Ctrl+B) to see what it does.",
        YOURS
        + "\n- Write your prompts, one per line, and the **subject** word that all of them contain."
        + SIZES
        + "\n- For SD1.5 FreeU's "
        "authors take other numbers: b1 1.5, b2 1.6, s1 0.9, s2 0.2.",
    ),
    "story_ablation": Note(
        "What sharing and injection bring",
        "The same noise three times: plain, shared self-attention alone, and with feature injection. The scores compare every pair.",
        YOURS
        + "\n- Write your prompts, one per line, and their **subject** word."
        + SIZES
        + SCORES,
    ),
    "story_save_subject": Note(
        "Keep a subject for later",
        "Samples two pictures and writes their subject into one file of output/kindred. *story_more_pictures* goes on "
        "from it, today or on another machine.",
        YOURS
        + "\n- Write your prompts and their **subject** word."
        + SIZES
        + "\n- Remember size, steps, sampler and scheduler: further pictures "
        "take the same.",
    ),
    "story_more_pictures": Note(
        "More pictures of a saved subject",
        "The subject comes from a file, here one that ships with the pack. Add or remove lines: the other pictures stay the same.",
        "**Your own subject.** Make one with *story_save_subject*, on SD1.5, SD2.x or SDXL, or save a photo's subject with Save Reference. "
        "Choose its file in **The saved subject**, its checkpoint in **Checkpoint**, and the **cfg** that it was made with. Size, "
        "steps, sampler and scheduler come from the file; its word belongs into **subject** and into every line.",
    ),
    "story_from_photo": Note(
        "A story about the subject of photos",
        "The photos are inverted and stand in as anchors: every picture of the story looks at them. Two photos are better than one.",
        YOURS
        + "\n- Upload yours in **Photo of the subject** and **Another photo of it** (the same one twice, if there is one only), say what "
        "they show in **The subject in a word**, and use that word in every prompt."
        + SIZES
        + STEPS,
    ),
    "invert_and_inspect": Note(
        "Inversion, and what is read on the way",
        "Turns the photo into noise and back again: the closer it comes back, the better its features. The preview shows where the "
        "subject was found, and the file keeps it for *Load Reference*.",
        YOURS
        + "\n- Upload your photo in **Photo of the subject** and write what it shows into **The subject in a word**."
        "\n- Set **width** and **height** as the table says. **cfg** stays 1, or the photo does not come back; **steps** are the same in "
        "**Back to noise**, **Sample from that noise** and every sampler that will read the file.",
    ),
    "measure_blocks": Note(
        "Which blocks matter",
        "One picture, noised, goes through the model once for each block without its attention, once with its keys moved, and once "
        "lent another picture: the chart shows how much changes. The result is kept: write *measured* into *blocks* of "
        "Ref-UNet Feature Capture or Masked Self-Attn Inject to use it.",
        YOURS + "\n- Load a picture that it could have drawn in **Picture** and say what it shows."
        "\n- Set **width** and **height** to the size that you draw at."
        "\n- More **noise_levels** make the figures steadier and take as many times longer.",
    ),
    "train_concept_encoder": Note(
        "Train a concept encoder",
        "Trains the shipped encoder a little further on two photos and compares before and after: a one-minute demonstration, "
        "not a full training. The file lands in models/concept_encoders.",
        YOURS
        + "\n- Load your pictures with Load Image Dataset from Folder into **Train it on them**, write what they show into **prompt**, "
        "and wire Load CLIP Vision (ViT-L) there instead of **Concept encoder**.\n- Then delete **The encoder as it came** and "
        "**Before**: the miniature's encoder fits no other family."
        + SIZES
        + "\n- The paper takes 100,000 steps at 1e-5; for days of "
        "training, tools/workshop/train_concept_encoder.py is the same loop.",
    ),
    "personalize_flux": _family(
        "Personalize with FLUX.1",
        "The form of most FLUX.1 workflows: three loaders, guidance in the prompt, a guider without cfg. The photo is inverted at "
        "guidance 1, as published inversions of FLUX do, and read at the guidance of the pictures.",
    ),
    "personalize_flux2": _family(
        "Personalize with FLUX.2",
        "FLUX.2 has its own schedule, which depends on the size: **Steps** goes to the photo and to the sampler alike.",
        "\n- **Steps** has the **width** and **height** of **Size**.",
    ),
    "personalize_qwen_image": _family(
        "Personalize with Qwen-Image",
        "The shift stands before everything, so that photo and pictures have one schedule.",
        EQUAL,
    ),
    "personalize_z_image": _family(
        "Personalize with Z-Image",
        "A model of eight steps cannot be inverted: the photo gets one noise, as much as each step has (**method** *forward noise*).",
        EQUAL,
    ),
    "personalize_sd35": _family(
        "Personalize with SD3.5",
        "The checkpoint holds transformer and VAE; the three text encoders are files of their own.",
    ),
}
if offered():
    NOTES[NAME] = Note(
        "Personalize with the flow miniature",
        "The same as *personalize* on a small transformer in FLUX's layout: text and picture share one attention, so the "
        "prompt keeps its share (**text_share**). There is no concept encoder for it yet.",
        YOURS
        + PHOTO
        + SIZES
        + STEPS
        + "\n- For FLUX.1, Qwen-Image and other transformers take the workflows of their own: their loaders and samplers differ.",
    )
