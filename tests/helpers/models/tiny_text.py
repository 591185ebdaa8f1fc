"""Small random text networks of the real classes, with real tokenizers, in folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CAPTIONS = [
    "grinning face with big eyes",
    "flag of France",
    "flag of Japan",
    "red apple on a green table",
    "woman running towards a mountain",
    "person in a steamy room",
    "the handwritten digit seven",
    "cat with a wry smile",
]


def sentencepiece_model(path: Path, vocabulary: int = 48) -> None:
    """A T5-like sentencepiece model (pad 0, </s> 1, <unk> 2) trained on ``CAPTIONS``."""
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 4), model_writer=model, vocab_size=vocabulary, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    path.write_bytes(model.getvalue())


def t5_folder(folder: Path, dim: int = 16) -> Path:
    """A T5EncoderModel of two layers with ``spiece.model``."""
    from megadit.optional import import_transformers

    transformers = import_transformers()
    config = transformers.T5Config(
        vocab_size=48, d_model=dim, d_kv=8, d_ff=24, num_layers=2, num_heads=2, is_gated_act=True,
        dense_act_fn="gelu_new", feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.T5EncoderModel(config).save_pretrained(folder)
    sentencepiece_model(folder / "spiece.model")
    return folder


def word_tokenizer(folder: Path, *, begin: str, end: str, pad: str) -> int:
    """A ``tokenizer.json`` of whole words, with a first and a last token; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys([pad, "<unk>", *words, begin, end]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (begin, end)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "bos_token": begin, "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def clip_folder(folder: Path, dim: int = 16, projection: int = 12, longest: int = 20) -> Path:
    """A CLIPTextModelWithProjection of two layers with a tokenizer of words."""
    from megadit.optional import import_transformers

    transformers = import_transformers()
    size = word_tokenizer(folder, begin="<|startoftext|>", end="<|endoftext|>", pad="<pad>")
    config = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=dim, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=projection, max_position_embeddings=longest, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def bert_folder(folder: Path, dim: int = 16, longest: int = 32) -> Path:
    """A BertModel of two layers, as all-MiniLM-L6-v2 is one of six, with a tokenizer of words."""
    from megadit.optional import import_transformers

    transformers = import_transformers()
    size = word_tokenizer(folder, begin="[CLS]", end="[SEP]", pad="[PAD]")
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=dim, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=longest,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    return folder
