"""tools/make_shards.py and tools/encode.py refuse bad input in one sentence."""

from helpers.bad_input import Case, case, each

DIGITS = "--out shards data.name=digits"
TEXT = "--out e data.name=emoji data.condition=text"

SHARDS = [
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
    case("a class that is not there", "--out shards data.name=emoji data.classes=[cat]", "'cat' is not a class"),
]

ENCODE = [
    case("no folder", "", "--out"),
    case("nothing to encode", "--out e data.name=emoji", "nothing to encode"),
    case("no such codec", "--out e data.name=emoji data.vae.path=nowhere", "data.vae.path: nowhere is not a folder"),
    case("a codec without config", "--out e data.name=emoji data.vae.path=v", "has no config.json", files={"v": None}),
    case("a text encoder from nowhere", f"{TEXT} data.text.encoder=t5", "data.text.path: is missing"),
    case("no such text encoder", f"{TEXT} data.text.encoder=foo", "data.text.encoder: 'foo'"),
    case("texts of no token", f"{TEXT} --max_length 0", "--max_length: 0"),
    case(
        "a seed that nothing draws by", f"{TEXT} --max_length 9 --seed 3", "--seed: 3 is not read without --posterior"
    ),
    case("a posterior of no codec", f"{TEXT} --max_length 9 --posterior moments", "--posterior: moments is of an"),
    case("tokens of no text", "--out e data.name=emoji --max_length 9", "--max_length: 9 is of texts"),
    case("no such device", f"{TEXT} --device tpu", "--device: tpu"),
]

FIT = [
    case("pixels of no side", "fit-pca --out e data.name=emoji --factor 0", "--factor: 0"),
    case("no channels", "fit-pca --out e data.name=emoji --channels 0", "--channels: 0"),
    case("no images to fit on", "fit-pca --out e data.name=emoji --images 0", "--images: 0"),
    case("a file as folder", "fit-pca --out e data.name=emoji", "'e' is a file", files={"e": "dear"}),
    case("a folder with files", "fit-pca --out e data.name=emoji", "'e' is not empty", files={"e/letter.txt": "dear"}),
]


@each(SHARDS)
def test_make_shards_refuses(refused, bad: Case) -> None:
    refused("tools/make_shards.py", bad)


@each([*ENCODE, *FIT])
def test_encode_refuses(refused, bad: Case) -> None:
    refused("tools/encode.py", bad)
