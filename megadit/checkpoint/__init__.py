"""Checkpoints: one logical format for every layout."""
