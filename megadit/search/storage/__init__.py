"""Where trials are kept: optuna's storage, and what several workers may do with it at once."""
