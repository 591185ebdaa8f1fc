"""From a study to the target's configuration: what is carried over, on whose word, and what it cost."""
