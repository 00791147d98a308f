"""The one door to the host: its model, its sampler run and its attention, translated once into Kindred's types.

A node's configuration is a frozen `Injection` on a clone of the MODEL. When a sampler starts, one wrapper turns the
injections it finds into a `Run`; the run lives in the sampler's own copy of the options and dies with it.
"""
from .concepts import CONCEPTS, ManagedEncoder, concept_files, concept_folder, concept_path, register_folders
from .learning import SIDES, FrozenUNet, Interrupted, progress, training
from .model import (
    KEY, SCHEDULERS, SUBJECT, TEXT, Conditioning, Encoder, Inversion, Reference, attention_sites, chosen_sigmas, cross_layers,
    latent_in, latent_out, model_key, offer_example, percent_to_sigma, require_unet,
)
from .ref_unet import Loop, read_prompt, reference_pass, reference_tokens
from .run import Injection, SamplerRun, inject, install

__all__ = [
    "CONCEPTS", "Conditioning", "Encoder", "FrozenUNet", "Injection", "Interrupted", "Inversion", "KEY", "Loop", "ManagedEncoder",
    "Reference", "SCHEDULERS", "SIDES", "SUBJECT", "SamplerRun", "TEXT", "attention_sites", "chosen_sigmas", "concept_files",
    "concept_folder", "concept_path", "cross_layers", "inject", "install", "latent_in", "latent_out", "model_key", "offer_example",
    "percent_to_sigma", "progress", "read_prompt", "reference_pass", "reference_tokens", "register_folders", "require_unet", "training",
]
