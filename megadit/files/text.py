"""Text that other people wrote: its encoding, its lines, and what in it is no character.

Two kinds of strings hold half a surrogate pair, which is no character and which no encoder takes. A name of a file that
is not UTF-8 (``caf\\xe9`` of Latin-1) comes from Python with one per byte; its bytes are what is hashed and opened. In
a text, such as the JSON escape ``"\\ud83d"`` of a caption that was cut in the middle of an emoji, it stands for
nothing, and U+FFFD takes its place.
"""

from __future__ import annotations

import codecs
import re

from megadit.errors import UserError
from megadit.files.file_kind import bytes_instead, text_instead

_MARK = "\ufeff"  # U+FEFF at the beginning: the byte order mark
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
REPLACED = "\ufffd"  # U+FFFD, which stands for what is no character
_SURROGATE = re.compile("[\ud800-\udfff]")


def decode(data: bytes) -> str:
    """A file's bytes as text: UTF-8, or UTF-16 and UTF-32 with their mark.

    Raises UnicodeDecodeError, also for a zero byte in UTF-8: no text has one, but UTF-16 without its mark does, and so
    does a file whose download did not end.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    text = data.decode(encoding)
    zero = data.find(0) if encoding.startswith("utf-8") else -1
    if zero >= 0:
        raise UnicodeDecodeError("utf-8", data, zero, zero + 1, "zero byte")
    return text


def decode_text(data: bytes, where: str, then: str = "") -> str:
    """``decode`` of a file that a person named; ``where`` is what messages call it (``--prompts: 'a.txt'``).

    ``then`` ends the sentence: what to do next where the file lies in another one.

    Raises:
        UserError: it is no text, naming line and byte, or a pointer or a web page in place of the one that was meant.
    """
    other = text_instead(data)
    if other is None:
        try:
            return decode(data)
        except UnicodeDecodeError as error:
            other = bytes_instead(data, "text", "json", "xml", "html")
            if other is None:
                raise UserError(f"{where} is not a text file ({_not_decoded(error)}); save it as UTF-8{then}") from None
    raise UserError(f"{where} is not a text file: {other}{then}")


def _not_decoded(error: UnicodeDecodeError) -> str:
    if error.encoding != "utf-8":
        return f"it begins as {error.encoding.upper()} and is none ({error.reason} at byte {error.start})"
    line = error.object.count(b"\n", 0, error.start) + 1
    if error.object[error.start] == 0:
        return f"line {line} has a zero byte, as UTF-16 without its mark has"
    return f"line {line} has the byte 0x{error.object[error.start]:02x}, which is not UTF-8"


def split_lines(text: str) -> list[str]:
    """The lines of a text, ended by \\n or \\r\\n alone; without a last line that is empty.

    ``str.splitlines`` ends lines at U+2028, U+0085 and form feeds too, which may stand inside a JSON text or a prompt.
    A byte order mark at the beginning of a line, where files with one were joined, is left out.
    """
    parts = text.split("\n")
    if not parts[-1]:
        parts.pop()
    return [part.removeprefix(_MARK).removesuffix("\r") for part in parts]


def has_lone_surrogate(text: str) -> bool:
    """Whether ``text`` holds half a surrogate pair."""
    return _SURROGATE.search(text) is not None


def replace_surrogates(text: str) -> str:
    """``text`` with U+FFFD in the place of each half of a surrogate pair."""
    return _SURROGATE.sub(REPLACED, text)


def plain_label(text: str) -> str:
    """``text`` as matplotlib draws it letter by letter: whole, and no formula between dollar signs."""
    return replace_surrogates(text).replace("$", r"\$")


def name_bytes(name: str) -> bytes:
    """The bytes of a file's name as Python holds it, on every machine alike; any other string has bytes, too."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # of no file: half a pair that stands for no byte
        return name.encode("utf-8", "surrogatepass")


def json_bytes(text: str) -> bytes:
    """JSON text, written with ``ensure_ascii=False``, as UTF-8: halves of surrogate pairs as ``\\udce9``, which every
    reader of JSON takes.
    """
    return text.encode("utf-8", "backslashreplace")
