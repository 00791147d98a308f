"""What a pass over a picture of the subject leaves, in memory and in a file."""
