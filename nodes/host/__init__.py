"""The one door to the host: its model, its sampler run and its attention, translated once into
Kindred's types.

A node's configuration is a frozen `Injection` on a clone of the MODEL. When a sampler starts, one
wrapper turns the injections it finds into a `Run`; the run lives in the sampler's own copy of the
options and dies with it.
"""

from .concepts import (
    CONCEPTS,
    ManagedEncoder,
    concept_files,
    concept_folder,
    concept_path,
    continued_encoder,
    new_encoder,
    register_folders,
)
from .decoupled import DecoupledInjection, DecoupledReading, concept_layers, place_of
from .foresight import LEAPING
from .frozen import FrozenUNet, frozen
from .identity import model_key, require_reference, require_same_model
from .install import install
from .judging import picture_embeddings, text_embeddings, tower_title
from .latents import cell, latent_in, latent_out, to_model_scale
from .learning import (
    SIDES,
    Interrupted,
    encoded,
    examples_of,
    progress,
    text_layers,
    training,
)
from .measured import (
    chosen_blocks,
    keep_measurement,
    measurements_stamp,
)
from .model import (
    KEY,
    REPEATS,
    SAMPLER,
    SUBJECT,
    TEXT,
    Conditioning,
    Encoder,
    Inversion,
    Reference,
    attention_sites,
    chosen_sigmas,
    computes_in,
    cross_layers,
    draws_by_unet,
    noise_of,
    pins_memory,
    samplers,
    schedulers,
    self_attentions,
    token_sizes,
)
from .page import note, show_warnings, tell, warn
from .photos import (
    example_name,
    input_pictures,
    is_painted,
    load_picture,
    offer_example,
    picture_exists,
    picture_fingerprint,
)
from .pictures import cell_of, decode, pictures_in, rough_pictures, rough_pictures_of
from .probing import plan_of, probe
from .ref_unet import (
    first_rows,
    read_prompt,
    reference_pass,
    reference_tokens,
)
from .references import (
    REFERENCES,
    is_listed,
    nameable,
    new_reference_path,
    reference_files,
    reference_path,
    register_references,
)
from .run import Injection, SamplerRun
from .sight import pooling_head, require_sight, tower_of, vision_files
from .sites import require_invertible, require_plain_positions, require_sites
from .story import StoryInjection, layout_of
from .tokens import Prompt, Reader, hides_padding, plain, readers_of, rows_of_tokens
from .vocabulary import unlearnt_words
from .wires import mismatch
from .wrappers import inject, injected, sample

__all__ = [
    "CONCEPTS",
    "Conditioning",
    "DecoupledInjection",
    "DecoupledReading",
    "Encoder",
    "FrozenUNet",
    "Injection",
    "Interrupted",
    "Inversion",
    "KEY",
    "LEAPING",
    "ManagedEncoder",
    "Prompt",
    "REFERENCES",
    "REPEATS",
    "Reader",
    "Reference",
    "SAMPLER",
    "SIDES",
    "SUBJECT",
    "SamplerRun",
    "StoryInjection",
    "TEXT",
    "attention_sites",
    "cell",
    "cell_of",
    "chosen_blocks",
    "chosen_sigmas",
    "computes_in",
    "concept_files",
    "concept_folder",
    "concept_layers",
    "concept_path",
    "continued_encoder",
    "cross_layers",
    "decode",
    "draws_by_unet",
    "encoded",
    "example_name",
    "examples_of",
    "first_rows",
    "frozen",
    "hides_padding",
    "inject",
    "injected",
    "input_pictures",
    "install",
    "is_listed",
    "is_painted",
    "keep_measurement",
    "latent_in",
    "latent_out",
    "layout_of",
    "load_picture",
    "measurements_stamp",
    "mismatch",
    "model_key",
    "nameable",
    "new_encoder",
    "new_reference_path",
    "noise_of",
    "note",
    "offer_example",
    "picture_embeddings",
    "picture_exists",
    "picture_fingerprint",
    "pins_memory",
    "pictures_in",
    "place_of",
    "plain",
    "plan_of",
    "pooling_head",
    "probe",
    "progress",
    "read_prompt",
    "readers_of",
    "reference_files",
    "reference_pass",
    "reference_path",
    "reference_tokens",
    "register_folders",
    "register_references",
    "require_invertible",
    "require_plain_positions",
    "require_reference",
    "require_same_model",
    "require_sight",
    "require_sites",
    "rough_pictures",
    "rough_pictures_of",
    "rows_of_tokens",
    "sample",
    "samplers",
    "schedulers",
    "self_attentions",
    "show_warnings",
    "tell",
    "text_embeddings",
    "text_layers",
    "to_model_scale",
    "token_sizes",
    "tower_of",
    "tower_title",
    "training",
    "unlearnt_words",
    "vision_files",
    "warn",
]
