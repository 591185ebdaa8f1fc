"""Fuzzing readers: valid files are damaged in many ways, and a reader must succeed or raise UserError, in bounds.

``hunt`` runs one reader on files that hypothesis makes: a few dozen of them, always the same, in the quick tests;
thousands with a seed of the day in the slow ones. ``mutated`` damages bytes, ``odd_json`` the values of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megadit.errors import UserError

QUICK, LONG = "quick", "long"
EXAMPLES, SEED = "MEGADIT_FUZZ_EXAMPLES", "MEGADIT_FUZZ_SEED"  # of the long tests, from the environment
_QUICK_EXAMPLES, _LONG_EXAMPLES = 25, 4000
_LONG_S = 900  # of a long test altogether
MOST_S = 10.0  # of the CPU, for one file: a loaded machine changes nothing
MOST_BYTES = 256 * 2**20  # that one file may add to the memory of the process
_ADDRESSES = 8 * 2**30  # that a test may ask for, touched or not

# Each fuzz test runs twice: over few files in `make test`, over thousands where slow tests are asked for.
efforts = pytest.mark.parametrize(
    "effort", [QUICK, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(2 * _LONG_S)])]
)


class OverTime(BaseException):
    """Raised inside a reader that computes for too long; no ``except Exception`` swallows it."""


def hunt(
    effort: str,
    files: st.SearchStrategy[Any],
    read: Callable[[Any], object],
    known: Iterable[Any] = (),
    *,
    quick: int = _QUICK_EXAMPLES,
    long: int = _LONG_EXAMPLES,
) -> None:
    """``read`` on what is drawn from ``files``, after the ``known`` ones that failed once.

    ``read`` takes one drawn value, writes it where a file belongs and calls the reader. It fails for any exception but
    UserError, for more than ``MOST_S`` of CPU time and for more than ``MOST_BYTES`` of memory; the smallest failing
    value that hypothesis finds is in the report, and the seed of a long hunt.
    """

    def once(value: Any) -> None:
        only_user_error(read, value)

    with _bounded_addresses():
        for value in known:
            once(value)
        if effort == QUICK:
            _settings(quick, derandomize=True)(given(files)(once))()
            return
        number = int(os.environ.get(SEED) or random.SystemRandom().randrange(2**32))
        count = int(os.environ.get(EXAMPLES) or long)
        end = time.monotonic() + _LONG_S
        ran = 0

        def counted(value: Any) -> None:
            nonlocal ran
            if time.monotonic() < end:
                once(value)
                ran += 1

        try:
            seed(number)(_settings(count, derandomize=False)(given(files)(counted)))()
        except BaseException as error:
            error.add_note(f"{SEED}={number} repeats this hunt")
            raise
        print(f"fuzz: {ran} files, {SEED}={number}")


def _settings(count: int, *, derandomize: bool) -> settings:
    return settings(
        max_examples=count,
        derandomize=derandomize,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        print_blob=False,
        report_multiple_bugs=False,
    )


def only_user_error(read: Callable[..., object], *values: Any) -> None:
    """``read(*values)`` may return or raise UserError, in ``MOST_S`` of CPU time and ``MOST_BYTES`` of new memory."""
    before = _resident()
    with _limited_cpu():
        try:
            read(*values)
        except UserError as error:
            message = str(error)
            assert message.strip() and "Traceback" not in message, f"a refusal without a sentence: {message!r}"
            assert len(message) < 5000, f"a refusal of {len(message)} characters: {message[:200]}"
            odd = [letter for letter in message if letter != "\n" and not (letter.isprintable() or letter == " ")]
            assert not odd, f"{odd[:3]!r} would reach the terminal: {message[:200]!r}"
    grown = _peak() - before
    assert grown < MOST_BYTES, f"reading took {grown / 2**20:.0f} MiB"


@contextlib.contextmanager
def _limited_cpu() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OverTime(f"the reader took more than {MOST_S:g} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _bounded_addresses() -> Iterator[None]:
    """Memory that is asked for beyond all sense is a MemoryError here, whatever the machine would promise."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _resident() -> int:
    """Bytes from which growth counts: those held now, from which the peak begins anew; the peak of the process so far
    where the kernel does not let it.
    """
    return _status("VmRSS") if peak_begins_anew() else _peak()


