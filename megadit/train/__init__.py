"""From a configuration to a finished run: what is checked first, the loop and its callbacks, resume, and the end."""
