"""Who runs trials: workers and their pool, one trial as an ordinary run, and its scores."""
