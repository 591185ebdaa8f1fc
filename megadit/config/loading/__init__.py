"""From files and overrides to a checked configuration: sources, merge, loader, and messages of what is wrong."""
