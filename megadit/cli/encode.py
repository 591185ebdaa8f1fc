"""Encode a data set once, for runs that then read latents, text features and target features from WebDataset tars.

The data section chooses what is computed: latents by data.vae (an AutoencoderKL, or a PCA patch codec), of mirrored
images too with data.flip; text features by data.text with data.condition=text; REPA's targets by data.features. The
images may be any data set, tars of images among them. Train with the same configuration and data.name=webdataset
data.path=OUT (and data.features.encoder=stored). An interrupted command resumes when it is given again.

python tools/encode.py --config FILE --out shards/latents data.path=IMAGES data.vae.path=SD-VAE-FT-EMA
python tools/encode.py fit-pca --help      fit a PCA patch codec: latents without a trained autoencoder, in seconds
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megadit.cli import add_plugins, import_plugins
from megadit.cli.make_shards import add_sharding, in_range, print_set, progress_bar, sharding_of
from megadit.errors import EXIT_OK, UserError
from megadit.streams import result_is_saved

if TYPE_CHECKING:
    from megadit.config.schema.data import DataConfig

FIT = "fit-pca"
FIT_HELP = """Fit a PCA patch codec in closed form on the training part of a data set; measure it on the held-out part.

The folder then stands where an autoencoder's would: data.vae.path=OUT data.vae.factor=F, model.in_channels=CHANNELS.

python tools/encode.py fit-pca --out codecs/emoji-f4c16 data.name=emoji data.image_size=64
"""


def parser() -> argparse.ArgumentParser:
    """The command line of encoding."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_common(p)
    add_sharding(p)
    p.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of what is stored")
    p.add_argument(
        "--posterior", choices=("moments", "sample"),
        help="of an AutoencoderKL; moments (default): sampled anew in every epoch; sample: one sample, half as large",
    )  # fmt: skip
    p.add_argument("--seed", type=int, metavar="N", help="of --posterior sample; default 0")
    p.add_argument("--max_length", type=int, metavar="N", help="tokens of a text; default: --config's model.text")
    p.add_argument("--device", default="auto", metavar="auto|cpu|cuda", help="default: cuda where there is one")
    return p


def fit_parser() -> argparse.ArgumentParser:
    """The command line of fit-pca."""
    p = argparse.ArgumentParser(
        prog=f"encode.py {FIT}", description=FIT_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_common(p)
    p.add_argument("--factor", type=int, default=4, metavar="F", help="image pixels per latent pixel; default 4")
    p.add_argument("--channels", type=int, default=16, metavar="C", help="of the latents; default 16")
    p.add_argument("--images", type=int, default=10_000, metavar="N", help="most images to fit on; default 10000")
    return p


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("overrides", nargs="*", metavar="data.key=value", help="change the data section")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    p.add_argument("--config", metavar="FILE", help="run configuration (YAML) whose data section to start from")
    add_plugins(p)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the sentences")


def main(argv: Sequence[str] | None = None) -> int:
    """Encode, or fit a codec."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    fit = arguments[:1] == [FIT]
    args = (fit_parser() if fit else parser()).parse_intermixed_args(arguments[int(fit) :])
    from megadit.parallel.environment import refuse_ranks

    refuse_ranks("tools/encode.py")
    import_plugins(args)
    return _fit(args) if fit else _encode(args)


def _encode(args: argparse.Namespace) -> int:
    from megadit.config.loading.loader import load_data, text_length
    from megadit.data.prerequisites import check_data_prerequisites

    sharding = sharding_of(args.name, args.out, args.samples, args.max_mb)
    config = load_data(args.config, args.overrides)
    check_data_prerequisites(config)
    check_encode_options(config, args.posterior, args.seed, args.max_length)
    length = args.max_length
    if length is not None:
        in_range("--max_length", length, 1, None)
    elif config.condition == "text":
        length = text_length(args.config)
    from megadit.data.shards.encoding import Encoding, encode_set

    encoding = Encoding(args.dtype, args.posterior or "moments", length, args.seed or 0)
    with progress_bar("samples") as progress:
        manifest = encode_set(config, args.out, sharding, encoding, device_of(args.device), progress)
    print_set(manifest, args.out, as_json=args.json)
    return EXIT_OK


def _fit(args: argparse.Namespace) -> int:
    from megadit.config.loading.loader import load_data
    from megadit.extensions import DATA_SOURCES

    for option in ("factor", "channels", "images"):
        in_range(f"--{option}", getattr(args, option), 1, None)
    config = load_data(args.config, args.overrides)
    DATA_SOURCES.get(config.name).check(config)
    from megadit.data.codecs.pca import fit_and_save

    fit = fit_and_save(config, args.out, args.factor, args.channels, args.images)
    psnr = "no images held out" if fit["psnr"] is None else f"PSNR {fit['psnr']:.2f} dB on {fit['held_out']} held out"
    text = f"{args.out}: fitted on {fit['fitted_on']} images, {psnr}\n  {fit['use']}"
    result_is_saved(as_json=args.json)
    print(json.dumps(fit) if args.json else text)
    return EXIT_OK


def device_of(name: str) -> str:
    """--device as torch names it; auto: cuda where there is a GPU. Raises UserError where it is not available."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device: {name} is not one of auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device: {name} is not available here; use cpu")
    return name


def check_encode_options(config: DataConfig, posterior: str | None, seed: int | None, max_length: int | None) -> None:
    """Raise UserError for an option of ``tools/encode.py`` (None: not given) that nothing reads for ``config``."""
    from megadit.data.codecs.folder import VAE_CLASS, codec_facts

    if seed is not None and posterior != "sample":
        raise UserError(f"--seed: {seed} is not read without --posterior sample, the one that draws; leave it out")
    if posterior is not None and (config.vae is None or codec_facts(config.vae).name != VAE_CLASS):
        raise UserError(f"--posterior: {posterior} is of an AutoencoderKL, and data.vae gives none; leave it out")
    if max_length is not None and config.condition != "text":
        raise UserError(
            f"--max_length: {max_length} is of texts, and data.condition is {config.condition}; leave it out, or set "
            "data.condition=text"
        )
