"""Text: encoders of captions and prompts, and tables of their features."""

from typing import TYPE_CHECKING

from megadit.lazy import exports

if TYPE_CHECKING:
    from megadit.data.text.encoder import TextEncoder, check_lengths
    from megadit.data.text.encoders import build_encoder
    from megadit.data.text.table import TextTable, build_table, cache_folder

__all__ = ["TextEncoder", "TextTable", "build_encoder", "build_table", "cache_folder", "check_lengths"]

__getattr__ = exports(
    __name__,
    {
        **dict.fromkeys(("TextEncoder", "check_lengths"), "encoder"),
        **dict.fromkeys(("TextTable", "build_table", "cache_folder"), "table"),
        "build_encoder": "encoders",
    },
)
