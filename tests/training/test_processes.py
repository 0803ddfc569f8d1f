"""Runs of two processes (gloo, on the CPU) have the losses and gradients of one process with the same global batch."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sample_run
import tiny
import torch

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training import zero3
from fwd2bot.training.sharding import FSDP2, ZERO3, Sharding, shard_frozen

PROGRAM = Path(sample_run.__file__)
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
METHODS = {FSDP2: (), ZERO3: NEEDS_DEEPSPEED}
EXACT = ("loss", "grad_norm")  # logged in full


def launch(processes: int, **settings) -> list[dict[str, float]]:
    """The logs of a run in so many processes, which torch starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(PROGRAM), json.dumps(settings)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((Path(settings["output_dir"]) / "losses.json").read_text())


def assert_same_logs(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 0
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            allowed = tolerance if name in EXACT else 2e-4  # the parts of the loss are logged with four digits
            assert one[name] == pytest.approx(value, abs=allowed, rel=tolerance), (step, name)


def test_two_processes_log_what_one_logs(tmp_path):
    expected = sample_run.run(output_dir=str(tmp_path / "one"), batch=8, steps=4)
    found = launch(2, output_dir=str(tmp_path / "two"), batch=4, steps=4, chunk=3)
    assert_same_logs(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2},
        {"chunk": 1, tiny.CHECKPOINTING: True},
        *(
            pytest.param({**options, "shard": method}, marks=marks, id=f"{method}-{next(iter(options))}")
            for method, marks in METHODS.items()
            for options in ({"chunk": 3}, {tiny.CHECKPOINTING: True})
        ),
    ],
)
def test_two_processes_log_what_one_logs_over_twenty_steps(tmp_path, options):
    plain = {name: value for name, value in options.items() if name == "accumulation"}
    expected = sample_run.run(output_dir=str(tmp_path / "one"), batch=8, steps=20, **plain)
    found = launch(2, output_dir=str(tmp_path / "two"), batch=4, steps=20, **options)
    assert_same_logs(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param(method, marks=marks) for method, marks in METHODS.items()])
def test_sharded_run_is_saved_gone_on_from_and_loaded(tmp_path, method):
    options = {"batch": 4, "steps": 6, "chunk": 3, "shard": method, "save_strategy": "steps", "save_steps": 3}
    options["output_dir"] = str(tmp_path)
    expected = launch(2, **options, save_final=True)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert launch(2, **options, resume=True) == expected
    assert not (tmp_path / "final" / "model.safetensors").exists()
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "final", backbone=tiny.tiny_backbone())
    start = tiny.tiny_fwd2bot().trained_parameters()
    assert all(not torch.equal(value, start[name]) for name, value in loaded.trained_parameters().items())


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param(method, marks=marks) for method, marks in METHODS.items()])
@pytest.mark.parametrize("freeze", [["summary_queries"], ["summary_queries", "projector", "[.]compress[.]"]])
def test_sharded_run_with_frozen_parts_logs_what_one_process_logs(tmp_path, method, freeze):
    """Some generate passes have no summary before them, so that nothing of what they read trains."""
    expected = sample_run.run(output_dir=str(tmp_path / "one"), batch=8, steps=4, freeze=freeze)
    found = launch(2, output_dir=str(tmp_path / "two"), batch=4, steps=4, chunk=3, shard=method, freeze=freeze)
    assert_same_logs(found, expected)


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_zero3_on_another_device_than_deepspeed_chose_is_refused(tiny_fwd2bot, monkeypatch):
    zero3._choose_device(torch.device("cpu"))
    assert "DS_ACCELERATOR" not in os.environ
    with pytest.raises(ValueError, match="DeepSpeed computes on cpu, as it chose .* DS_ACCELERATOR=cuda"):
        zero3.divide(tiny_fwd2bot, [], torch.device("cuda"))
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize("name", zero3.READS_ITS_BASE)
def test_adapter_that_reads_a_weight_of_the_backbone_is_refused_with_zero3(tiny_fwd2bot, name):
    tiny_fwd2bot.config.adapters["generate"][name] = True
    with pytest.raises(ValueError, match=f"adapter generate has {name}, which cannot be with ZeRO-3.*fsdp2.yaml"):
        zero3.divide(tiny_fwd2bot, [], torch.device("cpu"))


@pytest.mark.parametrize("method", [FSDP2, ZERO3])
def test_sharding_among_one_process_is_refused(tiny_fwd2bot, method):
    with pytest.raises(ValueError, match=f"^{method} divides .* this run has one. Start several"):
        shard_frozen(tiny_fwd2bot, torch.device("cpu"), Sharding(method))
