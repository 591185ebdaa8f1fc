"""Two runs, or two sets of seeds, side by side: curves on shared grids, their gap and the speed-up."""
