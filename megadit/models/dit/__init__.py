"""DiT (Peebles and Xie, arXiv 2212.09748)."""
