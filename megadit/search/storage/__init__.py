"""Storage of trials in optuna's databases, and its locks and heartbeats for several workers at once."""
