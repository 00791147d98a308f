"""Prompts and laws of tools/workshop/soak.py."""
