"""The command on other programs' files: every family there and back, options, what is told and what is refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.models.tiny_dit import tiny_dit, tiny_mup_dit
from helpers.models.tiny_mmdit import tiny_mmdit, tiny_mup_mmdit
from helpers.models.tiny_pixart import tiny_mup_pixart, tiny_pixart
from helpers.models.tiny_uvit import tiny_uvit
from helpers.models.weights import randomize
from helpers.owners import leave_owner, parent
from megadit.checkpoint.compatibility import check_initial_weights, check_shapes, shapes_of
from megadit.checkpoint.find import load_model
from megadit.checkpoint.read import StoredCheckpoint
from megadit.cli import convert_checkpoint, sample
from megadit.config import ModelConfig, save_config
from megadit.config.schema.model import RepaConfig
from megadit.convert.conversion import ConversionResult, convert
from megadit.convert.defaults import default_run
from megadit.convert.diffusers import difference
from megadit.convert.diffusers import folder as diffusers_folder
from megadit.convert.diffusers.difference import Difference
from megadit.errors import UserError
from megadit.models import build_model
from megadit.models.pixart.convert import NULL_CAPTION
from megadit.mup.example import example_conditioning, example_images
from megadit.train.resume import check_weights_start

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """A tiny model and what its official checkpoint needs to be told."""

    model: ModelConfig
    hints: dict[str, Any] = field(default_factory=dict)


SP = {
    "dit": Case(tiny_dit(), {"heads": 2}),
    "pixart": Case(tiny_pixart(), {"heads": 2}),
    "uvit": Case(tiny_uvit("class"), {"heads": 2}),
    "mmdit": Case(tiny_mmdit(pooled=12), {"heads": 2, "input_size": 8}),
}
MUP = {
    "dit": Case(tiny_mup_dit(64, output_mult=3.0), {"heads": 4}),
    "pixart": Case(tiny_mup_pixart(64, output_mult=3.0), {"heads": 4}),
    "mmdit": Case(tiny_mup_mmdit(64, pooled=12, output_mult=3.0), {"heads": 4, "input_size": 8}),
}


def make_run(folder: Path, model: ModelConfig, **sections: Any) -> Path:
    """A run directory whose latest checkpoint holds random weights of ``model``; PixArt's null caption is its own."""
    built = build_model(model)
    randomize(built)
    state = {name: value.detach().clone() for name, value in built.state_dict().items()}
    if NULL_CAPTION in state:
        state[NULL_CAPTION] += 1.0
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "made.safetensors")
    convert("safetensors", "megadit", folder / "made.safetensors", folder / "run", default_run(model, (), sections))
    return folder / "run"


def output(run: Path) -> Tensor:
    """What the run's model gives for fixed inputs."""
    config, model = load_model(run)
    x, cond = example_images(config.model, range(2)), example_conditioning(config.model, range(2))
    with torch.no_grad():
        prediction: Tensor = model(x, torch.tensor([3.0, 700.0]), cond)
    return prediction


def weights(run: Path) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in load_model(run)[1].named_parameters()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder / name, case.model) for name, case in SP.items()}


@pytest.mark.parametrize("family", SP)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_official_there_and_back_is_bit_exact(runs: dict[str, Path], tmp_path: Path, family: str, ending: str) -> None:
    kind, file = f"official-{family}", tmp_path / f"x.{ending}"
    convert("megadit", kind, runs[family], file)
    back = convert(kind, "megadit", file, tmp_path / "back", hints=SP[family].hints, overrides=["data.vae=null"])
    assert any("the rest are defaults" in note for note in back.notes)
    before, after = weights(runs[family]), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    given = default_run(SP[family].model)
    convert(kind, "megadit", file, tmp_path / "again", given)  # whose config stands for the hints
    assert load_model(tmp_path / "again")[0] == given
    if ending == "pt":
        stored = torch.load(file, weights_only=True)
        assert (list(stored) == ["state_dict"]) == (family == "pixart")
    if family == "pixart":
        from megadit.data.conditions import NULL_TEXT_FILE, load_conditions

        captions = [load_conditions(run / NULL_TEXT_FILE)[0].text for run in (runs[family], tmp_path / "back")]
        assert captions[0] is not None and captions[1] is not None and torch.equal(captions[0], captions[1])


