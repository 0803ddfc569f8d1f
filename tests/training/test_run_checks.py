"""Errors before the first step: what cannot be trained says so at once, by name and with the remedy."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import yaml
from source_recipes import sources, write_data, write_source_recipe
from tiny_recipes import TRAINING

from fwd2bot import Fwd2BotProcessor
from fwd2bot.training import sharding
from fwd2bot.training.check import check
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.run_checks import check_folder, write_whole
from fwd2bot.training.sources import UnusableRowsError
from fwd2bot.training.train import build_trainer, main, train, training_arguments
from fwd2bot.training.trainer import INCOMPLETE

MODEL = {"backbone": "nowhere", "lora_rank": 4, "num_summary_tokens": 4, "summary_lengths": [1, 2, 4]}


def recipe_file(folder, **sections):
    values = {"kind": "fwd2bot", "model": MODEL, "training": TRAINING | {"output_dir": str(folder / "run")}} | sections
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("key", ["backbone", "init_from"])
@pytest.mark.parametrize("name", ["nowhere", "runs/nowhere/final", "./nowhere"])
def test_misspelt_folder_of_a_model_ends_the_command_at_once(tmp_path, key, name):
    for recipe, options in ((recipe_file(tmp_path), []), (write_source_recipe(tmp_path, tmp_path / "s"), ["--check"])):
        with pytest.raises(SystemExit) as ended:
            main([str(recipe), f"model.{key}={name}", *options])
        assert f"There is no folder '{name}', and an id on the Hub has the form owner/name." in ended.value.code


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("contrastive.chunk_size=5", "chunk_size is 5, but a batch has .*batch_size=4.*or null"),
        ("contrastive.chunk_size=0", "chunk_size is 0; give 1 or more"),
        ("contrastive.loss=siglip", "contrastive.loss is 'siglip'; choose one of infonce, sigmoid"),
        ("contrastive.gatter=true", "unknown key gatter in contrastive"),
        ("model.dtype=fp16", "model.dtype is 'fp16'; choose one of float32, bfloat16, float16"),
        ("model.quantization=2bit", "model.quantization is '2bit'; choose one of 4bit, 8bit, null"),
        ("contrastive.final_weight=-1", "contrastive.final_weight is -1.*; give 0 or more, or null"),
        ("optimizer.learning_rates={query: 0.1}", "unknown key query .*allowed are adapters, queries"),
        ("model.config={contrastive_loss: sigmoid}", "set contrastive.loss instead"),
        ("training.label_smoothing_factor=0.1", "label_smoothing_factor is 0.1, which the losses of a Fwd2Bot do not"),
        ("resume=perhaps", "resume is 'perhaps'; use true, false or anyway"),
    ],
)
def test_setting_that_cannot_be_is_named(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe_file(tmp_path), [override]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=4bit", "model.train_connector=true"], "would lose the connector"),
        (["model.quantization=4bit", "model.compile_layers=true"], "was not tried on quantised layers"),
        (["model.trained_stage=generate", "model.init_from=x", "contrastive.loss=sigmoid"], "loss has no effect"),
        (["model.trained_stage=generate", "model.init_from=x", "contrastive.final_weight=1"], "weight has no effect"),
        (["model.train_connector=true", "model.dtype=bfloat16"], "training.bf16=true"),
        (["model.adapters={r: 4}", "model.init_from=x"], "those of model.init_from"),
        (["model.trained_stage=generate", "model.init_from=x", "model.train_connector=true"], "both stages"),
    ],
)
def test_settings_that_cannot_be_together_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe_file(tmp_path), overrides))


@pytest.fixture
def fsdp2(monkeypatch):
    """The environment that `accelerate launch` gives a process of FSDP2, and nothing kept from another test."""
    monkeypatch.setattr(sharding, "_taken_over", None)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


@pytest.mark.parametrize(
    ("setting", "environment", "message"),
    [
        ("model.quantization=4bit", {}, "model.quantization cannot be with FSDP2; start the run with ddp.yaml"),
        ("model.train_connector=true", {}, "model.train_connector cannot be with FSDP2"),
        ("model.compile_layers=true", {}, "model.compile_layers cannot be with FSDP2"),
        ("model.lora_rank=2", {"FSDP_VERSION": "1"}, "has fsdp_version 1; choose 2"),
        ("model.lora_rank=2", {"FSDP_OFFLOAD_PARAMS": "true"}, "has fsdp_offload_params, which is not supported"),
        ("model.lora_rank=2", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set it in the recipe, under training"),
    ],
)
def test_setting_that_cannot_be_with_fsdp2_is_named(tmp_path, fsdp2, monkeypatch, setting, environment, message):
    """As `accelerate launch` would ask for it; what it asks is read from its environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe_file(tmp_path), [setting]))


