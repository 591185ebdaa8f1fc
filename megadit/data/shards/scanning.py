"""From the members of a tar to samples: grouped by key, with label and base name. Nothing is guessed.

WebDataset streams tars: a sample is a sequence of neighbouring members with one key. Samples are the same here, and a
tar that WebDataset would refuse, or of which it would give halves of samples, is refused.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from megadit.data.labels import label_of
from megadit.data.shards.headers import Member, TarHeaders
from megadit.data.shards.members import read_json
from megadit.data.shards.naming import CAPTION, IMAGES, JSON, KNOWN, LABEL, PICKLED, shown_name, split_member
from megadit.data.shards.shard_files import ShardFile
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
class ScanSummary:
    """What a scan found besides samples. A cached index stores it, so that every start prints its remarks.

    members: number of members, without folders.  skipped: how many were left out, by reason.  examples: the first
    names of these.  empty: tars without samples.  zeros: zero bytes after the last member, by tar, where tar would not
    write so many.  bad_label: the message of the first label that cannot be used; runs that read labels raise it.
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

    def add(self, other: ScanSummary) -> None:
        """Add the summary of a further tar."""
        self.members += other.members
        for reason, count in other.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples.extend(other.examples[reason][: _EXAMPLES - len(examples)])
        self.empty += other.empty
        self.zeros |= other.zeros
        self.note_label(other.bad_label)

    def note_label(self, message: str) -> None:
        """Store the first message about a label."""
        self.bad_label = self.bad_label or message

    def skipped_text(self) -> str:
        """What was left out, by reason and with examples."""
        return "; ".join(
            f"{self.skipped[reason]:,} {words} ({', '.join(self.examples[reason])}"
            f"{', …' if self.skipped[reason] > len(self.examples[reason]) else ''})"
            for reason, words in _REASONS.items()
            if reason in self.skipped
        )

    def remarks(self) -> tuple[str, ...]:
        """A sentence each about members that are not read, empty tars and trailing zeros."""
        remarks = []
        if count := sum(self.skipped.values()):
            remarks.append(f"{count:,} of {self.members:,} members of the tars are not read: {self.skipped_text()}")
        if self.empty:
            more = f" and {len(self.empty) - 1:,} other tars have" if len(self.empty) > 1 else " has"
            remarks.append(f"{self.empty[0]}{more} no samples")
        if self.zeros:
            tar, size = next(iter(self.zeros.items()))
            more = f" (and so in {len(self.zeros) - 1:,} other tars)" if len(self.zeros) > 1 else ""
            remarks.append(
                f"{tar} ends with {size:,} zero bytes behind its last member, which is not how tar pads{more}: "
                "preallocated files have them, and copies that were cut off; compare it with its source"
            )
        return tuple(remarks)

    def to_json(self) -> str:
        """For the file of an index."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> ScanSummary:
        """What ``to_json`` wrote. Raises ValueError, KeyError or TypeError if it is damaged."""
        values = json.loads(text)
        summary = cls(**{part.name: values[part.name] for part in fields(cls)})
        summary.remarks()
        return summary


_MOST_TEXT = 2**24  # bytes of a json, cls or txt member
_TEXTS = (JSON, LABEL, CAPTION)
_MOST_LABEL = 2**63 - 1
_INTEGER = re.compile(r"[+-]?\d{1,19}", re.ASCII)
_NO_NAME = re.compile(r"[\d\s.,;:()\[\]+-]*", re.ASCII)  # digits and signs alone: a fraction, or several numbers
_SORT = "unpack it and write it again with tar --sort=name"

ByteRange = tuple[int, int]  # of the bytes of a member in its tar: offset, size


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar. spans: by extension.  label: number or name; None without.

    base: the base name, by which the train/validation split is made.
    """

    key: str
    base: str
    label: int | str | None
    spans: dict[str, ByteRange]


def scan(shard: ShardFile, summary: ScanSummary | None = None) -> list[TarSample]:
    """The samples of a tar, from one pass over its headers, its labels and its JSON members.

    What is left out is counted in ``summary``. A label that cannot be used is noted there, and its sample has none.

    Raises UserError where the tar is damaged, torn or not sorted, has two members or samples of one name, or holds
    what would have to be unpickled.
    """
    of_tar = ScanSummary()
    samples = [_sample(shard, key, spans, of_tar) for key, spans in _spans_by_key(shard, of_tar)]
    if not samples and of_tar.skipped:
        raise _all_skipped(shard, of_tar)
    if not samples:
        of_tar.empty.append(shard.name)
    if summary is not None:
        summary.add(of_tar)
    return samples


def _all_skipped(shard: ShardFile, summary: ScanSummary) -> UserError:
    remedy = "give tars of images, and take this one out"
    if dotted := summary.examples.get("extension"):
        name = PurePosixPath(dotted[0].removesuffix(f" in {shard.name}")).name
        if name.count(".") > 1:
            better = name.replace(".", "_", name.count(".") - 1)
            remedy = f"rename members so that one dot is left, before the extension ({better}), and write the tar again"
    return UserError(
        f"data.path: none of the {summary.members:,} members of {shard.path} can be read: {summary.skipped_text()}; "
        f"{remedy}"
    )


