"""Prompts and laws of tools/soak.py."""
