"""Which checkpoint a command means, and loading only as much of it as the command needs."""

import json
import os
import re
import sys
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from fwd2bot.pipelines.store import SummaryStore

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelOptions:
    """The options of a command that say how to load a model, see `options`."""

    name: str | None
    revision: str | None
    trust_remote_code: bool
    device: str | None
    dtype: str | None

    def or_embedded(self) -> "ModelOptions":
        """The checkpoint inside the package where none was named."""
        from fwd2bot.pipelines.embedded import default_checkpoint

        return self if self.name else replace(self, name=str(default_checkpoint()), revision=None)

    def or_of_store(self, config: Any) -> "ModelOptions":
        """The checkpoint that made a store where none was named.

        A store records a checkpoint by its fingerprint and by its id on the Hub or the bare name of its folder, which
        is looked for in this one.

        Args:
            config: the store's `StoreConfig`.

        Raises:
            ValueError: when it is not found.
        """
        if self.name:
            return self
        from fwd2bot.pipelines.embedded import checkpoint_path

        name, made_by = config.model or "", config.fingerprint
        if made_by is not None and made_by == _fingerprint(checkpoint_path()):
            return self.or_embedded()
        if name and made_by is not None and made_by == _fingerprint(Path(name)):
            return replace(self, name=name, revision=None)
        if HUB_ID.fullmatch(name):
            return replace(self, name=name, revision=self.revision or config.revision)
        raise ValueError(
            f"The model that made the store, {config.model!r} with the fingerprint {made_by}, is not in "
            "this folder. Say where it is: --model PATH_OR_ID."
        )


def open_store(path: str, model: Any = None, processor: Any = None) -> "SummaryStore":
    """As `SummaryStore.open`; where there is none, the error says how this command line makes one."""
    from fwd2bot.pipelines.store import SummaryStore
    from fwd2bot.pipelines.store.table import exists

    if not exists(path):
        raise FileNotFoundError(f"{path} holds no store. Make one: fwd2bot index FOLDER --store {path}")
    return SummaryStore.open(path, model, processor)


def load(options: ModelOptions, stage: str | None) -> tuple[Any, Any]:
    """Model and processor of a checkpoint.

    Args:
        options: with a name. stage: "compress", "generate", "text" or None for all, see `from_pretrained`.

    Raises:
        OSError, ValueError: for a checkpoint that is not there, does not load, or is no Fwd2Bot.
    """
    import torch
    from transformers import AutoModel, AutoProcessor

    device = _device(options.device)
    dtype = options.dtype or ("float32" if device.type == "cpu" else "auto")
    name = options.name
    read_config(options)  # an error of a checkpoint that is something else comes before its weights
    source = {"revision": options.revision or "main", "trust_remote_code": options.trust_remote_code}
    with _quiet():
        processor = AutoProcessor.from_pretrained(name, **source)
        model = AutoModel.from_pretrained(
            name, stage=stage, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **source
        )
        return model.to(device).eval(), processor


def read_config(options: ModelOptions) -> Any:
    """The `Fwd2BotConfig` of a checkpoint.

    Raises:
        OSError, ValueError: for a checkpoint that is not there, or is no Fwd2Bot.
    """
    from transformers import AutoConfig

    from fwd2bot.folder_fwd2bot import check_name  # whose package makes the class of the checkpoint known

    name = options.name
    check_name(name)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                name, revision=options.revision or "main", trust_remote_code=options.trust_remote_code
            )
    except OSError as error:
        if os.path.isdir(name):
            raise OSError(f"The checkpoint {name!r} cannot be read: {error}") from error
        raise OSError(f"There is no folder {name!r}, and the Hub gives no checkpoint of that id: {error}") from error
    if config.model_type != "fwd2bot":
        raise ValueError(
            f"{name} is no Fwd2Bot checkpoint but a model of the type {config.model_type!r}. Give one that "
            "save_pretrained of a Fwd2Bot wrote."
        )
    return config


def _fingerprint(folder: Path) -> str | None:
    """That of the checkpoint in a folder; None where there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(
            f"{name!r} cannot be used: {str(error).splitlines()[0]}", param_hint="--device"
        ) from error


@contextmanager
def _quiet() -> Any:
    """Keep stdout free of what loading prints, and stderr of its progress bars unless somebody watches."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
