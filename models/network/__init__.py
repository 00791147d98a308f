"""What a network is to the methods."""
