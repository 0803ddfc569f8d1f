"""A run that is killed and started again has the losses of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from source_recipes import sources, write_data, write_source_recipe
from tiny_recipes import write_backbone_recipe, write_fwd2bot_recipe
from transformers import TrainerCallback

from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.train import build_trainer, run, train
from fwd2bot.training.trainer import INCOMPLETE, newest_checkpoint


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


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that is complete."""
    found = newest_checkpoint(folder, clean=False)
    return 0 if found is None else int(found.name.removeprefix("checkpoint-"))


def begun_after(folder: Path, moment: float) -> bool:
    """Whether a checkpoint is being written that was begun after this moment."""
    marks = []
    for mark in folder.glob(f"checkpoint-*/{INCOMPLETE}"):
        with suppress(FileNotFoundError):
            marks.append(mark.stat().st_mtime)
    return any(at > moment for at in marks)


def killed_again_and_again(recipe: Path, folder: Path, rng: random.Random) -> tuple[list[int], int]:
    """Begin a run and kill it four times, half of them in a write if they meet one; fewer times if it ends before.

    Returns the steps from which it went on, and how many kills left a checkpoint half written.
    """
    gone_on_from, half_written = [], 0
    for in_a_write in (True, False, True, False):
        gone_on_from.append(newest(folder))
        process, started = start(recipe), time.time()
        deadline, wait = time.monotonic() + 120, rng.uniform(0, 0.02 if in_a_write else 0.4)
        while process.poll() is None and time.monotonic() < deadline:
            if begun_after(folder, started) if in_a_write else newest(folder) > gone_on_from[-1]:
                break
            time.sleep(0.001)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        ended = process.wait()
        assert ended in (0, -signal.SIGKILL)
        if ended == 0:
            break
        half_written += any((path / INCOMPLETE).exists() for path in folder.glob("checkpoint-*"))
    return gone_on_from, half_written


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_process_killed_again_and_again_at_random_moments_has_the_losses_of_an_undisturbed_one(tmp_path, seed):
    """In the middle of a step, and while a checkpoint is written or an old one removed."""
    options = {"max_steps": 150, "save_steps": 10, "save_total_limit": 2, "dataloader_num_workers": 1}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(write_source_recipe(tmp_path, whole, **options)).wait() == 0
    recipe = write_source_recipe(tmp_path, cut, **options)
    rng = random.Random(seed)
    for _ in range(5):  # when a kill comes is the machine's affair: it may miss the writes, or the run
        gone_on_from, half_written = killed_again_and_again(recipe, cut, rng)
        if half_written and gone_on_from[-1] > 0 and not (cut / "final").exists():
            break
        shutil.rmtree(cut, ignore_errors=True)
    else:
        pytest.fail("in 5 runs no kill met a checkpoint that was being written")
    assert start(recipe).wait() == 0
    assert losses(cut, 150) == losses(whole, 150)


class WithScaler(TrainerCallback):
    """Gives a run on the CPU the gradient scaler that a run in float16 has on a GPU."""

    def __init__(self, trainer):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        trainer.accelerator.scaler, trainer.accelerator.native_amp = self.scaler, True
        self.scales = []

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.scaler.get_scale())


def test_run_that_is_cut_off_goes_on_with_its_gradient_scaler(tmp_path):
    def begin(name):
        recipe = load_recipe(write_source_recipe(tmp_path, tmp_path / name))
        trainer = build_trainer(recipe)
        watched = WithScaler(trainer)
        trainer.add_callback(watched)
        return recipe, trainer, watched

    recipe, trainer, whole = begin("whole")
    run(trainer, recipe)
    recipe, trainer, cut = begin("cut")
    trainer.add_callback(CutOff(5))
    with pytest.raises(RuntimeError, match="cut off"):
        run(trainer, recipe)
    recipe, trainer, resumed = begin("cut")
    run(trainer, recipe)
    assert whole.scales[:5] == cut.scales and whole.scales[4:] == resumed.scales
    assert len(set(whole.scales)) > 2  # it grew on the way
    assert losses(tmp_path / "cut", 6) == losses(tmp_path / "whole", 6)


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