def test_a_converted_run_draws_and_begins_another(tmp_path: Path) -> None:
    model = tiny_dit(in_channels=1, learn_sigma=False)
    convert("megadit", "official-dit", make_run(tmp_path / "made", model), tmp_path / "x.pt")
    changes = ["objective.kind=flow", "data.name=digits", "sample.count=3", "sample.steps=2"]
    convert("official-dit", "megadit", tmp_path / "x.pt", tmp_path / "run", hints={"heads": 2}, overrides=changes)
    assert sample.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/samples/sample.png").is_file()
    config, _ = load_model(tmp_path / "run")
    train = config.train.model_copy(update={"init_from": str(tmp_path / "run")})
    checkpoint = check_weights_start(config.model_copy(update={"train": train}))
    assert checkpoint is not None and checkpoint.parent.parent == tmp_path / "run"
    projector = RepaConfig(block=1, feature_dim=8, hidden=16)
    with_projector = config.model_copy(update={"train": train, "model": model.model_copy(update={"repa": projector})})
    assert check_weights_start(with_projector) == checkpoint
    stored = StoredCheckpoint(checkpoint)
    assert "starts afresh" in str(check_initial_weights(stored, shapes_of(with_projector)))
    assert check_initial_weights(stored, shapes_of(config)) is None
    with pytest.raises(UserError, match=r"repa\.fc1"):
        check_shapes(stored, shapes_of(with_projector))
    with pytest.raises(UserError, match="the model needs"):
        check_initial_weights(stored, shapes_of(config.model_copy(update={"model": tiny_dit(in_channels=1, depth=3)})))


@pytest.mark.parametrize("family", MUP)
def test_a_mup_model_goes_out_with_its_multiplier_folded(tmp_path: Path, family: str) -> None:
    run = make_run(tmp_path, MUP[family].model)
    outcome = convert("megadit", f"official-{family}", run, tmp_path / "x.pth")
    assert any("multiplier 1.5 is in its weight now" in note for note in outcome.notes)
    # which its weights do not tell
    length = ["model.text.max_length=5", "model.text.mask=true"] if family == "mmdit" else []
    kind, hints = f"official-{family}", MUP[family].hints
    convert(kind, "megadit", tmp_path / "x.pth", tmp_path / "back", hints=hints, overrides=length)
    torch.testing.assert_close(output(tmp_path / "back"), output(run), rtol=0, atol=2e-6)
    with pytest.raises(
        UserError, match=r"model.parametrization is sp in the file and mup in --config.*--hint parametr"
    ):
        convert(kind, "megadit", tmp_path / "x.pth", tmp_path / "no", default_run(MUP[family].model))


