"""The fixture of all tables of bad input."""

from helpers.bad_input import refused

__all__ = ["refused"]
