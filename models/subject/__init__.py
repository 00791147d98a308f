"""Where the subject is: its words, its masks, its matches."""
