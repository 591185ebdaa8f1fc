"""tools/evaluate.py refuses bad input in one sentence."""

import io
import zipfile

import numpy as np

from helpers.bad_input import Case, case, each

SCORE = "emoji-clip pictures.npz --prompts texts.txt"


def npz(**arrays: np.ndarray) -> bytes:
    """The bytes of an npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def huge() -> bytes:
    """An npz whose array says that it has a billion pictures."""
    array, file = io.BytesIO(), io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": (10**9, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(array, facts)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0.npy", array.getvalue() + b"abcd")
    return file.getvalue()


TEXTS = {"texts.txt": "a flag\n"}
GOOD = npz(arr_0=np.zeros((1, 4, 4, 3), np.uint8))

CASES = [
    case("no score", "", "SCORE"),
    case("a score that is not there", "fid10k", "fid10k"),
    case("no prompts", "emoji-clip pictures.npz", "--prompts"),
    case("prompts that are not there", SCORE, "'texts.txt' cannot be read", files={"pictures.npz": GOOD}),
    case("prompts that are not text", SCORE, "'texts.txt' is not a text file", files={"texts.txt": b"caf\xe9"}),
    case("no prompt in the file", SCORE, "holds no prompt", files={"texts.txt": "\n \n"}),
    case("no pictures", SCORE, "pictures.npz: there is no such file", files=TEXTS),
    case("a folder as pictures", SCORE, "pictures.npz: there is no such file", files={**TEXTS, "pictures.npz": None}),
    case("an empty file", SCORE, "is no npz file", files={**TEXTS, "pictures.npz": b""}),
    case("a file of something else", SCORE, "is no npz file", files={**TEXTS, "pictures.npz": "<html>"}),
    case("a file that was cut", SCORE, "is no npz file", files={**TEXTS, "pictures.npz": GOOD[:100]}),
    case("no arr_0", SCORE, "holds no arr_0", files={**TEXTS, "pictures.npz": npz(x=np.zeros(3))}),
    case("pickled objects", SCORE, "arr_0 cannot be read", files={**TEXTS, "pictures.npz": npz(arr_0=np.array([{}]))}),
    case("a huge shape", SCORE, "holds 4 bytes where its header", files={**TEXTS, "pictures.npz": huge()}),
    case("no picture", SCORE, "no pictures", files={**TEXTS, "pictures.npz": npz(arr_0=np.zeros((0, 4, 4, 3), "u1"))}),
    case("floats", SCORE, "not uint8", files={**TEXTS, "pictures.npz": npz(arr_0=np.zeros((1, 4, 4, 3)))}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/evaluate.py", bad)
