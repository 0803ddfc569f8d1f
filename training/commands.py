"""The commands that made a model and its figures, as they may be shown to others."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMAND = "command.txt"  # in the folder of a run: what began it
STEPS = "steps.json"  # in `final`: the steps of the run, and after which of them the weights are


def command_of(module: str, arguments: Sequence[str]) -> str:
    """`python -m fwd2bot.training.<module> ...`, without the folders of this machine."""
    return shlex.join(["python", "-m", f"fwd2bot.training.{module}", *map(without_folders, map(str, arguments))])


def without_folders(value: Any) -> Any:
    """A value, of a recipe say, in which absolute paths are only their last name; `key=/a/path` counts as one."""
    if isinstance(value, dict):
        return {name: without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return f"{key}{equals}{Path(path).name}" if os.path.isabs(path) else value
