"""The commands: one file each, with parser() and main(argv)."""
