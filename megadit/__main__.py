"""``python -m megadit COMMAND``; see ``megadit.cli``."""

from megadit.cli.main import main

main()
