"""What the key maps of all families share."""
