"""What `--check` says of a run's memory: of the model without its weights, and of processes that divide them."""

import io
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import sharded_weights
import tiny
import torch
from rich.console import Console
from source_recipes import write_source_recipe

from fwd2bot import Fwd2BotProcessor
from fwd2bot.training.check import check
from fwd2bot.training.estimates import divided_weights, weights_of
from fwd2bot.training.fwd2bot_model import build_fwd2bot, outline_fwd2bot
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.sharding import FSDP2, ZERO3, Sharding
from fwd2bot.training.train import main, training_arguments

NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
LAYERS = (".language_model.layers.", ".encoder.layers.")


def described(model):
    return {name: (value.shape, value.dtype, value.requires_grad) for name, value in model.named_parameters()}


def of_divided_layers(name):
    return any(part in name for part in LAYERS) and ".lora_" not in name


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dtype=bfloat16", "model.adapters={compress: {r: 2}, generate: {r: 6, use_dora: true}}"],
        ["model.train_connector=true", "contrastive.loss=sigmoid"],
    ],
)
@pytest.mark.parametrize("trained_before", [False, True])
def test_outline_has_the_parameters_of_the_model(tmp_path, overrides, trained_before):
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    if trained_before:
        build_fwd2bot(load_recipe(recipe, overrides), training_arguments({"use_cpu": True}))[0].save_pretrained(
            tmp_path / "before"
        )
        Fwd2BotProcessor(tiny.tiny_backbone_processor()).save_pretrained(tmp_path / "before")
        overrides = [one for one in overrides if "adapters" not in one] + [f"model.init_from={tmp_path / 'before'}"]
    recipe = load_recipe(recipe, overrides)
    args = training_arguments(recipe.training)
    outline = outline_fwd2bot(recipe, args)
    assert {value.device.type for value in outline.parameters()} == {"meta"}
    assert described(outline) == described(build_fwd2bot(recipe, args)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_part_of_a_process_is_that_of_layers_and_of_embeddings_that_are_apart(tiny_fwd2bot, tmp_path, tied):
    model = tiny_fwd2bot
    if tied:
        backbone = tiny.tiny_backbone(tie_word_embeddings=True)
        model = type(model).from_backbone(backbone, num_summary_tokens=4, lora_rank=4)
    weights = dict(model.named_parameters())
    words = [] if tied else [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(words) == (0 if tied else 2)
    divided = [name for name in weights if of_divided_layers(name)] + words
    found = divided_weights(model, 3)
    rows = {name: math.ceil(len(weights[name]) / 3) for name in divided}
    assert found.part == 4 * sum(rows[name] * weights[name][0].numel() for name in divided)
    assert found.whole == 4 * sum(value.numel() for name, value in weights.items() if name not in divided)
    one_layer, of_tower = (
        4 * sum(value.numel() for name, value in weights.items() if f"{part}0." in name and name in rows)
        for part in LAYERS
    )
    of_words = [4 * weights[name].numel() for name in words]
    assert found.gathered == 2 * max(one_layer, of_tower, *of_words)
    stay = divided_weights(model, 3, Sharding(reshard_after_forward=False))
    assert (stay.part, stay.whole) == (found.part, found.whole)
    assert stay.gathered == 2 * one_layer + sum(of_words) + 2 * of_tower  # it has two layers


def test_zero3_divides_what_lies_in_modules_of_which_nothing_trains(tiny_fwd2bot):
    weights = dict(tiny_fwd2bot.named_parameters())
    divided = {name: value for name, value in weights.items() if of_divided_layers(name)}
    divided["backbone.lm_head.weight"] = weights["backbone.lm_head.weight"]  # not the embeddings: there are queries
    found = divided_weights(tiny_fwd2bot, 3, Sharding(ZERO3))
    assert found.part == 4 * sum(math.ceil(value.numel() / 3) for value in divided.values())
    assert found.whole == 4 * sum(value.numel() for name, value in weights.items() if name not in divided)
    assert found.gathered == 4 * divided["backbone.lm_head.weight"].numel()


def test_scalar_of_a_layer_and_an_adapter_that_does_not_train_stay_whole(tiny_fwd2bot):
    before = divided_weights(tiny_fwd2bot, 2)
    tiny_fwd2bot.get_decoder().layers[0].scale = torch.nn.Parameter(torch.ones(()), requires_grad=False)
    for name, value in tiny_fwd2bot.trained_parameters().items():
        value.requires_grad_(".generate." in name)
    after = divided_weights(tiny_fwd2bot, 2)
    assert (after.part, after.whole, after.gathered) == (before.part, before.whole + 4, before.gathered)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FSDP2, pytest.param(ZERO3, marks=NEEDS_DEEPSPEED)])
