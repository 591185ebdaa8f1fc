"""Scores of pictures, one file each."""
