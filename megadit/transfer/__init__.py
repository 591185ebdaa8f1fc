"""Whether base hyperparameters transfer: Algorithms 1 to 3 of arXiv 2505.15270, with numbers, on studies and tables."""
