"""Labels and class names of user data: checks of labels, and the classes that a text names.

The largest number says how many classes there are, so that one wrong number would make billions of names. It is held
against ``model.num_classes`` or, where no model is known, against the number of labels.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from megadit.errors import UserError
from megadit.files.text import has_lone_surrogate

# A part of a large set, such as eight images of ImageNet-21k, names classes that it has no image of.
_PLAUSIBLE = 100_000
_MOST = 10_000_000  # names in memory, whatever a model asks for

Where = Callable[[int], str]


def label_of(value: Any, where: str) -> int | str:
    """``value`` of a JSON file as a label. Raises UserError that names ``where``, such as "line 3 of FILE", if it is
    none: true, null, a fraction, a list, a text of white space, or with half a surrogate pair or a NUL.
    """
    if isinstance(value, str) and value.strip():
        if has_lone_surrogate(value):  # two such names could not be told apart
            raise UserError(f"data.path: {where}: the label {_shown(value)} holds half a surrogate pair; correct it")
        if "\0" in value:  # which ends a name in the index of tars
            raise UserError(f"data.path: {where}: the label {_shown(value)} holds a NUL and is no text; mend it")
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    whole = isinstance(value, float) and value.is_integer()
    remedy = f"write {value:.0f}" if whole and abs(value) < 2**53 else "give a text, or a number from 0"
    raise UserError(f"data.path: {where}: label must be a name or a whole number, not {_shown(value)}; {remedy}")


def number_labels(
    labels: Sequence[int | str], where: Where, num_classes: int | None = None
) -> tuple[tuple[str, ...], list[int]]:
    """(classes, a number per label): names are numbered in sorted order; numbers are kept, so classes are 0...max.

    ``where(i)`` names the source of label i in messages. Raises UserError as ``class_names_of_numbers`` does, and where
    some labels are names and some are numbers.
    """
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        return class_names_of_numbers(numbers, where, num_classes), numbers
    if numbers:
        name = next(i for i, label in enumerate(labels) if isinstance(label, str))
        number = next(i for i, label in enumerate(labels) if isinstance(label, int))
        raise UserError(
            f"data.path: {where(name)} has the name {_shown(labels[name])} as label, and {where(number)} the number "
            f"{_shown(labels[number])}; use one of the two"
        )
    classes = tuple(sorted({str(label) for label in labels}))
    numbered = {name: number for number, name in enumerate(classes)}
    return classes, [numbered[str(label)] for label in labels]


def class_names_of_numbers(numbers: Sequence[int], where: Where, num_classes: int | None = None) -> tuple[str, ...]:
    """The names "0", "1", ... of classes that are numbered, up to the largest number; none without numbers.

    ``where(i)`` names the source of number i in messages, such as "line 3 of FILE". ``num_classes``: the model's; None:
    not known, and the largest may be as large as 100,000 or the number of labels allow.

    Raises UserError, naming the source, for a number below 0 or beyond what is plausible.
    """
    if not numbers:
        return ()
    lowest, highest = min(numbers), max(numbers)
    if lowest < 0:
        raise UserError(
            f"data.path: {where(numbers.index(lowest))} has the label {_shown(lowest)}; number classes from 0"
        )
    plausible = min(max(len(numbers), _PLAUSIBLE), _MOST)
    allowed = plausible if num_classes is None else min(num_classes, _MOST)
    if highest < allowed:
        return tuple(map(str, range(highest + 1)))
    source = where(numbers.index(highest))
    if num_classes is not None and highest >= num_classes:
        more = f", or set model.num_classes={highest + 1}" if highest < plausible else ""
        raise UserError(
            f"data.path: {source} has the label {_shown(highest)}, but model.num_classes is {num_classes}; correct the "
            f"label{more}"
        )
    raise UserError(
        f"data.path: {source} has the label {_shown(highest)}, which would make more than {allowed} classes of "
        f"{len(numbers)} labels; correct the label, or write names in place of numbers"
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 10**24:
        return "a number of more than 64 bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
            labels = defaultdict(list)
            for label, name in enumerate(self.names):
                labels[form(name)].append(label)
            self._labels.append(dict(labels))

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
