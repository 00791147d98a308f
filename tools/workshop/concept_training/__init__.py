"""The parts of train_concept_encoder.py."""
