"""How good pictures are: scores of sampled pictures, apart from training."""
