"""The mathematics of the pack: tensors in, tensors out, nothing of the host."""
