"""What each block of a network does, measured on the user's own checkpoint."""
