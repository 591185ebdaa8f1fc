"""Class names of a run directory, and the classes of a ``--classes`` option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megadit.data.labels import ClassNames, quoted
from megadit.errors import UserError, say
from megadit.files.json_text import JsonError, parse_json

CLASSES_FILE, NOTICE_FILE = "classes.json", "DATA-NOTICE.txt"
_NUMBER = re.compile(r"-?[0-9]+")  # int() also takes +3, 1_000 and digits of other scripts
_MOST_DIGITS = 18


def read_classes(run_dir: Path) -> list[str]:
    """Class names by label from the run's JSON list; empty where it has none. Raises UserError for another content."""
    path = run_dir / CLASSES_FILE
    if not path.is_file():
        return []
    try:
        names = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as class names ({reason}); remove it to use numbers") from None
    if not isinstance(names, list):
        raise UserError(f"{path}: is not a list of class names; remove it to use numbers")
    wrong = next((label for label, name in enumerate(names) if not isinstance(name, str)), None)
    if wrong is not None:
        raise UserError(
            f"{path}: is not a list of class names: that of label {wrong} is {quoted(str(names[wrong]))} and not a "
            "text; write it in quotes, or remove the file to use numbers"
        )
    return names


def check_count(run_dir: Path, names: Sequence[str], count: int) -> None:
    """Raise UserError where there are more ``names``, of ``read_classes``, than classes of the model."""
    if len(names) > count:
        raise UserError(
            f"{run_dir / CLASSES_FILE}: has {len(names)} names, but the model has {count} classes, so that they "
            "are not its names; give the run its own file, or remove it to use numbers"
        )


def chosen_classes(
    run_dir: Path, choice: str | Sequence[str] | None, count: int, *, notes: bool = True
) -> tuple[list[str], list[int] | None]:
    """The run's class names, and the labels of ``choice`` by ``resolve_classes``. Needs no torch.

    notes: print a note to stderr where some classes have no name. Raises UserError as ``read_classes``, ``check_count``
    and ``resolve_classes`` do.
    """
    names = read_classes(run_dir)
    check_count(run_dir, names, count)
    if notes and 0 < len(names) < count:
        say(f"note: {run_dir / CLASSES_FILE} has {len(names)} names for {count} classes; the others go by their labels")
    return names, resolve_classes(choice, names, count)


def read_notice(run_dir: Path) -> str:
    """Attribution of the training data; empty where there is none."""
    path = run_dir / NOTICE_FILE
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def resolve_classes(choice: str | Sequence[str] | None, names: Sequence[str], count: int) -> list[int] | None:
    """Labels of a choice of classes; None where nothing is chosen.

    choice: one text, or those of a repeated option. Each is a class name, which may contain commas; else a JSON list,
    in which texts are names and numbers are labels; else names and labels separated by commas. The case of a name may
    differ where it is unambiguous. A number that is the name of one class and the label of another is refused outside
    of a JSON list.

    Raises UserError for a text that is no class or several, a label outside 0...count - 1, and an unconditional model
    (count 0).
    """
    if choice is None:
        return None
    texts = [choice] if isinstance(choice, str) else list(choice)
    if count == 0:
        shown = quoted(", ".join(texts))
        raise UserError(f"--classes: {shown} cannot be chosen, the model is unconditional; leave --classes out")
    parser = _ClassesParser(ClassNames(names), count)
    labels = [label for text in texts for label in parser.labels(text)]
    if not labels:
        raise UserError("--classes: is empty; give labels or names, or leave it out")
    return labels


