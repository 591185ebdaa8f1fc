"""Values are what was written: in configuration files, overrides, DeepSpeed files and studies."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from megadit.config import load, load_config, merge_ds_config, replace, save_config
from megadit.config.schema.values import resolve_scalars
from megadit.errors import UserError
from megadit.files.json_text import JsonError, parse_json
from megadit.files.text import decode
from megadit.files.yaml_text import YamlError, dump_yaml, parse_yaml
from megadit.search.study.spec import read_spec

MODEL = "model: {width: 64, heads: 4, input_size: 8}\n"
MINIMAL = MODEL + "train: {steps: 10}\n"
FOLDER = "data.name=image-folder"


def loaded(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> Any:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UserError) as raised:
        loaded(tmp_path, text, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Texts that YAML 1.1 reads as something else, or that look like a number, a date, a word of YAML.
TEXTS = (
    "no", "No", "NO", "yes", "on", "off", "y", "n", "true", "True", "false", "007", "010", "1.0", "1e3", "1E3", "0x10",
    "0o10", "0b1", "1_000", "1:30", "12:30:45", "190:20:30", "+1", "-1", ".5", "1.", ".inf", ".nan", "2024-01-01",
    "2001-12-14t21:59:43.10-05:00", "=", "<<", "2^-10", "1,5", "1/2", "50%", "x", "Smileys & Emotion", "ä", "猫",
)  # fmt: skip
QUOTED = ("null", "~", "", " a", "a ", "a #b", "a: b", "- a", "'", '"', "a\nb", "\t", "*", "&a")


class TestTexts:
    @pytest.mark.parametrize("text", TEXTS)
    def test_a_class_keeps_the_name_that_was_written(self, tmp_path: Path, text: str) -> None:
        data = f"data: {{classes: [{text}, other], name: image-folder, path: {text}}}\n".replace("1,5", "'1,5'")
        assert loaded(tmp_path, MINIMAL + data).data.classes == (text, "other")
        assert loaded(tmp_path, MINIMAL, (FOLDER, f"data.path={text}")).data.path == text

    @pytest.mark.parametrize(
        "text", [*TEXTS, "null", "~", "", " a", "a ", "a #b", "a: b", "- a", "'", '"', "a\nb", "\t", "*", "&a"]
    )
    def test_what_is_saved_is_what_is_read_also_by_yaml_1_1(self, tmp_path: Path, text: str) -> None:
        config = replace(load_config("quickstart/digits.yaml"), {"data.classes": [text, f"{text}2"]})
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["classes"] == [text, f"{text}2"]

    def test_null_among_texts_is_refused(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, MINIMAL + "data: {classes: [null, a]}\n")
        assert message.startswith("data.classes.0: null is not a text; put it in quotes")

    def test_a_comment_in_an_override_is_not_lost(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, MINIMAL, ("data.path=/data/a #b",))
        assert message.startswith("data.path: '/data/a #b' is not a YAML value: drops '#b' as a comment")
        assert loaded(tmp_path, MINIMAL, (FOLDER, "data.path='/data/a #b'")).data.path == "/data/a #b"
        assert loaded(tmp_path, MINIMAL, (FOLDER, "data.path=/data/a#b")).data.path == "/data/a#b"
        assert loaded(tmp_path, MINIMAL + "data: {name: image-folder, path: a}  # where\n").data.path == "a"

    def test_names_of_averages_are_numbers_however_written(self, tmp_path: Path) -> None:
        config = loaded(tmp_path, MINIMAL + "ema: {decays: [0.9990]}\nsample: {weights: 0.9990}\n")
        assert config.sample.weights == "0.999"


class TestNumbers:
    @pytest.mark.parametrize(
        ("text", "value"),
        [("010", 10), ("0008", 8), ("+7", 7), ("0x10", 16), ("0o10", 8), ("1e3", 1000), ("2^3", 8), ("'12'", 12)],
    )
    def test_whole_numbers(self, tmp_path: Path, text: str, value: int) -> None:
        seed = loaded(tmp_path, f"{MODEL}train: {{steps: 10, seed: {text}}}\n").train.seed
        assert seed == value and type(seed) is int
        assert loaded(tmp_path, MINIMAL, (f"train.seed={text}",)).train.seed == value

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            *(
                (text, "is not a whole number")
                for text in ("1_000", "1:30", "0b1", "0o9", "1.5", "1,000", "1 000", "no")
            ),
            *(
                (text, "is not a whole number")
                for text in ("2024-01-01", "'1_0'", "١٢", "true", ".inf", "1e400", "0x", "~")
            ),
            *((text, "has more than 63 bits; lower it") for text in (str(2**63), "1e30", "9" * 30)),
        ],
    )
    def test_what_is_no_whole_number_is_refused(self, tmp_path: Path, text: str, why: str) -> None:
        message = refusal(tmp_path, MINIMAL, (f"train.seed={text}",))
        assert message.startswith("train.seed: ") and why in message

    @pytest.mark.parametrize(("text", "value"), [("010", 10.0), ("1E-4", 1e-4), ("+.5", 0.5), ("2**-10", 2**-10)])
    def test_learning_rates(self, tmp_path: Path, text: str, value: float) -> None:
        assert loaded(tmp_path, MINIMAL + f"optim: {{lr: {text}}}\n").optim.lr == value

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            *((text, "is not a finite number") for text in (".inf", "-.INF", ".nan", "1e400", "9" * 400)),
            *(
                (text, "is not a number")
                for text in ("1,5", "1_0.5", "1:30", "inf", "nan", "1e-400", "1e", "yes", "٣", "1 e-4")
            ),
        ],
    )
    def test_what_is_no_number_is_refused(self, tmp_path: Path, text: str, why: str) -> None:
        message = refusal(tmp_path, MINIMAL, (f"optim.lr={text}",))
        assert message.startswith("optim.lr: ") and why in message

    @pytest.mark.parametrize("text", ["true", "True", "TRUE", "yes", "on", "Yes"])
    def test_words_of_truth_are_truth_where_that_is_meant(self, tmp_path: Path, text: str) -> None:
        assert loaded(tmp_path, MINIMAL + f"data: {{flip: {text}}}\n").data.flip is True

    @pytest.mark.parametrize("text", ["y", "1", "'true'", "ja", "tRUE", "0x1"])
    def test_other_words_are_none(self, tmp_path: Path, text: str) -> None:
        assert "is not true or false" in refusal(tmp_path, MINIMAL + f"data: {{flip: {text}}}\n")


class TestFiles:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_encodings_with_their_mark(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "c.yaml").write_bytes((MINIMAL + "data: {name: image-folder, path: ä}\n").encode(encoding))
        assert load_config(tmp_path / "c.yaml").data.path == "ä"

    @pytest.mark.parametrize("data", [MINIMAL.encode("utf-16-le"), "data: {path: ä}".encode("latin-1"), b"\x00\x01"])
    def test_other_files_are_refused(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "c.yaml").write_bytes(data)
        with pytest.raises(UserError, match=r"is not a text file \(line 1 has|is not valid YAML: the character"):
            load(tmp_path / "c.yaml")

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("train: {steps: 1}\ntrain: {steps: 2}\n", "the key train is there twice (line 2)"),
            ("1: a\n'1': b\n", "the key 1 is there twice"),
            ("train:\n\tsteps: 10\n", "indent with spaces (line 2)"),
            ("a: &a [*a]\n", "an alias stands inside what it repeats"),
            ("? [a]\n: b\n", "a key is a list or a section"),
            ("a: !!python/object:os.system x\n", "the tag tag:yaml.org,2002:python/object:os.system is not read here"),
            ("a: !x y\n", "the tag !x is not read here"),
            ("a: !!str [1]\n", "expected a scalar node, but found sequence (line 1)"),
            ("a: !!map 3\n", "what is tagged as a section is none (line 1)"),
            ("a: 1\n---\nb: 2\n", "but found another document"),
            ("a: " + "[" * 100_000, "is nested too deeply: more than 100 levels (line 1)"),
            ("- " * 100_000, "is nested too deeply: more than 100 levels (line 1)"),
            ("\n".join(" " * n + "a:" for n in range(300)), "is nested too deeply: more than 100 levels (line 100)"),
            ("{a: " * 300 + "1" + "}" * 300, "is nested too deeply"),
            ("? " * 100_000, "is nested too deeply"),
            (
                "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 300))]),
                "more than 100 levels once its aliases are followed",
            ),
            ("[" + "1," * 100_001 + "]", "holds more than 100000 values"),
            ('a: "\\ud83d"\n', "a text holds half a surrogate pair, which is no character (line 1)"),
        ],
    )
    def test_what_is_not_read_is_said(self, tmp_path: Path, text: str, why: str) -> None:
        message = refusal(tmp_path, text)
        assert message.startswith("config: ") and why in message

    def test_aliases_are_bounded(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
        assert "more than 100000 values" in refusal(tmp_path, "\n".join(lines) + "\n")

    def test_merge_keys_and_anchors_work(self, tmp_path: Path) -> None:
        text = MINIMAL + "optim: &o {lr: 1e-3, eps: 1e-6}\n"
        values = parse_yaml(text + "other:\n  <<: *o\n  lr: 1e-2\n")
        assert resolve_scalars(values["other"]) == {"lr": 1e-2, "eps": 1e-6}

    def test_a_key_in_one_word_and_in_capitals(self, tmp_path: Path) -> None:
        message = refusal(tmp_path, MINIMAL + "optim.lr: 1e-3\n")
        assert message.startswith("optim.lr: only an override is written as one word; write optim: {lr: …} in a file")
        assert "did you mean optim.lr?" in refusal(tmp_path, MINIMAL + "optim: {LR: 1e-3}\n")
        assert refusal(tmp_path, MINIMAL + "optim: {lr\u00a0: 1}\n").startswith(
            "'optim.lr\\xa0': no such key; did you mean optim.lr"
        )

    def test_the_writer_and_the_reader_agree(self) -> None:
        values = {text or "empty": [text, {"x": text}] for text in (*TEXTS, "null", "~", "", "a: b", "#")}
        values |= {"numbers": [0, -3, 1e-5, 1e22, 0.1, 2**62], "truth": [True, False, None]}
        text = dump_yaml(values)
        assert yaml.safe_load(text) == values
        reread = resolve_scalars(parse_yaml(text))
        assert reread == values and all(type(value) is str for value in reread["010"][:1])


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "why"),
        [
            ("data.classes=" + "[" * 100_000, "is nested too deeply: more than 100 levels (line 1)"),
            ("a." * 100_000 + "a=1", "is no key of a configuration; write section.key=value"),
            ("data.path=caf\udce9", "'caf\\udce9' is not UTF-8; where it names a file or folder, rename that or give"),
            ("data.path=a #" + "b" * 100_000, "as a comment: put the value in quotes"),
        ],
    )
    def test_what_nobody_means_is_one_short_sentence(self, override: str, why: str) -> None:
        with pytest.raises(UserError) as raised:
            load("quickstart/digits.yaml", [override])
        assert why in str(raised.value) and len(str(raised.value)) < 400


class TestStudies:
    STUDY = "base: quickstart/digits.yaml\ntrials: 2\nname: 007\n"

    def spec(self, tmp_path: Path, text: str) -> Any:
        (tmp_path / "s.yaml").write_text(self.STUDY + text)
        return read_spec(tmp_path / "s.yaml")

    def test_values_of_a_space_are_numbers_and_its_texts_are_texts(self, tmp_path: Path) -> None:
        spec = self.spec(tmp_path, "space: {optim.lr: {grid: [010, 1e-3, 2^-3]}, data.flip: {choice: [true, false]}}\n")
        assert spec.name == "007"
        assert spec.space["optim.lr"].values == (10, 1e-3, 0.125)
        assert spec.space["data.flip"].values == (True, False)
        spec = self.spec(tmp_path, "space: {data.path: {choice: [007, no]}, data.classes: {choice: [[1e3, no]]}}\n")
        assert spec.space["data.path"].values == ("007", "no")
        assert spec.space["data.classes"].values == (["1e3", "no"],)

    def test_variants_take_values_as_their_keys_do(self, tmp_path: Path) -> None:
        text = "space: {optim.lr: {uniform: [1e-4, 1e-3]}}\nvariants: {a: {data.classes: [no, 007], data.flip: yes}}\n"
        spec = self.spec(tmp_path, text)
        assert spec.variants["a"] == {"data.classes": ["no", "007"], "data.flip": True}
        again = parse_yaml(dump_yaml(spec.model_dump(mode="json")))
        assert (
            resolve_scalars(again["variants"]["a"]["data.flip"]) is True
            and again["variants"]["a"]["data.classes"][1] == "007"
        )


# Text → what the sentence says of it. All are things that people write in files called JSON.
BAD_JSON = {
    '{"a": 1,}': "has a comma before the closing }; take the comma out (line 1)",
    '{"a": [1, 2,\n]}': "has a comma before the closing ]; take the comma out (line",
    '{"a": 1 // one\n}': "has a comment, which JSON does not know; take it out (line 1)",
    '{\n# one\n"a": 1}': "has a comment, which JSON does not know; take it out (line 2)",
    '/* one */ {"a": 1}': "has a comment",
    '{"a": 1} // end': "has a comment",
    "{'a': 1}": 'has a text in single quotes; write "…" (line 1)',
    '{"a": True}': "has the word True without quotes; write true (line 1)",
    '{"a": fp16}': 'has the word fp16 without quotes; write "fp16" (line 1)',
    "{a: 1}": 'has the word a without quotes; write "a" (line 1)',
    '{"a": 1, "a": 2}': "has the key a twice; keep one",
    '{"a": NaN}': "has NaN, which is no number of JSON",
    '{"a": 1e999}': "has 1e999, which is larger than any number here",
    '{"a" 1}': "is not valid JSON: Expecting ':' delimiter (line 1)",
    "[" * 100_000: "is nested too deeply: more than 100 levels (line 1)",
    '{"a":\n' * 100_000: "is nested too deeply: more than 100 levels (line 101)",
    "[" * 101 + "]" * 101: "is nested too deeply",
    '["' + '\\"[' * 100_000: "is not valid JSON: Unterminated string",
    "9" * 5000: "has a number of 5000 digits; write one that fits 64 bits",
    "": "is not valid JSON: Expecting value (line 1)",
}


class TestJson:
    def test_what_stands_in_texts_or_side_by_side_is_not_deep(self) -> None:
        assert parse_json("[" * 100 + "]" * 100) is not None
        assert parse_json('["' + '[{\\"' * 1000 + '", "\\\\", []]')[1:] == ["\\", []]
        assert len(parse_json(json.dumps([[0]] * 500))) == 500

    @pytest.mark.parametrize("text", BAD_JSON)
    def test_what_is_wrong_is_said(self, text: str) -> None:
        with pytest.raises(JsonError) as raised:
            parse_json(text, finite=True)
        assert str(raised.value).startswith(BAD_JSON[text])

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    def test_a_deepspeed_file_with_a_mark(self, tmp_path: Path, encoding: str) -> None:
        (tmp_path / "ds.json").write_bytes(json.dumps({"gradient_clipping": 2.0}).encode(encoding))
        merged = merge_ds_config(load("quickstart/digits.yaml"), tmp_path / "ds.json", 1)
        assert merged.config.optim.clip.value == 2.0

    def test_a_deepspeed_file_with_a_comment_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "ds.json").write_text('{\n  "gradient_clipping": 1.0, // as in the paper\n}')
        with pytest.raises(UserError) as raised:
            merge_ds_config(load("quickstart/digits.yaml"), tmp_path / "ds.json", 1)
        assert str(raised.value).startswith("--ds_config: ") and "has a comment, which JSON" in str(raised.value)


def test_every_short_text_of_the_alphabet_is_read_as_it_stands() -> None:
    """All strings of up to three of these characters: what is no YAML error is itself as a text, or a number."""
    for size in (1, 2, 3):
        for letters in itertools.product("0179.-+eExo_:~=ny", repeat=size):
            text = "".join(letters)
            try:
                value = parse_yaml(text)
            except YamlError:
                continue
            if text == "~":
                assert value is None
                continue
            if not isinstance(value, str):  # "- x" and "x:" are YAML's own
                assert ":" in text or text.startswith("-") or text == "~"
                continue
            assert value == text
            read = resolve_scalars(value)
            if isinstance(read, str):
                assert read == text
            elif isinstance(read, int) and "x" not in text and "o" not in text and "e" not in text.lower():
                assert read == int(text, 10) and "_" not in text
            else:
                assert math.isclose(read, float(int(text, 0) if set(text) & set("xo") else float(text)))


def test_bytes_of_no_encoding_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        decode(b"\xff")


def test_what_stands_twice_is_written_twice():
    shared = [{"name": "toy"}]
    text = dump_yaml({"base": shared, "top": shared})
    assert "id001" not in text and parse_yaml(text) == {"base": shared, "top": shared}
