"""Text: encoders of captions and prompts, and tables of their features."""
