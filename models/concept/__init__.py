"""The concept encoder of paper A, and its training."""
