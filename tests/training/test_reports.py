"""Answers and retrieval sheets in the logs of Trackio and W&B, without a network; `make test-families` has both."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from source_recipes import sources, write_data, write_source_recipe

from fwd2bot.training.recipe import load_recipe
from fwd2bot.training.train import build_trainer


@pytest.fixture
def recipe(tmp_path):
    write_data(tmp_path)
    sections = {"validation": {"sources": sources(tmp_path), "samples": 10, "max_new_tokens": 4, "show_steps": 3}}
    return write_source_recipe(tmp_path, tmp_path / "run", sections)


def test_samples_go_to_trackio(recipe, tmp_path):
    """In a process of its own: Trackio looks at its folder when it is imported."""
    pytest.importorskip("trackio")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    overrides = ["training.report_to=trackio", "training.project=fwd2bot-test", "training.max_steps=3"]
    train = "import runpy; runpy.run_module('fwd2bot.training.train', run_name='__main__', alter_sys=True)"
    if find_spec("torchvision"):  # as for this process; see the plugin
        train, environment["PYTHONPATH"] = f"import torchvision_on_cpu; {train}", str(Path(__file__).parents[1])
    command = [sys.executable, "-c", train, str(recipe), *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    [table] = (tmp_path / "trackio").glob("fwd2bot-test*.db")
    with closing(sqlite3.connect(table)) as database:
        logged = [metrics for (metrics,) in database.execute("select metrics from metrics")]
    assert any("samples/retrieval" in str(one) and "Which colour?" in str(one) for one in logged)
    [picture] = (tmp_path / "trackio").rglob("*.png")
    assert Image.open(picture).size == Image.open(tmp_path / "run" / "samples" / "step-000003.png").size


def test_samples_go_to_wandb(recipe, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb").mkdir()
    try:
        build_trainer(load_recipe(recipe, ["training.report_to=wandb"])).train()
    finally:
        wandb.finish()
    media = list((tmp_path / "wandb").rglob("media/*/samples/*"))
    assert {path.suffix for path in media} == {".png", ".html"}
    assert len([path for path in media if path.suffix == ".png"]) == 2  # after steps 3 and 6
    [first, *_] = [path for path in media if path.suffix == ".html"]
    assert "Which colour?" in first.read_text(encoding="utf-8")
