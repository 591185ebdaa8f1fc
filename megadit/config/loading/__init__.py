"""From files and overrides to a checked configuration."""
