"""What lies on disk, before anyone knows what it means: paths, text, JSON, YAML, kinds of files, owners."""
