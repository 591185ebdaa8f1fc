"""How commands end: what a person did wrong in one sentence, a reader that goes away in silence, a defect told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ranks import ROOT
from megadit.errors import UserError, did_you_mean, run_command, why_unreadable

START = "import sys; from megadit.errors import UserError, run_command\n"
MUCH = START + "run_command(lambda argv: print('x\\n' * 500_000) or 0)"
LITTLE = START + "run_command(lambda argv: print('x') or 0)"


def read_by_nobody(*arguments: str, errors_too: bool = False) -> tuple[int, str]:
    """(exit code, stderr) of Python with ``arguments``, whose stdout's reader, and stderr's, is gone from the start."""
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, *arguments],
            stdout=write,
            stderr=write if errors_too else subprocess.PIPE,
            cwd=ROOT,
            text=True,
            timeout=100,
        )
    finally:
        os.close(write)
    return result.returncode, result.stderr or ""


@pytest.mark.parametrize("program", [MUCH, LITTLE], ids=["much", "little"])
@pytest.mark.parametrize("unbuffered", [True, False], ids=["unbuffered", "buffered"])
def test_a_reader_that_goes_away_ends_a_command_quietly(program: str, unbuffered: bool) -> None:
    assert read_by_nobody(*(["-u"] if unbuffered else []), "-c", program) == (1, "")


def test_errors_that_nobody_reads() -> None:
    program = START + "def main(argv): raise UserError('x: is wrong; mend it')\nrun_command(main)"
    assert read_by_nobody("-c", program, errors_too=True)[0] == 2
    assert read_by_nobody("-c", program) == (2, "error: x: is wrong; mend it\n")


def test_ctrl_c_ends_a_command_without_a_traceback() -> None:
    program = START + "def main(argv): raise KeyboardInterrupt\nrun_command(main)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("script", ["launch/pretrain.py", "tools/transfer.py"])
def test_help_that_nobody_reads(script: str) -> None:
    """argparse passes over what it cannot write, where nothing was buffered."""
    assert read_by_nobody(script, "--help") in ((0, ""), (1, ""))


def test_the_first_line_of_a_dry_run() -> None:
    arguments = [sys.executable, "launch/pretrain.py", "--config", "configs/quickstart/digits.yaml", "--dry_run"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None and process.stderr is not None
    with process:
        assert process.stdout.readline()
        process.stdout.close()
        message = process.stderr.read()
    assert "BrokenPipe" not in message and "Traceback" not in message
    assert process.returncode in (0, 1)


def test_another_broken_pipe_is_a_defect_and_keeps_its_traceback(tmp_path: Path) -> None:
    program = START + "def main(argv): raise BrokenPipeError('of a worker')\nrun_command(main)"
    with (tmp_path / "out").open("w") as out:
        result = subprocess.run(
            [sys.executable, "-c", program], stdout=out, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False
        )
    assert result.returncode == 1 and "BrokenPipeError: of a worker" in result.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--run_dir", ""], "--run_dir"),
        (["--run_dir="], "--run_dir"),
        (["--json", " "], "--json"),
        ([""], "the argument"),
        (["run", ""], "the argument after 'run'"),
    ],
)
def test_a_variable_that_is_not_set_is_told(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: pytest.fail("the command ran"), words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {named}: is empty")


def test_an_empty_text_is_one_where_the_command_says_so() -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: 0, ["--prompt", "", "key=value"], may_be_empty=("--prompt",))
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("caf\u00e9 μP", "caf\u00e9 μP"),
        ("two\nlines", "two\nlines"),
        ("\x1b[31mred\r\0\x07", r"\x1b[31mred\r\x00\x07"),
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_message_quotes_cannot_drive_the_terminal(quoted: str, shown: str) -> None:
    assert str(UserError(f"data.path: '{quoted}' is wrong; mend it")) == f"data.path: '{shown}' is wrong; mend it"


def test_of_a_very_long_message_the_middle_is_left_out() -> None:
    message = str(UserError(f"--config: {'x' * 100_000} is wrong; mend it"))
    assert len(message) < 4100 and message.startswith("--config: xxx") and message.endswith("xxx is wrong; mend it")
    assert "characters] …" in message


def test_a_file_that_may_not_be_read_needs_no_repair():
    message = why_unreadable(PermissionError(13, "Permission denied"), "copy it again")
    assert message == "(Permission denied); give yourself the right to read it"
    assert why_unreadable(OSError(5, "Input/output error"), "copy it again") == "(Input/output error); copy it again"


def test_the_nearest_word_is_offered():
    assert did_you_mean("lerning", ["learning", "width"], "it has two") == "did you mean learning?"
    assert did_you_mean("zzz", ["learning", "width"], "it has two") == "it has two"
    assert did_you_mean("widht", ["learning", "width"]) == "did you mean width?"
    assert did_you_mean("zzz", ["learning", "width"]).startswith("did you mean ")
    assert did_you_mean("zzz", []) == ""
