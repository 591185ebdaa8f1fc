"""Text: encoders of captions and prompts, and tables of their features."""

from megadit.data.text.encoder import TextEncoder, check_lengths
from megadit.data.text.encoders import build_encoder

__all__ = ["TextEncoder", "build_encoder", "check_lengths"]
