"""The training engine: DeepSpeed, the optimizer wrapper, clipping, the schedule and averages of weights."""