@pytest.fixture
def with_connector(tmp_path):
    """A Fwd2Bot that was trained with its connector, as it lies on a disk."""
    folder = tmp_path / "connector"
    tiny.tiny_fwd2bot(train_connector=True).save_pretrained(folder)
    Fwd2BotProcessor(tiny.tiny_backbone_processor()).save_pretrained(folder)
    return f"model.init_from={folder}"


def test_fwd2bot_with_a_trained_connector_is_not_gone_on_with_under_fsdp2(tmp_path, fsdp2, with_connector):
    with pytest.raises(ValueError, match="was trained with train_connector, which cannot be with FSDP2.*ddp.yaml"):
        build_trainer(load_recipe(write_source_recipe(tmp_path, tmp_path / "run"), [with_connector]))


def test_divided_run_goes_on_with_a_fwd2bot_that_knows_its_backbone(tmp_path, fsdp2):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path / "before")
    Fwd2BotProcessor(tiny.tiny_backbone_processor()).save_pretrained(tmp_path / "before")
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match="does not say which backbone is in it.*backbone_name_or_path=FOLDER"):
        build_trainer(load_recipe(recipe, [f"model.init_from={tmp_path / 'before'}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.quantization=4bit", "train_connector, which cannot be with model.quantization.*leave that out"),
        ("model.dtype=bfloat16", "of model.init_from, trains the connector in float32.*training.bf16=true"),
    ],
)
def test_setting_that_cannot_be_with_a_trained_connector_is_named(tmp_path, with_connector, override, message):
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe, [with_connector, override]))
    assert build_trainer(load_recipe(recipe, [with_connector])).model.config.train_connector


@pytest.mark.parametrize(("launched", "own"), [("bf16", "no"), ("fp16", "bf16"), ("fp8", "no")])
def test_other_precision_of_the_launcher_is_named(tmp_path, monkeypatch, launched, own):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    overrides = [] if own == "no" else [f"training.{own}=true"]
    recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / "run"), overrides)
    for begin in (build_trainer, check):
        with pytest.raises(ValueError, match=f"has mixed_precision {launched} .*the recipe has {own}. Leave it out"):
            begin(recipe)


@pytest.mark.parametrize("launched", ["no", "bf16"])
def test_same_precision_of_the_launcher_is_taken(monkeypatch, launched):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert training_arguments({"use_cpu": True, "bf16": True}).mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.bf16=true", "training.use_cpu=false"], "torch finds none.*set training.use_cpu=true"),
        (["training.fp16=true"], "training.fp16 has no effect on a CPU"),
    ],
)
def test_precision_that_the_machine_does_not_have_is_named(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        build_trainer(load_recipe(recipe_file(tmp_path), overrides))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ZERO_STAGE", "2", "has zero_stage 2; choose 3, as accelerate/zero3.yaml"),
        ("OFFLOAD_PARAM_DEVICE", "cpu", "has offload_param_device cpu for DeepSpeed, which is not supported"),
        ("CONFIG_FILE", "ds.json", "has config_file ds.json for DeepSpeed, which is not supported"),
    ],
)
def test_what_deepspeed_is_not_used_for_is_refused_by_name(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    with pytest.raises(SystemExit, match=f"^error: the accelerate configuration {message}"):
        main([str(recipe_file(tmp_path))])


def test_missing_deepspeed_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("fwd2bot.training.zero3.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^error: zero3.yaml needs DeepSpeed: pip install 'fwd2bot\[deepspeed\]'"):
        main([str(recipe_file(tmp_path))])


def test_plain_backbone_is_not_trained_with_fsdp2(tmp_path, fsdp2):
    for _ in range(2):  # the second run of the process is one of FSDP2 as well
        with pytest.raises(ValueError, match="kind: backbone trains all it has. Start it with ddp.yaml"):
            build_trainer(load_recipe(recipe_file(tmp_path, kind="backbone", model={})))


def test_what_the_launcher_asks_of_fsdp_is_kept_for_all_runs_of_the_process(fsdp2):
    first = sharding.take_over_sharding()
    assert first == sharding.Sharding("FSDP2") and first.configuration == "fsdp2.yaml"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert sharding.take_over_sharding() is first


def test_run_of_whole_checkpoints_is_not_gone_on_with_under_fsdp2(tmp_path, request):
    recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / "run", max_steps=2))
    train(recipe)
    request.getfixturevalue("fsdp2")
    with pytest.raises(ValueError, match="checkpoint-2 has the whole backbone.*as it was begun"):
        build_trainer(recipe)


