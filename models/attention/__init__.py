"""What the attention of both papers reads, and how."""
