"""Training: the DeepSpeed engine, the muP optimizer wrapper, checkpoints, the loop and its callbacks."""
