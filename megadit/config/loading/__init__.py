"""Loads configurations: sources reads files and overrides, layers merges them, loader validates, messages explains."""
