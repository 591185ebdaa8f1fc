"""What is searched: the study file, its space, the cells and seeds of every point, and the order of its runs."""
