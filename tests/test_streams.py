"""Streams that never raise: other encodings, closed files, a full disk, a terminal and a reader that go away."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from helpers.ranks import ROOT

START = """
import sys
from megadit.errors import run_command
from megadit.streams import result_is_saved
"""
PRINTED = START + "run_command(lambda argv: print('µP — 1') or 0)"
SAVED = START + "run_command(lambda argv: result_is_saved() or print('µP — 1', flush=True) or 0)"


def shell(program: str, redirection: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with ``program``, its standard files redirected by a shell."""
    words = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable, *options, "-c", program]
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=100
    )


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "iso8859-2:strict"])
def test_what_an_encoding_lacks_is_escaped(encoding):
    result = shell(PRINTED, "", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "\\xb5P \\u2014 1\n"


@pytest.mark.parametrize(("target", "why"), [("> /dev/full", "No space left on device"), (">&-", "it is closed")])
@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_result_that_is_lost_is_a_failure_in_a_sentence(target, why, options):
    result = shell(PRINTED, target, *options)
    assert result.returncode == 1
    assert result.stderr == f"error: stdout: the result cannot be written ({why})\n"


@pytest.mark.parametrize("target", ["> /dev/full", ">&-", "> /dev/full 2> /dev/full", ">&- 2>&- <&-"])
def test_a_saved_result_stands_whatever_becomes_of_the_print(target):
    result = shell(SAVED, target)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_verdict_is_told_by_its_code_although_its_words_are_lost():
    assert shell(START + "run_command(lambda argv: print('no') or 3)", "> /dev/full").returncode == 3


def test_errors_go_nowhere_where_stderr_is_closed():
    refused = START + "from megadit.errors import UserError\ndef main(argv): raise UserError('x')\nrun_command(main)"
    assert shell(refused, "2>&-").returncode == 2
    assert shell(START + "run_command(lambda argv: 1 / 0)", "2> /dev/full").returncode == 1


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    program = START + (
        "import os\n"
        f"def main(argv):\n    file = open({str(tmp_path / 'metrics')!r}, 'w', encoding='utf-8')\n"
        "    os.write(1, b'what a library prints')\n    return 0 if file.fileno() > 2 else 7\n"
        "run_command(main)"
    )
    assert shell(program, ">&- 2>&- <&-").returncode == 0
    assert (tmp_path / "metrics").read_text(encoding="utf-8") == ""


def test_a_terminal_that_goes_away():
    """As after a lost connection: every write fails with EIO."""
    ours, theirs = pty.openpty()
    program = START + (
        "import time\nfrom tqdm import tqdm\n"
        "def main(argv):\n    result_is_saved()\n    print('begun', flush=True)\n    sys.stdin.readline()\n"
        "    bar = tqdm(total=3)\n    bar.update(1)\n    bar.set_postfix_str('µ')\n    bar.close()\n"
        "    print('done', flush=True)\n    return 0\nrun_command(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    try:
        assert b"begun" in os.read(ours, 100)
    finally:
        os.close(ours)
    process.communicate(b"\n", timeout=100)
    assert process.returncode == 0


def test_streams_of_others_stay():
    program = START + (
        "import io\nfrom megadit.streams import steady_streams\n"
        "sys.stdout = mine = io.TextIOWrapper(io.BytesIO(), encoding='utf-8')\nsteady_streams()\n"
        "sys.exit(0 if sys.stdout is mine else 7)"
    )
    assert shell(program, "").returncode == 0