def test_contrastive_section_of_a_plain_backbone_is_unknown(tmp_path):
    with pytest.raises(ValueError, match="unknown key contrastive"):
        load_recipe(recipe_file(tmp_path, kind="backbone", model={}, contrastive={"chunk_size": 2}))


def test_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output_dir is .*file/run', which cannot be written.*Choose another"):
        check_folder(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_folder_without_write_permission_is_named(tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    with pytest.raises(OSError, match="cannot be written"):
        check_folder(tmp_path / "run")


def test_command_names_a_folder_that_cannot_be_written_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^error: training.output_dir"):
        main([str(recipe_file(tmp_path)), f"training.output_dir={tmp_path / 'file' / 'run'}"])


def test_check_names_a_folder_that_the_run_could_not_write_and_makes_none(tmp_path):
    (tmp_path / "file").touch()
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    with pytest.raises(OSError, match="output_dir is .*file/run', which cannot be written"):
        check(load_recipe(recipe, [f"training.output_dir={tmp_path / 'file' / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_check_names_a_run_that_was_begun_with_another_recipe_and_leaves_it_as_it_is(tmp_path):
    recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / "run", max_steps=2))
    train(recipe)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    (tmp_path / "run" / "checkpoint-1" / INCOMPLETE).touch()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    recipe.data.seed = 7
    with pytest.raises(ValueError, match="data.seed was 0 and is 7"):
        check(recipe)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_file_whose_writing_fails_is_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    write_whole(path, json.dumps({"seed": 1}))
    written = Path.write_text

    def fail_midway(self, text, **options):
        written(self, text[:4], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", fail_midway)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, json.dumps({"seed": 2}))
    assert json.loads(path.read_text()) == {"seed": 1}


def test_sampling_that_the_mixture_does_not_do_is_named(tmp_path):
    recipe = write_source_recipe(tmp_path, tmp_path / "run", train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="train_sampling_strategy is group_by_length, but the order of samples"):
        build_trainer(load_recipe(recipe))


@pytest.mark.parametrize("broken", ["no picture is there", "no row names one"])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_without_pictures_are_an_error_before_the_first_step(tmp_path, broken, streaming):
    """Also of a source that the first batches would not draw from."""
    write_data(tmp_path)
    rare = sources(tmp_path)[1] | {"name": "rare", "weight": 1e-6, "streaming": streaming}
    if broken == "no picture is there":
        rare["images"] = str(tmp_path)
    else:
        rare["path"] = str(tmp_path / "rare.jsonl")
        (tmp_path / "rare.jsonl").write_text('{"image": null, "captions": ["a dog"]}\n' * 3)
    sections = {"data": {"sources": [*sources(tmp_path), rare]}}
    recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / "run", sections))
    with pytest.raises(UnusableRowsError, match=r"\['rare'\]: none of \d+ rows can be used: .* are broken"):
        build_trainer(recipe)


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_not_there_are_one_line_from_the_command(tmp_path, workers):
    recipe = write_source_recipe(tmp_path, tmp_path / "run", dataloader_num_workers=workers)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([str(recipe)])
    assert str(ended.value.code).startswith("error: data.sources[") and "is not there" in ended.value.code
    assert "Traceback" not in ended.value.code and "\n" not in ended.value.code


def test_ctrl_c_in_training_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fwd2bot.training.train.run", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([str(write_source_recipe(tmp_path, tmp_path / "run"))])
    assert ended.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
