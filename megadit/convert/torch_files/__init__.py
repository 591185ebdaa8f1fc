"""Torch files of other programs: read without running what they hold, and written tensor by tensor."""
