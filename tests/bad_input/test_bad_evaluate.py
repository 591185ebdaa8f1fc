"""tools/evaluate.py refuses bad input in one sentence."""

import io

import numpy as np

from helpers.bad_input import Case, case, each

SCORE = "emoji-clip pictures.npz --prompts texts.txt"


def npz(**arrays: np.ndarray) -> bytes:
    """The bytes of an npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
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
    case("floats", SCORE, "not uint8", files={**TEXTS, "pictures.npz": npz(arr_0=np.zeros((1, 4, 4, 3)))}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/evaluate.py", bad)
