"""tools/make_shards.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each
from helpers.data.tars import samples, tar_bytes

DIGITS = "--out shards data.name=digits"

CASES = [
    case("no folder", "", "--out"),
    case("no such data set", "--out shards data.name=foo", "data.name: 'foo'"),
    case("no samples in a tar", f"{DIGITS} --samples 0", "--samples: 0"),
    case("tars of nothing", f"{DIGITS} --max_mb 0", "--max_mb: 0"),
    case("tars of nan", f"{DIGITS} --max_mb nan", "--max_mb: nan"),
    case("tars without end", f"{DIGITS} --max_mb inf", "--max_mb: inf"),
    case("no quality", f"{DIGITS} --image jpg --quality 0", "--quality: 0"),
    case("quality of exact pictures", f"{DIGITS} --quality 90", "--quality: 90 is not read where --image is png"),
    case("a path as name", f"{DIGITS} --name a/b", "--name: 'a/b'"),
    case("a name that leads upwards", f"{DIGITS} --name ..", "--name: '..'"),
    case("another section's key", f"{DIGITS} optim.lr=3", "optim.lr=3", "only data.* keys"),
    case("no such config", "--out shards --config no.yaml", "no file no.yaml"),
    case("a folder with files", DIGITS, "--out: 'shards' is not empty", files={"shards/letter.txt": "dear"}),
    case("a file as folder", DIGITS, "--out: 'shards'", files={"shards": "dear"}),
    case("pictures from nowhere", "--out shards data.name=image-folder", "data.path: not given"),
    case(
        "a path that is not there",
        "--out shards data.name=image-folder data.path=nowhere",
        "data.path: nowhere is not a folder",
    ),
    case("tars that are not there", "--out shards data.name=webdataset data.path=.", "has no .tar files"),
    case(
        "a tar that is not sorted",
        "--out shards data.name=webdataset data.path=t data.condition=none",
        "data.path: t/x.tar is not sorted",
        files={"t/x.tar": tar_bytes(sorted(samples(0, 4).items(), key=lambda item: item[0][-3:]))},
    ),
    case("a class that is not there", "--out shards data.name=emoji data.classes=[cat]", "'cat' is not a class"),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/make_shards.py", bad)
