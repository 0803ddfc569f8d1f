"""Runs of two processes (gloo, on the CPU) have the losses and gradients of one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sample_run

PROGRAM = Path(sample_run.__file__)


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
            assert one[name] == pytest.approx(value, abs=tolerance, rel=tolerance), (step, name)


def test_two_processes_log_what_one_logs(tmp_path):
    expected = sample_run.run(output_dir=str(tmp_path / "one"), batch=8, steps=4)
    found = launch(2, output_dir=str(tmp_path / "two"), batch=4, steps=4, chunk=3)
    assert_same_logs(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"chunk": 1, "gradient_checkpointing": True}])
def test_two_processes_log_what_one_logs_over_twenty_steps(tmp_path, options):
    plain = {name: value for name, value in options.items() if name == "accumulation"}
    expected = sample_run.run(output_dir=str(tmp_path / "one"), batch=8, steps=20, **plain)
    found = launch(2, output_dir=str(tmp_path / "two"), batch=4, steps=20, **options)
    assert_same_logs(found, expected)