def peak_begins_anew() -> bool:
    """Make the peak of this process what it holds now; False where the kernel cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(name.encode() + b":"):
                return int(line.split()[1]) * 1024
    raise LookupError(name)


# Damage to bytes

_NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"\0", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"caf\xe9", b'"',
    b"\\ud800", b"\\u0000", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e400", b"-1", b"NaN", b"Infinity", b"null",
    b"true", b"[]", b"{}", b"../", b"/etc/passwd", b"%s%n", b"\x1b[31m", b"'", b",", b":", b" ", b"-", b"e" * 300,
)  # fmt: skip

YAML_WORDS = (
    b"&a ", b"*a", b"<<: *a\n", b"<<: ", b"!!python/object:os.system ", b"!!binary ", b"!!set ", b"!!timestamp ",
    b"!!int ", b"!!float ", b"!!str ", b"!!map ", b"!!seq ", b"!!null ", b"? ", b"- ", b": ", b"\t", b"|\n", b">\n",
    b"%YAML 1.1\n---\n", b"---\n", b"...\n", b"#", b"{", b"}", b"[", b"]", b"~", b"2^-10", b"2^999.9", b"2**9", b".inf",
    b".nan", b"0x10", b"0o17", b"010", b"1_000", b"1:30", b"no", b"base: ", b"base: .\n", b"model: 1\n", b"preset: x\n",
    b"\n  ", b"\n\n", b"''", b'"', b"@", b"`", b"\xc2\x85", b"\xe2\x80\xa9", b"- " * 3000, b"a: " * 3000,
)  # fmt: skip


def mutated(valid: Sequence[bytes], words: Sequence[bytes] = (), most: int = 4) -> st.SearchStrategy[bytes]:
    """One of the ``valid`` files after one to ``most`` changes of bytes or spans; ``words``: the format's own."""
    files, inserted = list(valid), (*words, *words, *WORDS)

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(st.sampled_from(files)))
        for _ in range(draw(st.integers(1, most))):
            _damage(draw, data, files, inserted)
        return bytes(data)

    return damaged()


def _damage(draw: st.DrawFn, data: bytearray, valid: Sequence[bytes], words: Sequence[bytes]) -> None:
    kind = draw(st.sampled_from(_KINDS))
    at = draw(st.integers(0, len(data)))
    length = draw(st.one_of(st.integers(1, 8), st.integers(1, max(1, len(data)))))
    if kind == "flip" and at < len(data):
        data[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == "byte" and at < len(data):
        data[at] = draw(st.integers(0, 255))
    elif kind == "insert":
        data[at:at] = draw(st.binary(min_size=1, max_size=8))
    elif kind == "word":
        data[at:at] = draw(st.sampled_from(words))
    elif kind == "word for span":
        data[at : at + length] = draw(st.sampled_from(words))
    elif kind == "number":
        size, order = draw(st.sampled_from((1, 2, 4, 8))), draw(st.sampled_from(("little", "big")))
        number = draw(st.sampled_from(_NUMBERS)) % 256**size
        data[at : at + size] = number.to_bytes(size, order)  # type: ignore[arg-type]
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[at : at + length] * draw(st.sampled_from((1, 1, 2, 20)))
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "truncate":
        del data[at:]
    elif kind == "splice":
        other = draw(st.sampled_from(list(valid)))
        start = draw(st.integers(0, len(other)))
        data[at:] = other[start:]
    elif kind == "append":
        data += draw(st.sampled_from((b"\0" * 512, b"\0" * 20000, b"\n", b"x", bytes(valid[0]))))


_KINDS = (
    "flip", "byte", "byte", "insert", "word", "word", "word for span", "number", "number", "delete", "repeat", "zero",
    "truncate", "splice", "append",
)  # fmt: skip


# Damage to values


class Raw(str):
    """Text that stands in JSON as it is."""


ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(2**63),
    "", " ", "0", "1", "-1", "1e3", "nan", "null", "true", "\0", "\ud800", "é" * 300, "x" * 100_000, "../../x", "/",
    "a/b", "\x1b[31m", [], [0], [None], [[]], ["a", 1], [1, 2, 3], {}, {"": 0}, {"a": None}, [[1, 2], [3]],
    Raw("NaN"), Raw("-Infinity"), Raw("1e400"), Raw("1" * 1500), Raw("[" * 400 + "]" * 400), Raw('{"a":1,"a":2}'),
    [0] * 10_000, Raw("0.1" + "0" * 400),
)  # fmt: skip


