"""Workers and their pool, one trial as an ordinary training run, and its scores."""
