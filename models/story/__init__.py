"""ConsiStory: pictures of one batch that share a subject."""
