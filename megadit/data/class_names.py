"""Which class a text names: exactly, or but for what a keyboard or a file system may have changed in it."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Callable, Sequence

_SHOWN = 60  # characters of a text in a message


def _composed(text: str) -> str:
    """Without space around it, and with accents as one code point each: macOS splits them in names of files."""
    return unicodedata.normalize("NFC", text.strip())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", _composed(text).casefold())


# From the strictest on; a text names what it names in the first form in which it names any.
_FORMS: tuple[Callable[[str], str], ...] = (str, str.strip, _composed, _folded)


class ClassNames:
    """The names of classes, by label. Two classes may have one name, or names that differ in case alone."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._labels: list[dict[str, list[int]]] = []
        for form in _FORMS:
            found: dict[str, list[int]] = {}
            for label, name in enumerate(self.names):
                found.setdefault(form(name), []).append(label)
            self._labels.append(found)

    def exact(self, text: str) -> list[int]:
        """Labels of the classes called so, letter for letter; else but for space around the name."""
        return self._labels[0].get(text) or self._labels[1].get(text.strip(), [])

    def same_letters(self, text: str) -> list[int]:
        """As ``exact``; else of those whose letters are other code points (``é`` as one, or as two)."""
        return self.exact(text) or self._labels[2].get(_composed(text), [])

    def any_case(self, text: str) -> list[int]:
        """As ``same_letters``; else of those called so in another case. Several labels: the text is ambiguous."""
        return self.same_letters(text) or self._labels[3].get(_folded(text), [])

    def nearest(self, text: str, cutoff: float = 0.6) -> str | None:
        """The name most like a text that names none."""
        folded = list(self._labels[3])
        near = difflib.get_close_matches(_folded(text[:1000]), folded, n=1, cutoff=cutoff)
        return self.names[self._labels[3][near[0]][0]] if near else None

    def listed(self, labels: Sequence[int]) -> str:
        """ "Cat (label 0) and cat (label 3)"."""
        some = [f"{quoted(self.names[label])} (label {label})" for label in labels[:4]]
        return " and ".join(some) if len(labels) < 4 else ", ".join(some) + (", …" if len(labels) > 4 else "")


def quoted(text: str) -> str:
    """A name for a message: as it is, or quoted where it has commas, letters that are not seen, or space around it."""
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    plain = text and text == text.strip() and text.isprintable() and not set(text) & set(",\"'")
    return text if plain else json.dumps(text, ensure_ascii=not text.isprintable())