def test_process_holds_what_the_estimate_says(tmp_path, method):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [sharded_weights.__file__, method, str(tmp_path / "held.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "held.json").read_text())
    assert told["held"] == told["estimate"]["part"] + told["estimate"]["whole"]
    assert told["estimate"]["part"] > told["estimate"]["whole"] / 4 > 0
    assert not any(of_divided_layers(name) for name in told["whole"])
    assert told["whole"] == told["expected_whole"]
    assert told["kept"][1] < told["kept"][0] / 4  # with checkpointed layers
    if method == FSDP2:
        assert told["kept_sharded"] == told["kept"]  # gathered weights are none of it, and what comes later there is
    else:
        assert all(more >= kept for kept, more in zip(told["kept"], told["kept_sharded"], strict=True))
        assert told["kept_sharded"][0] < 1.1 * told["kept"][0]  # DeepSpeed's linear layers keep their inputs, too
        assert 0 < told["gathered"] <= told["estimate"]["gathered"] and not told["left"]


def said(recipe, overrides=(), processes=None):
    output = io.StringIO()
    check(load_recipe(recipe, list(overrides)), Console(file=output, width=200, color_system=None), processes)
    return output.getvalue()


def test_check_tries_the_step_with_checkpointed_layers(tmp_path):
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    row = "activations kept for the backward pass"
    plain, checkpointed = (
        next(line for line in said(recipe, overrides).splitlines() if row in line)
        for overrides in ([], [f"training.{tiny.CHECKPOINTING}=true"])
    )
    assert "one layer, computed again" in checkpointed and "computed again" not in plain
    kept = [float(line.removesuffix(" MB").split()[-1]) for line in (checkpointed.rstrip(), plain.rstrip())]
    assert 0 < kept[0] < kept[1] / 2


def test_check_tells_what_each_of_several_processes_would_hold(tmp_path, monkeypatch):
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    row = "weights on each of 2 processes of fsdp2.yaml"
    assert row not in said(recipe)
    measured = said(recipe, processes=2)
    monkeypatch.setattr("fwd2bot.training.estimates.free_memory", lambda device: 1)
    counted = said(recipe, processes=2)
    assert "by counts" in counted and "by counts" not in measured
    lines = [next(line for line in text.splitlines() if row in line) for text in (measured, counted)]
    assert lines[0].split() == lines[1].split()
    model = build_fwd2bot(load_recipe(recipe), training_arguments({"use_cpu": True}))[0]
    divided = divided_weights(model, 2)
    assert f"{(divided.part + divided.whole) / 1024**2:.1f} MB, {divided.whole / 1024**2:.1f} MB of it" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--check", "--processes", "1"], "--processes is 1; FSDP2 divides weights among 2 or more"),
        (["--check", "--processes", "2", "model.quantization=4bit"], "model.quantization cannot be with FSDP2"),
    ],
)
def test_processes_that_fsdp2_would_not_start_with_are_named(tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([str(write_source_recipe(tmp_path, tmp_path / "run")), *arguments])


def test_processes_belong_to_the_check(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(write_source_recipe(tmp_path, tmp_path / "run")), "--processes", "2"])
    assert "--processes belongs to --check; accelerate launch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=4bit"], "was trained with train_connector, which cannot be with model.quantization"),
        (["model.dtype=bfloat16"], "trains the connector in float32.*training.bf16=true"),
        (["contrastive.loss=sigmoid"], "contrastive.loss is sigmoid, but .* was trained with infonce"),
        (["validation={num_summary_tokens: 8}"], "validation.num_summary_tokens is 8, but the model has 4"),
        (["validation={patience: 2}"], "validation.patience needs samples to judge by"),
    ],
)
def test_check_names_what_cannot_be_though_the_weights_do_not_fit(tmp_path, monkeypatch, overrides, message):
    tiny.tiny_fwd2bot(train_connector=True).save_pretrained(tmp_path / "before")
    Fwd2BotProcessor(tiny.tiny_backbone_processor()).save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "model.safetensors").unlink()  # it is not loaded
    monkeypatch.setattr("fwd2bot.training.estimates.free_memory", lambda device: 1)
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    init_from = f"model.init_from={tmp_path / 'before'}"
    assert "by counts" in said(recipe, [init_from])
    with pytest.raises(ValueError, match=message):
        said(recipe, [init_from, *overrides])


def test_quantised_weights_are_counted_in_their_bits(tmp_path):
    recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / "run", {"model": {"dtype": "bfloat16"}}))
    outline = outline_fwd2bot(recipe, training_arguments({"use_cpu": True}))
    whole, packed = weights_of(outline, None), weights_of(outline, "4bit")
    linear = sum(
        module.weight.numel()
        for name, module in outline.backbone.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and name != "lm_head"
    )
    assert whole - packed == pytest.approx(linear * 1.5)  # of two bytes, half a one is left