def odd_values(valid: Sequence[Any], most: int = 3, extra: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """One of the ``valid`` values with some of its parts replaced, removed, renamed, swapped or put somewhere else.

    ``extra``: odd values of this format, beside ``ODD_VALUES``.
    """
    texts = [json.dumps(value) for value in valid]
    odd = st.one_of(st.sampled_from((*extra, *extra, *ODD_VALUES)), st.integers(), st.floats(allow_nan=False))

    @st.composite
    def damaged(draw: st.DrawFn) -> Any:
        value = json.loads(draw(st.sampled_from(texts)))
        for _ in range(draw(st.integers(1, most))):
            nodes = [((), value), *_nodes(value, ())]
            whole = len(nodes) == 1 or draw(st.integers(0, 19)) == 0
            path, _ = nodes[0 if whole else draw(st.integers(1, len(nodes) - 1))]
            kind = draw(st.sampled_from(("odd", "odd", "odd", "remove", "rename", "swap", "copy", "wrap", "add")))
            value = _changed(draw, value, path, kind, _copied(draw(odd)), nodes)
        return value

    return damaged()


def _changed(draw: st.DrawFn, value: Any, path: tuple[Any, ...], kind: str, odd: Any, nodes: Sequence[Any]) -> Any:
    other = nodes[draw(st.integers(0, len(nodes) - 1))][1]
    if not path:
        return {"odd": odd, "wrap": [value], "copy": _copied(other)}.get(kind, value)
    holder, last = value, path[-1]
    for part in path[:-1]:
        holder = holder[part]
    current = holder[last]
    if kind == "remove":
        del holder[last]
    elif kind == "rename" and isinstance(holder, dict):
        name = draw(
            st.sampled_from(
                ("", "x", "\ud800", last + "s", last.upper(), "a.b", " ", *(str(p[0][-1]) for p in nodes[1:]))
            )
        )
        holder[name] = holder.pop(last)
    elif kind in ("swap", "copy"):
        holder[last] = _copied(other)
    elif kind == "wrap":
        holder[last] = draw(st.sampled_from(([current], {"x": current}, str(current))))
    elif kind == "add" and isinstance(current, dict):
        current[draw(st.sampled_from(("x", "", "_x", "é")))] = odd
    elif kind == "add" and isinstance(current, list):
        current.append(odd)
    else:
        holder[last] = odd
    return value


def _nodes(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:20]) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key), inner
        yield from _nodes(inner, (*path, key))


def _dumps(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dumps(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_dumps, value)) + "]"
    return json.dumps(value)


def json_bytes(value: Any) -> bytes:
    """As a JSON file has it, ``Raw`` texts as they are."""
    return _dumps(value).encode()


def odd_json(valid: Sequence[Any], extra: Sequence[Any] = (), words: Sequence[bytes] = ()) -> st.SearchStrategy[bytes]:
    """JSON files: mostly with odd values, some with damaged bytes."""
    whole = [json_bytes(value) for value in valid]
    values = odd_values(valid, extra=extra).map(json_bytes)
    return st.one_of(values, values, values, mutated(whole, words))


def odd_trees(valid: Sequence[Any], extra: Sequence[Any] = (), most: int = 2) -> st.SearchStrategy[Any]:
    """Nested dicts and lists, of which some parts were replaced by odd values, removed, renamed or swapped.

    As ``odd_values``, for trees that JSON does not hold: those of torch files. Their leaves are not copied.
    """
    odd = st.sampled_from([*extra, *extra, *(value for value in ODD_VALUES if not isinstance(value, Raw))])

    @st.composite
    def damaged(draw: st.DrawFn) -> Any:
        value = _copied(draw(st.sampled_from(list(valid))))
        for _ in range(draw(st.integers(1, most))):
            nodes = list(_nodes(value, ()))
            if not nodes:
                return value
            path, _ = nodes[draw(st.integers(0, len(nodes) - 1))]
            kind = draw(st.sampled_from(("odd", "odd", "odd", "remove", "swap", "copy", "add")))
            value = _changed(draw, value, path, kind, _copied(draw(odd)), nodes)
        return value

    return damaged()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
