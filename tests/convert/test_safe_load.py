"""Files of other programs are data: whatever would run when loaded is refused, and broken ones are told."""

import argparse
import datetime
import json
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from helpers.foreign.deepspeed_program import CONFIG
from helpers.foreign.official_releases import release
from megadit.cli import convert_checkpoint
from megadit.convert import formats
from megadit.convert.contents import Contents
from megadit.convert.conversion import convert, reader_and_writer
from megadit.convert.deferred import loaded
from megadit.convert.request import new_target
from megadit.convert.torch_files.placeholders import Placeholder
from megadit.convert.torch_files.safe_load import load_deferred, load_file
from megadit.errors import UserError
from megadit.models import build_model

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


class Foreign:
    """An object of a class that is nobody's business here."""


def weights():
    return OrderedDict(build_model(CONFIG.model, seed=5).state_dict())


def test_nothing_in_a_file_is_run(tmp_path):
    trace = tmp_path / "trace"
    model = {"module": weights(), "global_steps": 1, "client": Evil(trace)}
    (tmp_path / "ds").mkdir()
    torch.save(model, tmp_path / "ds" / "mp_rank_00_model_states.pt")
    torch.save({"w": torch.ones(2), "x": Evil(trace)}, tmp_path / "w.bin")
    torch.save(Evil(trace), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for kind, source in (("deepspeed", "ds"), ("fp32-state-dict", "w.bin"), ("fp32-state-dict", "old.pt")):
        with pytest.raises(UserError, match=r"holds an object of '(posix|nt).system', which is not data"):
            convert(kind, "megadit", tmp_path / source, tmp_path / "run", CONFIG)
    torch.save({"w": torch.ones(2), "x": Foreign()}, tmp_path / "w.bin")
    with pytest.raises(UserError, match=r"object of '[\w.]*Foreign'"):
        load_file(tmp_path / "w.bin")
    assert not trace.exists() and not (tmp_path / "run").exists()
    torch.load(tmp_path / "old.pt", weights_only=False)  # the trap does work
    assert trace.exists()


def test_deepspeeds_own_objects_become_plain_ones(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    scaler = DynamicLossScaler(1024.0, 2.0, 1000, 1.0, 2, False)
    torch.save([ZeroStageEnum.weights, fragment_address(numel=4, start=2), scaler], tmp_path / "x.pt")
    stage, address, loaded = load_file(tmp_path / "x.pt")
    assert stage == 3 and not isinstance(stage, ZeroStageEnum)
    assert vars(address) == {"numel": 4, "start": 2} and type(address) is type(loaded)
    assert loaded.cur_scale == 1024.0 and not isinstance(loaded, DynamicLossScaler)


def foreign_class(name, base=object):
    """A class that a file names as ``name`` and that is there while the file is written alone."""
    module, _, last = name.rpartition(".")
    parts = module.split(".")
    for module_name in (".".join(parts[: count + 1]) for count in range(len(parts))):
        sys.modules.setdefault(module_name, types.ModuleType(module_name))
    made = type(last, (base,), {"__module__": module})
    setattr(sys.modules[module], last, made)
    return made


def saved(path, value, **options):
    """``torch.save``, after which nothing that it made up can be imported any more."""
    before = {name for name in sys.modules if name.partition(".")[0] in INVENTED}
    torch.save(value, path, **options)
    assert before
    for name in before:
        del sys.modules[name]


INVENTED = ("omegaconf", "ml_collections", "pytorch_lightning", "easydict", "models")
SETTINGS = {
    "omegaconf.dictconfig.DictConfig": (object, {"_content": {"lr": 1e-4}, "_metadata": dict}),
    "ml_collections.config_dict.config_dict.ConfigDict": (object, {"_fields": {"lr": 1e-4}}),
    "pytorch_lightning.utilities.parsing.AttributeDict": (dict, {"lr": 1e-4}),
    "easydict.EasyDict": (dict, {"lr": 1e-4}),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_trainers_do_not_stand_in_the_way(tmp_path, name, legacy):
    base, content = SETTINGS[name]
    made = foreign_class(name, base)()
    made.update(content) if base is dict else made.__dict__.update(content)
    value = {"state_dict": {"w": torch.ones(2)}, "hyper_parameters": made}
    saved(tmp_path / "x.ckpt", value, _use_new_zipfile_serialization=not legacy)
    loaded = load_file(tmp_path / "x.ckpt")
    assert torch.equal(loaded["state_dict"]["w"], torch.ones(2))
    read = loaded["hyper_parameters"]
    assert (dict(read) if base is dict else vars(read)).keys() == content.keys()
    assert name.rpartition(".")[0] not in sys.modules


def test_plain_objects_of_python_and_numpy_are_read(tmp_path):
    moment = datetime.datetime(2026, 11, 30, 7, 30)
    counts = defaultdict(int)
    counts["a"] = 3
    plain = {
        "args": argparse.Namespace(lr=1e-4, out=Path("a") / "b", since=moment),
        "step": np.int64(7),
        "loss": np.float32(0.5),
        "mean": np.zeros(3),
        "counts": counts,
        "recent": deque([1, 2], maxlen=5),
        "random": np.random.get_state(),
        "scheduler": torch.optim.lr_scheduler.LambdaLR.__new__(torch.optim.lr_scheduler.LambdaLR),
        "device": torch.device("cpu"),
        "size": torch.Size([2]),
    }
    torch.save(plain, tmp_path / "x.pt")
    loaded = load_file(tmp_path / "x.pt")
    assert (loaded["step"], loaded["loss"]) == (7, 0.5) and type(loaded["step"]) is int
    assert dict(loaded["counts"]) == {"a": 3} and loaded["recent"] == [1, 2]
    assert loaded["args"].lr == 1e-4 and type(loaded["args"]) is Placeholder and type(loaded["args"].out) is Placeholder


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 2)


def scripted(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def packed(path):
    """The torch file that a browser's download made a zip of."""
    torch.save({"w": torch.ones(2)}, path.with_name("w.pt"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("w.pt"), "DiT/w.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(Net(), path), "holds an object of '.*Net', .* whole model and .*model.state_dict"),
        (lambda path: torch.save({"model": Net(), "epoch": 3}, path), "Net', .*: the file holds a whole model"),
        (lambda path: torch.save(Net(), path, _use_new_zipfile_serialization=False), "Net', .* a whole model"),
        (
            lambda path: torch.save({"x": Foreign()}, path),
            "Foreign', which is not data .* save the weights alone: torch",
        ),
        (lambda path: torch.save({"w": torch.ones(2)}, path, pickle_protocol=4), "is pickled by another protocol"),
        (scripted, "is a program of TorchScript and not weights; .* save its state_dict"),
        (packed, "it is a zip archive; unpack it first"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run `git lfs pull`"),
        (lambda path: path.write_bytes(b"<html><body>Sign in"), r"it is a web page \(HTML\)"),
        (lambda path: path.write_bytes(b""), "it is an empty file"),
        (lambda path: path.write_bytes(bytes(5000)), "it is a file of zeros"),
        (lambda path: path.write_bytes(pickle.dumps([1, 2], protocol=4)), "it is a pickle, which could run anything"),
        (lambda path: save_file({"w": torch.ones(2)}, path), "it is a safetensors file; name it .safetensors"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(20)), "it is a GGUF file of llama.cpp"),
    ],
)
def test_what_a_file_is_that_holds_no_tensors(tmp_path, write, message):
    write(tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt: .*{message}"):
        load_file(tmp_path / "x.pt")


@pytest.mark.parametrize("prefix", ["", "_forward_module.model._orig_mod."])
def test_the_dynamic_loss_scale_of_fp16_travels(tmp_path, prefix):
    """A file as fp16 training on a GPU writes it: one rank, one group, ZeRO-2; or as Lightning with DeepSpeed does."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    values = OrderedDict((f"{prefix}{name}", value) for name, value in weights().items())
    flat = torch.cat([value.flatten() for value in values.values()])
    scaler = DynamicLossScaler(4096.0, 2.0, 1000, 1.0, 2, False)
    scaler.cur_iter = 77
    shapes = OrderedDict((name, value.shape) for name, value in values.items())
    state = {"step": 5, "exp_avg": flat * 2, "exp_avg_sq": flat * flat}  # DeepSpeed's FusedAdam counts in an int
    zero = {
        "loss_scaler": scaler,
        "dynamic_loss_scale": True,
        "base_optimizer_state": {"state": {0: state}, "param_groups": [{"params": [0], "lr": 0.1}]},
        "single_partition_of_fp32_groups": [flat],
        "zero_stage": 2,
        "group_paddings": [0],
        "partition_count": [1],
    }
    model = {"module": values, "param_shapes": [shapes], "global_steps": 7, "skipped_steps": 2, "dp_world_size": 1}
    folder = tmp_path / "ds" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "ds" / "latest").write_text("global_step7")
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": zero}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    outcome = convert("deepspeed", "megadit", tmp_path / "ds", tmp_path / "run", CONFIG)
    assert ("'model.' before all names was left out" in outcome.notes) == bool(prefix)
    stored = json.loads((tmp_path / "run/checkpoints/step-00000007/state.json").read_text())
    assert stored["loss_scale"]["cur_scale"] == 4096.0 and stored["loss_scale"]["cur_iter"] == 77
    assert (stored["step"], stored["skipped_steps"], stored["adam_step"]) == (7, 2, 5)


def without_one():
    values = weights()
    values.pop("final_layer.linear.bias")
    return values


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (lambda: {"model": weights(), "ema": weights()}, "holds model, ema and not tensors by name"),
        (lambda: [1, 2], "holds list and not tensors by name"),
        (lambda: without_one(), "has no parameter 'final_layer.linear.bias', which the model needs"),
        (lambda: {**weights(), "head": torch.ones(1)}, "has a parameter 'head', which the model does not know"),
    ],
)
def test_a_file_of_something_else_is_told(tmp_path, values, reason):
    torch.save(values(), tmp_path / "x.bin")
    with pytest.raises(UserError, match=reason):
        convert("fp32-state-dict", "megadit", tmp_path / "x.bin", tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["itself", "doubled"])
def test_containers_that_hold_themselves_or_one_another_often_are_walked_once(tmp_path, kind):
    """Each of these is a small file; a walk through every path of it would not end."""
    value = {"model": release("dit", 1)}
    if kind == "itself":
        value["again"] = value
    else:
        for _ in range(60):
            value = {"model": value["model"], "a": [value, value], "b": value, "c": (value, value)}
    torch.save(value, tmp_path / "x.pt")
    outcome = convert("official-dit", "megadit", tmp_path / "x.pt", tmp_path / "run", hints={"heads": 2})
    assert outcome.notes[0].startswith("the weights under 'model' are taken")
    assert outcome.parameters == len(release("dit", 1)) - 1  # without the table of positions


@pytest.mark.parametrize(
    ("latest", "words"),
    [
        (
            None,
            r"has folders of checkpoints \(.*global_step7\), but its file 'latest' names none of them; give the one",
        ),
        ("global_step8", "names none of them; give the one that is meant"),
        ("../other/global_step7", r"latest' names '\.\./other/global_step7', outside of its folder; give the folder"),
        ("/global_step7", "latest' names '/global_step7', outside of its folder"),
        ("version https://git-lfs.github.com/spec/v1\n", "latest' is not what its name says: it is a git-LFS pointer"),
    ],
)
def test_a_latest_that_names_no_checkpoint_of_its_folder(tmp_path, latest, words):
    (tmp_path / "ds/global_step7").mkdir(parents=True)
    torch.save({"module": weights()}, tmp_path / "ds/global_step7/mp_rank_00_model_states.pt")
    shutil.copytree(tmp_path / "ds", tmp_path / "other")
    if latest is not None:
        (tmp_path / "ds/latest").write_text(latest)
    with pytest.raises(UserError, match=words):
        convert("deepspeed", "megadit", tmp_path / "ds", tmp_path / "run", CONFIG)


def zipped_anew(source, target):
    """The entries of a torch file, compressed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_a_file_that_was_zipped_anew_is_read_as_it_is_and_not_its_compressed_bytes(tmp_path):
    values = {**weights(), "zeros": torch.zeros(5000)}
    torch.save(values, tmp_path / "x.pt")
    zipped_anew(tmp_path / "x.pt", tmp_path / "anew.pt")
    assert (tmp_path / "anew.pt").stat().st_size < (tmp_path / "x.pt").stat().st_size
    for load in (load_file, load_deferred):
        values_back = load(tmp_path / "anew.pt")
        assert values_back.keys() == values.keys()
        assert all(torch.equal(loaded(values_back[name]), value) for name, value in values.items())
    torch.save({"zeros": torch.zeros(2_000_000)}, tmp_path / "x.pt")
    zipped_anew(tmp_path / "x.pt", tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=r"bomb.pt: is compressed, and its .* bytes would be 8,.*zip -0"):
        load_file(tmp_path / "bomb.pt")


def test_a_file_of_a_distributed_checkpoint_is_told_with_its_folder(tmp_path):
    (tmp_path / "__0_0.distcp").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(UserError, match=rf"its folder is a checkpoint of torch.*dcp_to_torch '{tmp_path}'"):
        load_file(tmp_path / "__0_0.distcp")


def test_prefixes_half_precision_and_whole_numbers(tmp_path):
    values = {f"module.{name}": value.bfloat16() for name, value in weights().items()}
    save_file({**values, "module.count": torch.ones(1, dtype=torch.int64)}, tmp_path / "x.safetensors")
    outcome = convert("safetensors", "megadit", tmp_path / "x.safetensors", tmp_path / "run", CONFIG)
    message = " ".join(outcome.notes)
    assert "'module.' before all names" in message and "bfloat16" in message and "whole numbers" in message


def test_shards_that_are_missing_or_unnamed_are_told(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "part-1.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "part-2.safetensors")
    with pytest.raises(UserError, match="several files .part-1.* and no index"):
        convert("safetensors", "fp32-state-dict", tmp_path, tmp_path / "out")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-3.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"part-3.safetensors: is missing, though model.safetensors.index.json names"):
        convert("safetensors", "fp32-state-dict", tmp_path, tmp_path / "out")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="is no index of shards"):
        convert("safetensors", "fp32-state-dict", tmp_path, tmp_path / "out")
    (tmp_path / "part-1.safetensors").write_bytes(b"\x10")
    with pytest.raises(UserError, match="part-1.safetensors: cannot be read as safetensors"):
        convert("safetensors", "fp32-state-dict", tmp_path / "part-1.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("safetensors", "megadit", "x.safetensors", "out"), "--config: is needed"),
        (("safetensors", "fp32-state-dict", "gone", "out"), "IN: .*gone' does not exist"),
        (("safetensors", "fp32-state-dict", "x.safetensors", "x.safetensors"), "OUT: .* exists already"),
        (("megadit", "megadit", "x.safetensors", "out"), "--to: megadit is what IN is already"),
        (("safetensors", "deepspeed-universal", "x.safetensors", "out"), "'a/../b' cannot be a folder"),
    ],
)
def test_bad_requests_are_told(tmp_path, arguments, reason):
    save_file({"a/../b": torch.ones(1)}, tmp_path / "x.safetensors")
    kinds, paths = arguments[:2], [tmp_path / name for name in arguments[2:]]
    with pytest.raises(UserError, match=reason):
        convert(*kinds, *paths)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    with pytest.raises(UserError, match="--ema: 0.9 is asked for, but safetensors holds no averages"):
        convert("safetensors", "fp32-state-dict", tmp_path / "x.safetensors", tmp_path / "out", ema="0.9")


def test_parts_must_cover_a_parameter():
    for parts in ([(0, torch.ones(3))], [(0, torch.ones(3)), (2, torch.ones(2))], [(1, torch.ones(3))]):
        contents = Contents("it", {"w": (2, 2)}, ("weights",), lambda kind, name, parts=parts: parts)
        with pytest.raises(UserError, match="weights of 'w' are not the 4 elements"):
            contents.tensor("weights", "w")


def test_a_failure_leaves_nothing_behind(tmp_path):
    with (
        pytest.raises(UserError, match="OUT: .*cannot be written .No space left"),
        new_target(tmp_path / "out") as path,
    ):
        path.mkdir()
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, capsys):
    assert all(callable(each) for name in formats() for each in reader_and_writer(name))
    save_file(weights(), tmp_path / "x.safetensors")
    arguments = ["--from", "safetensors", "--to", "fp32-state-dict", str(tmp_path / "x.safetensors")]
    assert convert_checkpoint.main([*arguments, str(tmp_path / "out.bin")]) == 0
    assert "31 parameters" in capsys.readouterr().out
    assert convert_checkpoint.main([*arguments, str(tmp_path / "out2.bin"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["parameters"] == 31 and printed["kinds"] == ["weights"]
    with pytest.raises(UserError, match="train.steps=3: changes a config, but there is no --config"):
        convert_checkpoint.main([*arguments, str(tmp_path / "out3.bin"), "train.steps=3"])
