"""From the members of a tar to samples: grouped by key, with label and base name. Nothing is guessed.

WebDataset streams: what it takes for a sample are neighbouring members of one key. Tars are read here as it reads them,
and refused where it would refuse them or give halves of samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from megadit.data.labels import label_of
from megadit.data.shards.headers import Member, TarHeaders
from megadit.data.shards.members import read_json
from megadit.data.shards.shard_files import (
    CAPTION,
    IMAGES,
    JSON,
    KNOWN,
    LABEL,
    PICKLED,
    ShardFile,
    shown_name,
    split_member,
)
from megadit.errors import UserError
from megadit.files.json_fields import shown

_EXAMPLES = 3  # names that a sentence gives of each kind
_READ = ", ".join((*IMAGES, JSON, LABEL, CAPTION))
# Why members are left out, after their number.
_REASONS = {
    "extension": f"whose extension, all after the first dot of the name, is none of {_READ}",
    "bare": "without an extension",
    "hidden": "whose name begins with . or __",
    "special": "which are links or devices",
}


@dataclass
class Survey:
    """What a scan has seen besides samples. A cached index keeps it, so that every start tells it.

    members: files of the tars, folders aside.  skipped: how many were left out, and the first of them, by reason.

    empty: tars without a sample.  zeros: bytes of zeros behind the last member, where tar writes no such number.
    bad_label: the sentence about the first label that is none; it matters to runs that read labels.
    """

    members: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    zeros: dict[str, int] = field(default_factory=dict)
    bad_label: str = ""

    def skip(self, reason: str, name: str, tar: str) -> None:
        """Count a member that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{shown_name(name)} in {tar}")

    def add(self, other: Survey) -> None:
        """Take in what was seen of a further tar."""
        self.members += other.members
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            own = self.examples.setdefault(reason, [])
            own.extend(other.examples[reason][: _EXAMPLES - len(own)])
        self.empty += other.empty
        self.zeros |= other.zeros
        self.note_label(other.bad_label)

    def note_label(self, sentence: str) -> None:
        """Keep the first sentence about a label."""
        self.bad_label = self.bad_label or sentence

    def skipped_words(self) -> str:
        """What was left out, by reason and with examples."""
        return "; ".join(
            f"{self.skipped[reason]:,} {words} ({', '.join(self.examples[reason])}"
            f"{', …' if self.skipped[reason] > len(self.examples[reason]) else ''})"
            for reason, words in _REASONS.items()
            if reason in self.skipped
        )

    def remarks(self) -> tuple[str, ...]:
        """A sentence for each thing that people should know of."""
        found = []
        if count := sum(self.skipped.values()):
            found.append(f"{count:,} of {self.members:,} members of the tars are not read: {self.skipped_words()}")
        if self.empty:
            more = f" and {len(self.empty) - 1:,} other tars have" if len(self.empty) > 1 else " has"
            found.append(f"{self.empty[0]}{more} no samples")
        if self.zeros:
            tar, size = next(iter(self.zeros.items()))
            more = f" (and so in {len(self.zeros) - 1:,} other tars)" if len(self.zeros) > 1 else ""
            found.append(
                f"{tar} ends with {size:,} zero bytes behind its last member, which is not how tar pads{more}: "
                "preallocated files have them, and copies that were cut off; compare it with its source"
            )
        return tuple(found)

    def to_json(self) -> str:
        """For the file of an index."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> Survey:
        """What ``to_json`` wrote. Raises ValueError, KeyError or TypeError if it is damaged."""
        values = json.loads(text)
        found = cls(**{entry.name: values[entry.name] for entry in fields(cls)})
        found.remarks()
        return found


_MOST_TEXT = 2**24  # bytes of a json, cls or txt member
_TEXTS = (JSON, LABEL, CAPTION)
_MOST_LABEL = 2**63 - 1
_WHOLE = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_NO_NAME = re.compile(r"[\d\s.,;:()\[\]+-]*", re.ASCII)  # digits and signs alone: a fraction, or several numbers
_SORT = "unpack it and write it again with tar --sort=name"


@dataclass(frozen=True)
class Entry:
    """One sample of a tar. places: extension -> (offset, size).  label: number or name; None without.

    base: what the train/validation split goes by.
    """

    key: str
    base: str
    label: int | str | None
    places: dict[str, tuple[int, int]]


def scan(shard: ShardFile, survey: Survey | None = None) -> list[Entry]:
    """The samples of a tar, from one pass over its headers, its labels and its JSON members.

    What else there is to tell is added to ``survey``. A label that is none is told there, and the sample has none.

    Raises UserError where the tar is damaged, torn or not sorted, has two members or samples of one name, or holds
    what would have to be unpickled.
    """
    own = Survey()
    entries = [_entry(shard, group, own) for group in _groups(shard, own)]
    if not entries and own.skipped:
        raise _all_skipped(shard, own)
    if not entries:
        own.empty.append(shard.name)
    if survey is not None:
        survey.add(own)
    return entries


def _all_skipped(shard: ShardFile, survey: Survey) -> UserError:
    remedy = "give tars of images, and take this one out"
    if dotted := survey.examples.get("extension"):
        name = PurePosixPath(dotted[0].removesuffix(f" in {shard.name}")).name
        if name.count(".") > 1:
            better = name.replace(".", "_", name.count(".") - 1)
            remedy = f"rename members so that one dot is left, before the extension ({better}), and write the tar again"
    return UserError(
        f"data.path: none of the {survey.members:,} members of {shard.path} can be read: {survey.skipped_words()}; "
        f"{remedy}"
    )


@dataclass
class _Group:
    """Neighbouring members of one key. names: of all its members, by extension."""

    key: str
    names: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def _groups(shard: ShardFile, survey: Survey) -> Iterator[_Group]:
    """The samples; members that belong to none are counted in ``survey``."""
    group: _Group | None = None
    seen: dict[str, dict[str, tuple[int, int]]] = {}
    headers = TarHeaders(shard)
    for member in headers:
        survey.members += 1
        key, extension = split_member(member.name)
        reason = _no_part(member, extension)
        if reason is not None:
            survey.skip(reason, member.name, shard.name)
            continue
        _check(shard, member, extension)
        if group is None or key != group.key:
            if group is not None and group.places:
                seen[group.key] = group.places
                yield group
            group = _Group(key)
        if extension in KNOWN and key in seen:
            raise _apart(shard, member, extension, seen[key])
        _add(shard, group, member, extension)
        if extension not in KNOWN:
            survey.skip("extension", member.name, shard.name)
    if group is not None and group.places:
        yield group
    if headers.zeros:
        survey.zeros[shard.name] = headers.zeros


def _no_part(member: Member, extension: str) -> str | None:
    """Why a member is part of no sample; None if it is."""
    if member.name.rpartition("/")[2].startswith((".", "__")):
        return "hidden"
    if not extension:
        return "bare"
    return "special" if member.link and extension not in KNOWN else None


def _check(shard: ShardFile, member: Member, extension: str) -> None:
    """Raise UserError for a member that no sample may have."""
    if extension.rpartition(".")[2] in PICKLED:
        raise UserError(
            f"data.path: {shard.path} holds {shown_name(member.name)}, which would have to be unpickled and could run "
            "anything; write arrays as .npy instead, and take it out"
        )
    if member.link:
        raise UserError(
            f"data.path: {shown_name(member.name)} in {shard.path} is {member.link}, not a file of its own; write the "
            "tar again with tar --dereference --hard-dereference"
        )
    if extension in _TEXTS and member.size > _MOST_TEXT:
        raise UserError(
            f"data.path: {shown_name(member.name)} in {shard.path} has {member.size:,} bytes, more than a text about "
            "one image; take it out"
        )


def _add(shard: ShardFile, group: _Group, member: Member, extension: str) -> None:
    """Take a member into its sample. Raises UserError where its place is taken."""
    first = group.names.get(extension)
    if first is None and extension in IMAGES:
        first = next((name for kind, name in group.names.items() if kind in IMAGES), None)
    if first is not None:
        raise _place_taken(shard, group.key, first, member.name, extension)
    group.names[extension] = member.name
    if extension in KNOWN:
        group.places[extension] = (member.offset, member.size)


def _place_taken(shard: ShardFile, key: str, first: str, second: str, extension: str) -> UserError:
    names = f"{shown_name(first)} and {shown_name(second)}"
    remedy = "write the tar again with one of them, or give each a key of its own"
    if first == second:
        what = f"{shown_name(first)} twice"
    elif split_member(first)[1] == extension:
        what = f"two members of one extension, {names}"
    else:
        what = f"two images, {names}"
        other = f"{PurePosixPath(key).name}.mask.{extension}"
        remedy = f"write the tar again with one of them, or name the other as {shown_name(other)}, which is not read"
    return UserError(f"data.path: the sample {shown_name(key)} in {shard.path} has {what}; {remedy}")


def _apart(shard: ShardFile, member: Member, extension: str, earlier: dict[str, tuple[int, int]]) -> UserError:
    """The sentence for a key that comes again."""
    name, (key, _) = shown_name(member.name), split_member(member.name)
    other = extension if extension in earlier else min(earlier, key=lambda kind: earlier[kind][0])
    first = f"{shown_name(key)}.{other} at byte {earlier[other][0]}"
    if extension in earlier:
        return UserError(
            f"data.path: {shard.path} has two samples with the key {shown_name(key)}: {first}, and {name} at byte "
            f"{member.offset}; give each sample a key of its own, or take one out"
        )
    return UserError(
        f"data.path: {shard.path} is not sorted: {name} at byte {member.offset} lies apart from {first}, with other "
        f"samples between them; {_SORT}"
    )


def _entry(shard: ShardFile, group: _Group, survey: Survey) -> Entry:
    def where(member: str) -> str:
        return f"{shown_name(group.key)}.{member} in {shard.path}"

    facts: dict[str, Any] = {}
    if JSON in group.places:
        facts = read_json(shard.read(*group.places[JSON]), where(JSON))
    base = _base(facts, group.key, where(JSON))
    written = shard.read(*group.places[LABEL]) if LABEL in group.places else None
    other, label = facts.get("label"), None
    try:
        if written is not None:
            label = _within(_label(written, where(LABEL)), where(LABEL))
        elif "label" in facts:
            label = _within(label_of(other, where(JSON)), where(JSON))
        both = written is not None and isinstance(label, int) and isinstance(other, int)
        if both and not isinstance(other, bool) and label != other:
            survey.note_label(
                f"data.path: the label is {label} in {where(LABEL)} and {shown_name(str(other))} in its json; correct "
                "one of them"
            )
    except UserError as error:
        survey.note_label(str(error))
    return Entry(group.key, base, label, group.places)


def _base(facts: dict[str, Any], key: str, where: str) -> str:
    base = facts.get("base")
    if base is None:
        return key
    if isinstance(base, bool) or not isinstance(base, int | str) or not _keeps(str(base)):
        raise UserError(
            f"data.path: {where} has base {shown_name(shown(base))}, by which images are held out for "
            "validation; give a text, or leave it out"
        )
    return str(base)


def _label(data: bytes, where: str) -> int | str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"data.path: {where} is not UTF-8 text ({error.reason}); write the label as UTF-8") from None
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NO_NAME.fullmatch(text):
        told = f"is {shown_name(shown(text))}" if text else "is empty"
        raise UserError(f"data.path: {where} {told}; a label is one whole number from 0, or a name")
    return text


def _within(label: int | str, where: str) -> int | str:
    """A label that an index can hold. Raises UserError for any other."""
    if isinstance(label, str) and not _keeps(label):
        raise UserError(f"data.path: {where}: the label '{shown_name(label)}' is no text; correct it")
    if isinstance(label, int) and not 0 <= label <= _MOST_LABEL:
        told = "number classes from 0" if label < 0 else "it is beyond 64 bits; correct it"
        raise UserError(f"data.path: {where} has the label {shown_name(str(label))}; {told}")
    return label


def _keeps(text: str) -> bool:
    """Whether a text comes back from a file of an index as it is: names of files do, halves of characters do not."""
    try:
        return "\0" not in text and text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeError:
        return False
