"""Runs that `accelerate launch` starts with the configurations of the package, two processes on the CPU."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
from source_recipes import sources, write_data, write_source_recipe

import fwd2bot.training
from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.train import train

CONFIGURATIONS = Path(fwd2bot.training.__file__).parent / "accelerate"
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
OPTIONS = {"max_steps": 20, "save_steps": 10, "logging_steps": 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(
    configuration: str, recipe: Path, *overrides: str, options: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    command += ["--config_file", str(CONFIGURATIONS / configuration), "--main_process_port", str(free_port())]
    command += ["-m", "fwd2bot.training.train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=120)


def logged(folder: Path, step: int) -> list[dict[str, float]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [{name: one[name] for name in ("loss", "grad_norm")} for one in state["log_history"] if "loss" in one]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configuration", "options"),
    [
        ("fsdp2.yaml", ()),
        ("fsdp2.yaml", ("--fsdp_reshard_after_forward", "false")),
        pytest.param("zero3.yaml", (), marks=NEEDS_DEEPSPEED),
    ],
)
def test_launched_processes_log_what_one_process_logs(tmp_path, configuration, options):
    """Over 20 steps, with chunks, some without a picture, checkpointed layers and evaluation by generation.

    And gone on with from step 10.
    """
    judged = {**OPTIONS, "eval_strategy": "steps", "eval_steps": 10, tiny.CHECKPOINTING: True}
    write_data(tmp_path)
    asked = [{"from": "human", "value": "Which number?"}, {"from": "gpt", "value": "the first one"}]
    words = tmp_path / "words.json"
    words.write_text(json.dumps([{"id": str(number), "conversations": asked} for number in range(4)]))
    sections = {
        "data": {
            "sources": [*sources(tmp_path), {"name": "words", "format": "llava", "path": str(words), "use": "ar"}]
        },
        "validation": {"sources": sources(tmp_path), "samples": 4, "max_new_tokens": 2},
        "contrastive": {"chunk_size": 1},
    }
    one = write_source_recipe(tmp_path, tmp_path / "one", sections, **judged, per_device_train_batch_size=8)
    train(load_recipe(one))
    two = write_source_recipe(tmp_path, tmp_path / "two", sections, **judged)
    started = launch(configuration, two, options=options)
    assert started.returncode == 0, started.stderr[-4000:]
    found, expected = logged(tmp_path / "two", 20), logged(tmp_path / "one", 20)
    assert len(found) == len(expected) == 20
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5), step
    assert len({one["loss"] for one in found}) == 20
    assert (tmp_path / "two" / "checkpoint-20" / "fwd2bot.safetensors").is_file()
    assert not list((tmp_path / "two").rglob("model.safetensors"))
    backbone = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "two" / "final")
    assert backbone.trained_parameters()
    shutil.rmtree(tmp_path / "two" / "checkpoint-20")
    again = launch(configuration, two, options=options)
    assert again.returncode == 0, again.stderr[-4000:]
    assert logged(tmp_path / "two", 20) == found


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["fsdp2.yaml", pytest.param("zero3.yaml", marks=NEEDS_DEEPSPEED)])
def test_check_behind_the_launcher_tries_a_divided_step_and_prints_once(tmp_path, configuration):
    recipe = write_source_recipe(tmp_path, tmp_path / "run")
    started = launch(configuration, recipe, "--check")
    assert started.returncode == 0, started.stderr[-4000:]
    assert started.stdout.count(f"weights on each of 2 processes of {configuration}") == 1
    assert started.stdout.count("one step on cpu") == 1
    assert not (tmp_path / "run").exists()