@pytest.mark.parametrize("family", ["dit", "pixart", "mmdit"])
def test_diffusers_there_and_back(runs: dict[str, Path], tmp_path: Path, family: str, monkeypatch: Any) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers_folder, "SHARD_BYTES", 100_000)
    allowed = {"allow_inexact": family == "dit"}
    out = convert("megadit", "diffusers", runs[family], tmp_path / "out", **allowed)
    assert (tmp_path / "out/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    config = default_run(SP[family].model)
    back = convert("diffusers", "megadit", tmp_path / "out", tmp_path / "back", config, **allowed)
    assert out.difference is not None and back.difference == out.difference
    assert out.difference.small == (family != "dit") and (out.difference.reason is None) == (family != "dit")
    before, after = weights(runs[family]), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    convert("diffusers", "safetensors", tmp_path / "out/transformer", tmp_path / "x.safetensors", **allowed)
    convert("safetensors", "megadit", tmp_path / "x.safetensors", tmp_path / "bare")  # which tells its model
    assert torch.equal(next(iter(weights(tmp_path / "bare").values())), next(iter(before.values())))
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert index["scheduler"][1] == scheduler["_class_name"]
    notes = " ".join(out.notes)
    assert f"{index['_class_name']}.from_pretrained(OUT, " in notes and "vae=…" in notes
    if family == "pixart":
        null = load_file(tmp_path / "out/null_caption.safetensors")["null_caption"]
        assert null.shape == (7, 20) and null.mean() > 0.9 and "negative_prompt_embeds" in notes


def test_a_pipeline_loads_and_draws(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)  # factor 1
    vae.save_pretrained(tmp_path / "vae")
    run = make_run(tmp_path, tiny_dit(), data={"vae": {"path": str(tmp_path / "vae")}})
    (run / "classes.json").write_text(json.dumps([f"class {label}" for label in range(10)]))
    out = convert("megadit", "diffusers", run, tmp_path / "out", allow_inexact=True)
    assert any("label 1000 as the null one and this model has 10 classes" in note for note in out.notes)
    assert (tmp_path / "out/vae/config.json").is_file()
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels["class 3"] == 3 and type(pipe.scheduler).__name__ == "DDIMScheduler"
    images = pipe(class_labels=[3], num_inference_steps=2, guidance_scale=1.0, output_type="np").images
    assert images.shape[0] == 1
    convert("diffusers", "megadit", tmp_path / "out", tmp_path / "back", allow_inexact=True)
    config, _ = load_model(tmp_path / "back")
    assert config.data.vae is not None and config.data.vae.path == str((tmp_path / "out/vae").resolve())
    assert json.loads((tmp_path / "back/classes.json").read_text())[3] == "class 3"


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"kind": "ddpm", "prediction": "v"}, {"_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.02}),
        ({"kind": "flow", "shift": 3.0}, {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}),
    ],
    ids=["v", "flow"],
)
def test_the_scheduler_is_that_of_the_objective(
    tmp_path: Path, monkeypatch: Any, objective: dict[str, Any], expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(diffusers_folder, "measure", lambda *values: Difference(0.0, 0.0, 1.0, None))
    run = make_run(tmp_path, tiny_pixart(learn_sigma=False), objective=objective)
    convert("megadit", "diffusers", run, tmp_path / "out")
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert scheduler.items() >= expected.items()
    convert("diffusers", "megadit", tmp_path / "out", tmp_path / "back")
    assert load_model(tmp_path / "back")[0].objective == load_model(run)[0].objective


@pytest.mark.parametrize("model", [tiny_dit(learn_sigma=False), tiny_pixart(learn_sigma=False)], ids=["dit", "pixart"])
def test_a_pipeline_of_a_flow_draws_and_old_ones_still_come_in(tmp_path: Path, monkeypatch: Any, model: Any) -> None:
    """Both pipelines raise AttributeError with FlowMatchEulerDiscreteScheduler, which earlier exports had."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(diffusers_folder, "measure", lambda *values: Difference(0.0, 0.0, 1.0, None))
    flow = {"kind": "flow", "shift": 3.0}
    run, out = make_run(tmp_path, model, objective=flow), tmp_path / "out"
    notes = convert("megadit", "diffusers", run, out, allow_inexact=True)
    assert any("cannot run FlowMatchEulerDiscreteScheduler" in note for note in notes.notes)
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    if model.family == "dit":
        pipe = diffusers.DiTPipeline.from_pretrained(out, vae=vae)
        call: dict[str, Any] = {"class_labels": [3], "guidance_scale": 1.0}
    else:
        pipe = diffusers.PixArtAlphaPipeline.from_pretrained(out, vae=vae, tokenizer=None, text_encoder=None)
        text = {"embeds": torch.randn(1, 7, 20), "attention_mask": torch.ones(1, 7)}
        call = {f"{sign}prompt_{key}": value for sign in ("", "negative_") for key, value in text.items()}
        call |= {"negative_prompt": None, "use_resolution_binning": False, "height": 8, "width": 8}
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe(**call, num_inference_steps=2, output_type="np").images) == 1
    stored = out / "scheduler/scheduler_config.json"
    for older in (None, {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}):
        if older is not None:
            stored.write_text(json.dumps(older))
            index = json.loads((out / "model_index.json").read_text())
            index["scheduler"][1] = older["_class_name"]
            (out / "model_index.json").write_text(json.dumps(index))
        back = convert("diffusers", "megadit", out, tmp_path / f"back{older is None}", allow_inexact=True)
        assert load_model(Path(back.target))[0].objective == load_model(run)[0].objective
        assert not any("of its scheduler" in note for note in back.notes)


def test_wrappings_prefixes_and_averages(runs: dict[str, Path], tmp_path: Path) -> None:
    convert("megadit", "official-dit", runs["dit"], tmp_path / "plain.pt")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    model = {f"_orig_mod.module.{name}": value.bfloat16() for name, value in state.items()}
    ema = {name: value + 1 for name, value in state.items() if name != "pos_embed"} | {"pos_embed": state["pos_embed"]}
    stored = {"model": model, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4), "step": 5}
    torch.save(stored, tmp_path / "train.pt")

    def back(name: str, **options: Any) -> ConversionResult:
        return convert("official-dit", "megadit", tmp_path / "train.pt", tmp_path / name, hints={"heads": 2}, **options)

    notes = " ".join(back("online").notes)
    assert "under 'model' are taken; --ema ema takes those under 'ema'" in notes and "bfloat16" in notes
    assert "'_orig_mod.' before all names" in notes and "'module.' before all names" in notes
    back("average", ema="ema")
    before, after = weights(runs["dit"]), weights(tmp_path / "average")
    assert all(torch.equal(before[name] + 1, after[name]) for name in before)
    with pytest.raises(UserError, match="--ema: slow is not in .* its weights stand under ema, model"):
        back("no", ema="slow")
    torch.save({"opt": {}, "step": 5}, tmp_path / "train.pt")
    with pytest.raises(UserError, match="holds opt, step and no weights by name"):
        back("no")
    assert not (tmp_path / "no").exists()


def test_safetensors_rebuild_the_model_alone(runs: dict[str, Path], tmp_path: Path) -> None:
    for family in ("pixart", "uvit"):
        convert("megadit", "safetensors", runs[family], tmp_path / f"{family}.safetensors")
        back = tmp_path / f"back-{family}"
        convert("safetensors", "megadit", tmp_path / f"{family}.safetensors", back)
        assert load_model(back)[0] == load_model(runs[family])[0]
        before, after = weights(runs[family]), weights(back)
        assert all(torch.equal(before[name], after[name]) for name in before)
    config, model = load_model(runs["pixart"])
    model.load_state_dict(load_file(tmp_path / "pixart.safetensors"))
    save_file(load_file(tmp_path / "pixart.safetensors"), tmp_path / "bare.safetensors")  # without our metadata
    with pytest.raises(UserError, match="--config: is needed"):
        convert("safetensors", "official-pixart", tmp_path / "bare.safetensors", tmp_path / "x.pt")
    convert("safetensors", "official-pixart", tmp_path / "bare.safetensors", tmp_path / "x.pt", config)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("official-pixart", {}, "is not an official PixArt checkpoint: it has no "),
        ("official-dit", {}, "--hint heads: is needed"),
        ("official-dit", {"hints": {"heads": 3}}, "model.heads is 3 in the file and 2 in --config"),
        ("official-dit", {"width": 64}, "model.width is 48 in the file and 64 in --config"),
        ("official-dit", {"num_classes": 7}, "model.num_classes is 10 in the file and 7 in --config"),
        ("official-dit", {"qk_norm": "rms"}, "model.qk_norm is none in the file and rms in --config"),
        ("diffusers", {}, "model.dit.pt' is a file, and diffusers keeps a model in a folder"),
        ("safetensors", {"hints": {"heads": 2}}, "--hint heads: is for official checkpoints"),
    ],
)
def test_files_and_configs_of_other_models_are_refused(
    runs: dict[str, Path], tmp_path: Path, kind: str, options: dict[str, Any], words: str
) -> None:
    convert("megadit", "official-dit", runs["dit"], tmp_path / "model.dit.pt")
    hints = options.pop("hints", {})
    given = default_run(tiny_dit(**options)) if options or hints else None
    with pytest.raises(UserError, match=words):
        convert(kind, "megadit", tmp_path / "model.dit.pt", tmp_path / "out", given, hints=hints)
    assert [path.name for path in tmp_path.iterdir()] == ["model.dit.pt"]


def test_broken_files_and_wrong_targets_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for ending in ("pt", "safetensors"):
        file = tmp_path / f"x.{ending}"
        convert("megadit", "official-dit", runs["dit"], file)
        cut_short(file)
        with pytest.raises(UserError, match=f"x.{ending}: cannot be read as "):
            convert("official-dit", "megadit", file, tmp_path / "out")
    torch.save({"state_dict": {}, "hook": print}, tmp_path / "code.pt")
    with pytest.raises(UserError, match=r"holds an object of 'builtins.print', which is not data"):
        convert("official-dit", "megadit", tmp_path / "code.pt", tmp_path / "out")
    with pytest.raises(UserError, match="has none of the endings .pt, .pth, .safetensors"):
        convert("megadit", "official-dit", runs["dit"], tmp_path / "out")
    with pytest.raises(UserError, match="official-uvit is asked for, but the model is of family dit"):
        convert("megadit", "official-uvit", runs["dit"], tmp_path / "out.pt")
    with pytest.raises(UserError, match="model.family: uvit has no class in diffusers"):
        convert("megadit", "diffusers", runs["uvit"], tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("out", ".tmp"))]


def test_an_untrained_model_shows_no_difference_and_that_is_told(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    config = tiny_dit()
    save_file(build_model(config).state_dict(), tmp_path / "x.safetensors")  # whose readout is zero
    with pytest.raises(UserError, match="half - 1 .* not measurable, since these weights, as of an untrained model"):
        convert("safetensors", "diffusers", tmp_path / "x.safetensors", tmp_path / "out", default_run(config))


def test_models_too_large_to_compare_are_told_so(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(difference.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e5))
    with pytest.raises(UserError, match="half - 1 in place of half; not measured, since a model of it takes"):
        convert("megadit", "diffusers", runs["dit"], tmp_path / "out")
    outcome = convert("megadit", "diffusers", runs["pixart"], tmp_path / "out")
    assert outcome.difference is None and "computes the same: not measured" in " ".join(outcome.notes)


def test_a_class_that_should_be_equal_and_is_not_is_refused(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(diffusers_folder, "measure", lambda *values: Difference(1e-3, 1e-3, 1.0, None))
    with pytest.raises(UserError, match="PixArtTransformer2DModel should compute the same as this model and does not"):
        convert("megadit", "diffusers", runs["pixart"], tmp_path / "out", allow_inexact=True)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_a_class_that_differs_and_tells_by_how_much(
    runs: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    pytest.importorskip("diffusers")
    arguments = ["--from", "megadit", "--to", "diffusers", str(runs["dit"]), str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"half - 1 in place of half; largest difference .*--allow-inexact"):
        convert_checkpoint.main(arguments)
    assert not list(tmp_path.iterdir())
    assert convert_checkpoint.main([*arguments, "--allow-inexact", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["difference"]
    assert printed["maximum"] > 0.01 and printed["relative"] > 0.01 and "half - 1" in printed["reason"]


def test_the_command_takes_hints_and_overrides(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    convert("megadit", "official-dit", runs["dit"], tmp_path / "x.pt")
    arguments = ["--from", "official-dit", "--to", "megadit", str(tmp_path / "x.pt")]
    changes = ["data.vae=null", "sample.steps=3", "--hint", "heads=2"]
    assert convert_checkpoint.main([*arguments, str(tmp_path / "run"), *changes]) == 0
    assert load_model(tmp_path / "run")[0].sample.steps == 3
    save_config(default_run(SP["dit"].model), tmp_path / "config.yaml")
    given = ["--config", str(tmp_path / "config.yaml"), "train.steps=7"]
    assert convert_checkpoint.main([*arguments, str(tmp_path / "run2"), *given]) == 0
    assert load_model(tmp_path / "run2")[0].train.steps == 7
    with pytest.raises(UserError, match="--hint: 'heads' is not KEY=VALUE"):
        convert_checkpoint.main([*arguments, str(tmp_path / "run3"), "--hint", "heads"])
    with pytest.raises(UserError, match="model.width is 48 in the file and 64"):
        convert_checkpoint.main([*arguments, str(tmp_path / "run3"), "model.width=64", "--hint", "heads=2"])


def test_a_target_that_another_process_writes_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    owner = leave_owner(tmp_path, ".out.pt.owner.json", **parent())
    half = tmp_path / ".tmp-out.pt"
    half.write_bytes(b"of the other")
    with pytest.raises(UserError, match=f"OUT: '{tmp_path}/out.pt' is in use by process {owner.pid} on"):
        convert("megadit", "official-dit", runs["dit"], tmp_path / "out.pt")
    assert half.read_bytes() == b"of the other"
    convert("megadit", "official-dit", runs["dit"], tmp_path / "beside.pt")  # is another's business
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.pt.owner.json", ".tmp-out.pt", "beside.pt"]
