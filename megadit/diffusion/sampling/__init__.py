"""Sampling: the loop over a scheduler, the choice of conditions, and grids of the images."""
