"""The laws that the tables of docs/networks.md show, and which families they do not ask."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """A column of a table: its heading, the test that it is, and what it says."""

    name: str
    test: str  # file and function in ROOM
    meaning: str


@dataclass(frozen=True)
class Exempt:
    """Families that some laws do not ask, and why."""

    families: frozenset[str]
    laws: frozenset[str]
    reason: str


NETWORK = (
    Law(
        "calls",
        "test_networks.py::test_a_pass_makes_the_calls_that_the_backbone_says",
        "a pass makes the attention calls that the table above says",
    ),
    Law(
        "unchanged",
        "test_networks.py::test_the_layout_of_the_methods_changes_no_bit",
        "where every call is heard and nothing is wired, the picture is the plain one, bit for bit",
    ),
    Law(
        "place",
        "test_networks.py::test_one_changed_patch_is_one_changed_token_of_the_picture",
        "one changed patch of the picture is one changed token where the picture is looked for",
    ),
    Law(
        "rows",
        "test_networks.py::test_one_changed_row_of_the_text_is_one_changed_token",
        "one changed row of the CONDITIONING is one changed token where the text is looked for",
    ),
    Law(
        "keys",
        "test_networks.py::test_keys_beside_another_text_are_those_that_the_backbone_turns",
        "keys beside another text are the same, or the same once turned or placed there (1e-6)",
    ),
    Law(
        "turned",
        "test_networks.py::test_keys_turned_to_another_place_are_those_that_the_host_makes_there",
        "keys turned to another place are those that the network makes there (1e-5)",
    ),
    Law(
        "noise",
        "test_networks.py::test_noise_is_mixed_as_the_host_mixes_it",
        "the noise is mixed as ComfyUI mixes it",
    ),
    Law(
        "inverted",
        "test_transformers.py::test_an_inversion_and_its_latent_lead_to_the_same_reference",
        "DDIM Invert and a latent lead to the same reference, finite at full noise",
    ),
    Law(
        "drawn",
        "test_transformers.py::test_a_reference_is_drawn",
        "Reference Preview's latents are as the family's VAE takes them",
    ),
)
REFERENCE = (
    Law(
        "nothing",
        "test_transformers_plain.py::test_where_nothing_is_read_no_bit_changes",
        "strength 0, full strength 0, a black mask, outside of its steps: the plain picture, bit for bit",
    ),
    Law(
        "watched",
        "test_transformers_plain.py::test_a_pass_that_is_watched_is_the_plain_one",
        "while a reference is captured every layer answers what it answers unwatched, bit for bit",
    ),
    Law(
        "felt, gone",
        "test_transformers.py::test_a_reference_is_felt_and_gone_with_its_node",
        "another photo changes the picture; without the node the plain picture is back, "
        "bit for bit",
    ),
    Law(
        "itself",
        "test_transformers.py::test_a_picture_that_reads_itself_stays_as_it_is",
        "a picture that reads itself stays as it is, at every strength (1e-5)",
    ),
    Law(
        "text",
        "test_transformers.py::test_the_text_keeps_its_share_unless_told_otherwise",
        "the prompt keeps its share, and only *plain* dims it",
    ),
    Law(
        "share",
        "test_transformers_plain.py::test_every_rows_text_keeps_its_share",
        "in every row, head and block the text's share of the softmax is the plain one, whatever "
        "is read and wherever it stands (1e-5)",
    ),
    Law(
        "stands",
        "test_placed_references.py::test_each_place_is_felt_and_a_middle_of_one_size_is_its_own",
        "each place of a reference is another picture; centred, a photo of the picture's size is "
        "at its own place (1e-5)",
    ),
    Law(
        "held, live",
        "test_transformers.py::test_held_or_read_anew_the_reference_is_the_same",
        "a reference that is held and one that is read anew draw the same picture (1e-5)",
    ),
    Law(
        "saved",
        "test_transformers.py::test_a_saved_reference_draws_the_same_picture",
        "saved and loaded, live or held: the same picture, bit for bit",
    ),
    Law(
        "samplers",
        "test_transformers.py::test_it_is_felt_however_one_samples",
        "CFG 1, three pictures, heun, an ancestral and an SDE sampler, other steps",
    ),
    Law(
        "batch",
        "test_transformers_plain.py::test_each_picture_of_a_batch_is_the_one_drawn_alone",
        "each picture of a batch of three is the one drawn alone (1e-5)",
    ),
    Law(
        "halves",
        "test_transformers_plain.py::test_halves_in_two_calls_are_halves_in_one",
        "cond and uncond in one call or in two, read by one half or by both (1e-5)",
    ),
    Law(
        "sizes",
        "test_transformers.py::test_odd_sizes_and_other_texts_are_read_too",
        "a picture and a photo of other and odd sizes, a prompt of another length",
    ),
    Law(
        "failed",
        "test_transformers_plain.py::test_a_run_that_fails_or_is_interrupted_leaves_nothing",
        "a run that fails between two calls or inside of the network, or is interrupted, leaves "
        "nothing: the next pictures are those of a fresh MODEL, bit for bit",
    ),
    Law(
        "word",
        "test_transformer_words.py::test_the_mask_is_where_the_picture_looks_at_the_word",
        "the mask found by a word is where the picture looks at it, by a planted signal",
    ),
)
CONCEPT = (
    Law(
        "concept",
        "test_transformer_concepts.py::test_a_photo_is_felt_and_gone_with_its_node",
        "another photo of a concept changes the picture; without the node the plain picture is "
        "back, bit for bit",
    ),
    Law(
        "silent",
        "test_transformer_concepts.py::test_values_of_zero_are_the_plain_picture",
        "a concept whose values are 0 is the plain picture, bit for bit",
    ),
    Law(
        "outside",
        "test_transformer_concepts.py::test_outside_of_its_window_nothing_is_touched",
        "outside of its steps a concept changes no bit",
    ),
    Law(
        "text's rows",
        "test_transformer_concepts.py::test_rows_of_the_text_stay_as_they_are",
        "where a concept is read, the text's rows keep every bit",
    ),
    Law(
        "sampled",
        "test_transformer_concepts.py::test_it_is_felt_however_one_samples",
        "CFG 1, three pictures, heun",
    ),
    Law(
        "split",
        "test_transformer_concepts.py::test_halves_in_two_calls_are_halves_in_one",
        "the halves of guidance read a concept in two calls as in one (1e-5)",
    ),
    Law(
        "both",
        "test_transformer_concepts.py::test_both_injections_in_either_order",
        "both injections of paper A on one MODEL, in either order (1e-5)",
    ),
)
STORY = (
    Law(
        "shared",
        "test_transformer_stories.py::test_the_others_are_felt_and_gone_with_the_node",
        "a story's pictures feel one another; without the node the plain ones are back, "
        "bit for bit",
    ),
    Law(
        "none shared",
        "test_transformer_stories.py::test_where_nothing_is_shared_no_bit_changes",
        "strength 0, dropout 1, black masks, one picture alone: the plain pictures, bit for bit",
    ),
    Law(
        "windows",
        "test_transformer_stories.py::"
        "test_outside_of_their_windows_blending_and_injection_change_no_bit",
        "blending and injection outside of their windows change no bit",
    ),
    Law(
        "order",
        "test_transformer_stories.py::test_the_order_of_the_pictures_is_irrelevant",
        "the order of the pictures does not matter where all read all (5e-4)",
    ),
    Law(
        "extras",
        "test_transformer_stories.py::test_extras_change_neither_the_anchors_nor_one_another",
        "further pictures change neither the anchors nor one another (5e-4)",
    ),
    Law(
        "equal",
        "test_transformer_stories.py::"
        "test_equal_pictures_stay_as_they_are_and_the_text_keeps_its_share",
        "equal pictures that read one another stay as they are, and only *plain* dims the prompt "
        "(1e-5)",
    ),
    Law(
        "story, samplers",
        "test_transformer_stories.py::test_it_is_felt_however_one_samples",
        "a whole story with CFG 1, heun and an SDE sampler, and of four steps",
    ),
    Law(
        "one call, two",
        "test_transformer_stories.py::test_cond_and_uncond_in_one_call_or_in_two",
        "cond and uncond in one call or in two (5e-4)",
    ),
    Law(
        "blended, mixed",
        "test_transformer_stories.py::test_blended_queries_and_injected_features_are_felt",
        "query blending and feature injection are felt, each alone",
    ),
    Law(
        "by word",
        "test_transformer_stories.py::test_the_word_finds_the_subject",
        "a story whose subject is found by its word; its first step is plain",
    ),
)
FURTHER = (
    Law(
        "sampled, nothing",
        "test_transformers_plain.py::test_outside_of_its_steps_no_bit_changes_however_one_samples",
        "outside of its steps: the plain picture, bit for bit, with CFG 1, three pictures, heun, "
        "an ancestral and an SDE sampler, an odd size beside a longer prompt",
    ),
    Law(
        "sampled, itself",
        "test_transformers_plain.py::test_a_picture_that_reads_itself_stays_however_one_samples",
        "a picture that reads itself stays as it is with an ancestral and an SDE sampler, and of "
        "an odd size beside a longer prompt (1e-5)",
    ),
    Law(
        "text unread",
        "test_transformer_rows.py::test_the_texts_rows_read_no_reference",
        "in the first block that is read every row of the picture is another, and no other row",
    ),
    Law(
        "spot",
        "test_transformer_rows.py::test_a_spot_of_the_photo_is_the_same_token_in_every_block",
        "a spot of an odd photo is the token that lies there, in every block",
    ),
    Law(
        "spot read",
        "test_transformer_rows.py::test_a_spot_of_the_target_mask_is_one_row",
        "a spot of the target mask on an odd picture is the one row that reads",
    ),
    Law(
        "one of three",
        "test_transformer_rows.py::test_of_a_batch_the_picture_with_a_white_mask_alone_reads",
        "of three pictures the one whose mask is white reads; the others are plain (1e-5)",
    ),
    Law(
        "first, last",
        "test_transformer_words.py::test_the_word_may_be_the_first_or_the_last",
        "the mask found by a word is the same where the word is the first row or the last",
    ),
    Law(
        "begun",
        "test_transformers.py::test_an_inversion_starts_the_hosts_sampler_at_its_end",
        "an inversion starts ComfyUI's sampler at its last latent: a flow's as noise, to the bit; a "
        "diffusion's as a latent without noise (1e-5)",
    ),
    Law(
        "capture fails",
        "test_transformers_plain.py::test_a_capture_that_fails_leaves_nothing",
        "a capture that fails inside of the network leaves nothing: the next one and the next "
        "pictures are as ever, bit for bit",
    ),
    Law(
        "channels",
        "test_transformer_bad_input.py::test_a_latent_of_other_channels",
        "latents of 3, 4, 16, 64 or 128 channels where it has others: a sentence, before the "
        "network is asked",
    ),
    Law(
        "family",
        "test_transformer_bad_input.py::test_a_reference_of_another_family",
        "another transformer's reference and a UNet's: a sentence, before the network is asked",
    ),
    Law(
        "negative",
        "test_transformer_bad_input.py::test_a_negative_half_that_nobody_read",
        "both halves of a reference that holds one: a sentence, before the network is asked",
    ),
    Law(
        "masks",
        "test_transformer_bad_input.py::test_masks_that_are_too_many_or_black",
        "too many masks, and a black one: a sentence, before the network is asked",
    ),
)
TABLES = {
    "The network": NETWORK,
    "A reference from one photo": REFERENCE,
    "A reference in every way, and what is refused": FURTHER,
    "A concept": CONCEPT,
    "A story": STORY,
}
LAWS = {law.name: law for laws in TABLES.values() for law in laws}
EXEMPT = (
    Exempt(
        frozenset({"SD3", "SD3.5", "AuraFlow", "PixArtSigma"}),
        frozenset({"turned", "stands"}),
        "positions are in the hidden states, not in the keys: a reference stands at its own",
    ),
    Exempt(
        frozenset({"HunyuanDiT", "ErnieImage"}),
        frozenset({"turned", "stands"}),
        "no turn of this network's leads its keys to another place: a reference stands at its own",
    ),
    Exempt(
        frozenset({"HunyuanDiT", "ErnieImage"}),
        frozenset(law.name for law in CONCEPT),
        "the picture's queries are heard with their positions, which are not taken off again: "
        "concepts are refused in words",
    ),
)
