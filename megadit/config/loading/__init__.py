"""From files and overrides to a checked configuration: sources, layers, loader, and messages of what is wrong."""