class _ClassesParser:
    """Parses ``--classes`` against the class names and the number of classes."""

    def __init__(self, names: ClassNames, count: int) -> None:
        self.names, self.count = names, count

    def labels(self, text: str) -> Iterator[int]:
        """The classes of one ``--classes``, in its order."""
        if self.names.exact(text):
            yield self._one(text)
        elif text.lstrip().startswith("["):
            yield from self._json(text)
        elif "," in text:
            yield from self._list(text)
        elif text.strip():
            yield self._one(text)

    def _list(self, text: str) -> Iterator[int]:
        parts = text.split(",")
        as_one_name = self.names.any_case(text)
        if as_one_name and not all(self.names.any_case(part) for part in parts):
            yield self._named(text, as_one_name)
            return
        self._refuse_commas_in_names(parts)
        for part in parts:
            if part.strip():
                yield self._one(part)

    def _refuse_commas_in_names(self, parts: Sequence[str]) -> None:
        """Raise UserError where several parts joined are a class name: whether that is meant is not guessed."""
        most = max((name.count(",") for name in self.names.names), default=0)
        for start in range(len(parts)):
            for end in range(start + 2, min(start + most + 1, len(parts)) + 1):
                labels = self.names.any_case(",".join(parts[start:end]))
                if labels:
                    name = quoted(self.names.names[labels[0]])
                    raise UserError(
                        f"--classes: {name} is a class whose name has a comma; give each class as a --classes of its "
                        f"own, or all as a JSON list: --classes '[{name}, …]'"
                    )

    def _json(self, text: str) -> Iterator[int]:
        try:
            values = parse_json(text.strip())
        except JsonError as error:
            raise UserError(f"--classes: {quoted(text)} begins as a JSON list, but {error}") from None
        for value in values:
            if isinstance(value, str):
                yield self._named(value, self.names.any_case(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                yield self._labelled(str(value))
            else:
                raise UserError(
                    f"--classes: {quoted(str(value))} in the list is no class; write names in double quotes, and "
                    "labels as whole numbers"
                )

    def _one(self, text: str) -> int:
        """The class of a name or a label. Raises UserError where it could be either."""
        number = text.strip()
        named = self.names.any_case(text)
        if not _NUMBER.fullmatch(number):
            return self._named(text, named)
        if not self._is_label(number) or named == [int(number)]:
            return self._named(text, named) if named else self._labelled(number)
        label = int(number)
        called = self.names.names[label] if label < len(self.names.names) else number
        both = f"""--classes '["{number}"]' for the name"""
        if named:
            raise UserError(
                f"--classes: {number} is the name of label {named[0]}, and a label itself, called {quoted(called)}; "
                f"write {both}, or --classes '[{label}]' for the label"
            )
        if _NUMBER.fullmatch(called) and int(called) != label:
            raise UserError(
                f"--classes: {number} is a label, called {quoted(called)}, and the name of no class, where names are "
                f"numbers; write --classes '[{label}]' for the label"
            )
        return label

    def _is_label(self, number: str) -> bool:
        return len(number) <= _MOST_DIGITS and 0 <= int(number) < self.count

    def _labelled(self, number: str) -> int:
        if not self._is_label(number):
            shown = quoted(number)
            raise UserError(f"--classes: {shown} is not a label of this model; labels are 0 to {self.count - 1}")
        return int(number)

    def _named(self, text: str, labels: Sequence[int]) -> int:
        """The one class of ``labels``, which ``text`` names."""
        if len(labels) == 1:
            return self._labelled(str(labels[0]))
        if labels:
            raise UserError(
                f"--classes: {quoted(text.strip())} names {len(labels)} classes, {self.names.listed(labels)}; write "
                f"the name letter for letter, or the label: --classes '[{labels[0]}]'"
            )
        near = self.names.nearest(text)
        hint = f"did you mean {quoted(near)}?" if near is not None else f"known are {self._known()}"
        if text.strip().isdecimal():
            hint = "labels are written with the digits 0 to 9"
        raise UserError(f"--classes: {quoted(text.strip())} is not a class of this model; {hint}")

    def _known(self) -> str:
        names = self.names.names
        if not names:
            return f"the labels 0 to {self.count - 1}"
        return ", ".join(map(quoted, names[:20])) + (", …" if len(names) > 20 else "")
