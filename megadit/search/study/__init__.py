"""The study file, its search space, the cells and seeds of every point, and the order of the runs."""