def _spans_by_key(shard: ShardFile, summary: ScanSummary) -> Iterator[tuple[str, dict[str, ByteRange]]]:
    """(key, spans by extension) of each sample; members that belong to none are counted in ``summary``."""
    earlier: dict[str, dict[str, ByteRange]] = {}
    for key, group in itertools.groupby(_members(shard, summary), key=lambda part: part[0]):
        names: dict[str, str] = {}
        spans: dict[str, ByteRange] = {}
        for _, extension, member in group:
            if extension in KNOWN and key in earlier:
                raise _not_sorted(shard, member, extension, earlier[key])
            _check_unique(shard, key, extension, member.name, names)
            names[extension] = member.name
            if extension in KNOWN:
                spans[extension] = (member.offset, member.size)
            else:
                summary.skip("extension", member.name, shard.name)
        if spans:
            earlier[key] = spans
            yield key, spans


def _members(shard: ShardFile, summary: ScanSummary) -> Iterator[tuple[str, str, Member]]:
    """(key, extension, member) of the members that may belong to a sample."""
    headers = TarHeaders(shard)
    for member in headers:
        summary.members += 1
        key, extension = split_member(member.name)
        reason = _skip_reason(member, extension)
        if reason is None:
            _check_member(shard, member, extension)
            yield key, extension, member
        else:
            summary.skip(reason, member.name, shard.name)
    if headers.zeros:
        summary.zeros[shard.name] = headers.zeros


def _skip_reason(member: Member, extension: str) -> str | None:
    """Why a member belongs to no sample; None if it does."""
    if member.name.rpartition("/")[2].startswith((".", "__")):
        return "hidden"
    if not extension:
        return "bare"
    return "special" if member.link and extension not in KNOWN else None


def _check_member(shard: ShardFile, member: Member, extension: str) -> None:
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


def _check_unique(shard: ShardFile, key: str, extension: str, name: str, names: dict[str, str]) -> None:
    """Raise UserError where the sample has a member of this extension, or another image, among ``names``."""
    first = names.get(extension)
    if first is None and extension in IMAGES:
        first = next((other for kind, other in names.items() if kind in IMAGES), None)
    if first is None:
        return
    both = f"{shown_name(first)} and {shown_name(name)}"
    remedy = "write the tar again with one of them, or give each a key of its own"
    if first == name:
        problem = f"{shown_name(first)} twice"
    elif split_member(first)[1] == extension:
        problem = f"two members of one extension, {both}"
    else:
        problem = f"two images, {both}"
        other = f"{PurePosixPath(key).name}.mask.{extension}"
        remedy = f"write the tar again with one of them, or name the other as {shown_name(other)}, which is not read"
    raise UserError(f"data.path: the sample {shown_name(key)} in {shard.path} has {problem}; {remedy}")


def _not_sorted(shard: ShardFile, member: Member, extension: str, earlier: dict[str, ByteRange]) -> UserError:
    """The error of a key that comes again after other samples."""
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


def _sample(shard: ShardFile, key: str, spans: dict[str, ByteRange], summary: ScanSummary) -> TarSample:
    in_json, in_label = (f"{shown_name(key)}.{member} in {shard.path}" for member in (JSON, LABEL))
    values = read_json(shard.read(*spans[JSON]), in_json) if JSON in spans else {}
    base = _base(values, key, in_json)
    written = shard.read(*spans[LABEL]) if LABEL in spans else None
    label, json_label = None, values.get("label")
    try:
        if written is not None:
            label = _storable(_label(written, in_label), in_label)
            both = isinstance(label, int) and isinstance(json_label, int) and not isinstance(json_label, bool)
            if both and label != json_label:
                summary.note_label(
                    f"data.path: the label is {label} in {in_label} and {shown_name(str(json_label))} in its json; "
                    "correct one of them"
                )
        elif "label" in values:
            label = _storable(label_of(json_label, in_json), in_json)
    except UserError as error:
        summary.note_label(str(error))
    return TarSample(key, base, label, spans)


def _base(values: dict[str, Any], key: str, where: str) -> str:
    base = values.get("base")
    if base is None:
        return key
    if isinstance(base, bool) or not isinstance(base, int | str) or not _survives_index(str(base)):
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
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NO_NAME.fullmatch(text):
        problem = f"is {shown_name(shown(text))}" if text else "is empty"
        raise UserError(f"data.path: {where} {problem}; a label is one whole number from 0, or a name")
    return text


def _storable(label: int | str, where: str) -> int | str:
    """A label that an index can hold. Raises UserError for any other."""
    if isinstance(label, str) and not _survives_index(label):
        raise UserError(f"data.path: {where}: the label '{shown_name(label)}' is no text; correct it")
    if isinstance(label, int) and not 0 <= label <= _MOST_LABEL:
        remedy = "number classes from 0" if label < 0 else "it is beyond 64 bits; correct it"
        raise UserError(f"data.path: {where} has the label {shown_name(str(label))}; {remedy}")
    return label


def _survives_index(text: str) -> bool:
    """Whether a text is the same after an index file: names of files are, lone surrogates of JSON are not."""
    try:
        return "\0" not in text and text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape") == text
    except UnicodeError:
        return False
