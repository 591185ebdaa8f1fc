"""What a scan of tars has seen besides samples: members left out, tars without samples, zeros, labels of no use.

A cached index keeps it, so that every start tells it and not only the one that scanned.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields

from megadit.data.shards.handles import shown_name
from megadit.data.shards.layout import CAPTION, IMAGES, JSON, LABEL

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
    """members: files of the tars, folders aside.  skipped: how many were left out, and the first of them, by reason.

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
