"""tools/encode.py refuses bad input in one sentence."""

from helpers.bad_input import Case, case, each

TEXT = "--out e data.name=emoji data.condition=text"

CASES = [
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
    case("pixels of no side", "fit-pca --out e data.name=emoji --factor 0", "--factor: 0"),
    case("no channels", "fit-pca --out e data.name=emoji --channels 0", "--channels: 0"),
    case("no images to fit on", "fit-pca --out e data.name=emoji --images 0", "--images: 0"),
    case("a file as folder", "fit-pca --out e data.name=emoji", "'e' is a file", files={"e": "dear"}),
    case("a folder with files", "fit-pca --out e data.name=emoji", "'e' is not empty", files={"e/letter.txt": "dear"}),
]


@each(CASES)
def test_refused(refused, bad: Case) -> None:
    refused("tools/encode.py", bad)
