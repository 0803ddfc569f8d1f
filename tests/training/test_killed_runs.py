"""A run that is killed and started again has the losses of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from source_recipes import sources, write_data, write_source_recipe
from tiny_recipes import write_backbone_recipe, write_fwd2bot_recipe
from transformers import TrainerCallback

from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.train import build_trainer, run, train


def losses(folder: Path, step: int) -> list[dict[str, float]]:
    """The figures of every step, as the checkpoint of the last one has them."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


class CutOff(TrainerCallback):
    """Ends a run after a step, as an error of the machine would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("cut off")


@pytest.mark.parametrize("workers", [0, 2])
def test_mixture_that_is_cut_off_goes_on_with_the_same_losses(tmp_path, workers):
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    whole = write_source_recipe(tmp_path, tmp_path / "whole", **options)
    train(load_recipe(whole))
    cut = load_recipe(write_source_recipe(tmp_path, tmp_path / "cut", **options))
    trainer = build_trainer(cut)
    trainer.add_callback(CutOff(5))
    with pytest.raises(RuntimeError, match="cut off"):
        run(trainer, cut)
    assert not (tmp_path / "cut" / "final").exists()
    train(cut)
    assert losses(tmp_path / "cut", 6) == losses(tmp_path / "whole", 6)
    assert len(losses(tmp_path / "whole", 6)) == 6


def test_run_that_is_cut_off_counts_its_patience_on(tmp_path):
    judged = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 20, "load_best_model_at_end": True}
    judged |= {"metric_for_best_model": "eval_recall@1", "greater_is_better": True}
    write_data(tmp_path)
    sections = {
        "validation": {"sources": sources(tmp_path), "samples": 4, "max_new_tokens": 2, "patience": 2},
        "optimizer": {"learning_rate": 0.0, "matrix_learning_rate": 0.0},  # so that nothing gets better
    }
    whole = load_recipe(write_source_recipe(tmp_path, tmp_path / "whole", sections, **judged))
    cut = load_recipe(write_source_recipe(tmp_path, tmp_path / "cut", sections, **judged))
    undisturbed = build_trainer(whole)
    run(undisturbed, whole)
    trainer = build_trainer(cut)
    trainer.add_callback(CutOff(5))
    with pytest.raises(RuntimeError, match="cut off"):
        run(trainer, cut)
    resumed = build_trainer(cut)
    assert run(resumed, cut) == tmp_path / "cut" / "final"
    assert resumed.state.global_step == undisturbed.state.global_step == 6
    assert losses(tmp_path / "cut", 6) == losses(tmp_path / "whole", 6)


def killed_after(recipe: Path, checkpoint: Path) -> None:
    """Start the command, and kill -9 it a little after this checkpoint has appeared."""
    process = start(recipe)
    deadline = time.monotonic() + 120
    while not (checkpoint / "trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def start(recipe: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "fwd2bot.training.train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["drawn", "mixture"])
@pytest.mark.parametrize("step", [3, 7])
def test_killed_process_started_again_has_the_losses_of_an_undisturbed_one(tmp_path, data, step):
    options = {"max_steps": 60, "save_steps": 1, "save_total_limit": 60, "dataloader_num_workers": 1}
    if data == "drawn":
        train(load_recipe(write_backbone_recipe(tmp_path, tmp_path / "backbone")))
        backbone = tmp_path / "backbone" / "final"
        recipes = []
        for name in ("whole", "cut"):
            (tmp_path / name).mkdir()
            recipes.append(write_fwd2bot_recipe(tmp_path / name, backbone, tmp_path / name / "run", **options))
        folders = [tmp_path / "whole" / "run", tmp_path / "cut" / "run"]
    else:
        folders = [tmp_path / "whole", tmp_path / "cut"]
        recipes = [write_source_recipe(tmp_path, folder, **options) for folder in folders]
    assert start(recipes[0]).wait() == 0
    killed_after(recipes[1], folders[1] / f"checkpoint-{step}")
    assert not (folders[1] / "final").exists()
    assert start(recipes[1]).wait() == 0
    assert losses(folders[1], 60) == losses(folders[0], 60)
