"""Names and sizes of a set's files: what counts as a change, the first difference by name, records of bounded size."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megadit.data.listing import MISSING, Listing, first_difference, record, same_files, sizes_of


def listing(names, sizes=None, detail="", unit="image"):
    sizes = [100] * len(names) if sizes is None else sizes
    return Listing(unit, [name.encode() for name in names], sizes, np.zeros(len(names), dtype=np.int64), detail=detail)


def stored(names, *more, **options):
    return json.loads(json.dumps(record(listing(names, *more, **options))))


def told(before, after, **options):
    old, new = stored(before), listing(after, **options)
    assert not same_files(old, record(new))
    return first_difference(old, new)


NAMES = [f"cat/{number:04d}.png" for number in range(300)]


def test_the_same_files_are_the_same_record():
    assert same_files(stored(NAMES), record(listing(NAMES)))
    assert same_files(stored([]), record(listing([])))


def test_the_first_difference_is_named():
    assert told(NAMES, [*NAMES, "dog/1.png", "dog/2.png"]) == "dog/1.png is new"
    assert told([], NAMES) == "cat/0000.png is new"
    assert told(NAMES, NAMES[:250]) == "cat/0250.png is gone"
    assert told(NAMES, [*NAMES[:7], *NAMES[8:]]) == "cat/0007.png is gone"
    assert told(NAMES, [*NAMES[:7], "cat/0006b.png", *NAMES[7:]]) == "cat/0006b.png is new"
    assert told(NAMES, [*NAMES[:7], "cat/moved.png", *NAMES[8:]]) == "cat/0007.png is gone"
    assert told(NAMES, [*NAMES[:7], NAMES[8], NAMES[7], *NAMES[9:]]) == "cat/0008.png is in the place of cat/0007.png"
    sizes = [100] * 300
    sizes[42] = 1234
    assert told(NAMES, NAMES, sizes=sizes) == "cat/0042.png has 1,234 bytes and had 100 bytes"
    sizes[42] = MISSING
    assert told(NAMES, NAMES, sizes=sizes) == "cat/0042.png has no file and had 100 bytes"


def test_what_names_and_sizes_do_not_tell_is_a_difference_too():
    shards = ["a.tar", "b.tar"]
    old = stored(shards, detail="1", unit="shard")
    other = listing(shards, detail="2", unit="shard")
    assert not same_files(old, record(other))
    assert first_difference(old, other) == "what lies in the shards, whose names and sizes are the same"


def test_a_thousand_shards_are_known_by_name_and_millions_of_images_by_a_bounded_record():
    shards = [f"x-{number:06d}.tar" for number in range(1000)]
    changed = [100] * 1000
    changed[501] = 101
    assert told(shards, shards, sizes=changed) == "x-000501.tar has 101 bytes and had 100 bytes"
    names = [f"{number:07d}.png" for number in range(50_000)]
    old = record(listing(names))
    assert len(json.dumps(old)) < 100_000
    for index in (0, 1, 12_345, 49_998, 49_999):
        sizes = [100] * len(names)
        sizes[index] = 101
        new = listing(names, sizes)
        assert not same_files(old, record(new))
        words = first_difference(old, new)
        if "among" in words:
            bounds = [int(word.strip(",")[:7]) for word in words.split() if word.strip(",").endswith(".png")]
            after, last = bounds if len(bounds) == 2 else (-1, bounds[0])
            assert after < index <= last and last - after <= 50
        else:
            assert f"{index:07d}.png has 101 bytes" in words
    assert first_difference(old, listing([*names, "new.png"])) == "new.png is new"


@pytest.mark.parametrize("name", [b"caf\xc3\xa9.png", b"\xff\xfe.png", b"two words.png", b"new\nline.png"])
def test_any_name_that_a_file_system_takes(name):
    old = json.loads(json.dumps(record(Listing("image", [name], [1], np.zeros(1, dtype=np.int64)))))
    assert same_files(old, record(Listing("image", [name], [1], np.zeros(1, dtype=np.int64))))
    shown = first_difference(old, listing(["other.png"]))
    assert shown.encode("utf-8", "surrogateescape") == name + b" is gone"


def test_sizes_of_many_files_are_asked_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr("megadit.data.listing._PER_THREAD", 3)
    names = [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names[:19]):
        (tmp_path / name).write_bytes(b"x" * number)
    assert sizes_of(str(tmp_path), names) == [*range(19), MISSING]
