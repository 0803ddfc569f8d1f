"""What lies in a checkpoint folder beside the weights: the code for `trust_remote_code=True`, and strict loading."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

MODEL_FILES = (
    "adapters_fwd2bot.py",
    "backbone_fwd2bot.py",
    "checkpoint_fwd2bot.py",
    "configuration_fwd2bot.py",
    "generation_fwd2bot.py",
    "losses_fwd2bot.py",
    "modeling_fwd2bot.py",
    "packing_fwd2bot.py",
    "placeholders_fwd2bot.py",
    "processing_fwd2bot.py",
    "summary_fwd2bot.py",
)
PIPELINES = {
    "fwd2bot-compress": "compress_pipeline.CompressPipeline",
    "fwd2bot-retrieval": "retrieval_pipeline.RetrievalPipeline",
    "fwd2bot-answer": "answer_pipeline.AnswerPipeline",
}
PIPELINE_FILES = (
    *sorted({implementation.split(".")[0] + ".py" for implementation in PIPELINES.values()}),
    "answer_inputs.py",
    "pipeline_batches.py",  # what they share
    "pipeline_memory.py",
)

DRAFT = ".saving-"
MODEL_CLASS = "modeling_fwd2bot.Fwd2BotForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_fwd2bot.Fwd2BotConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
    "AutoProcessor": "processing_fwd2bot.Fwd2BotProcessor",
}


class CheckpointMixin:
    """Loading and saving of [`Fwd2BotForConditionalGeneration`]: strict, and with its code in the folder."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, but a missing or unexpected weight is an error.

        Args:
            stage: `None` loads everything; "compress" without the generate adapter; "generate" without vision tower
                and compress adapter; "text" both adapters without vision tower (embeds texts, answers from summaries).
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        check_loading_info(info, pretrained_model_name_or_path)
        model.mark_trainable()
        model._fingerprinted = _versions(model)
        return (model, info) if return_info else model

    @property
    def fingerprint(self) -> str:
        """Hash of the trained weights: that of the loaded checkpoint, in whatever dtype, until a weight is changed.

        What changes weights behind autograd's back (`parameter.data`) is not seen.
        """
        seen = self.__dict__.get("_fingerprinted")
        versions = _versions(self)
        if self.config.fingerprint is None or seen not in (versions, "before copying"):
            trained = self.trained_parameters()
            if self.config.fingerprint is None or not any(value.is_meta for value in trained.values()):
                self.config.fingerprint = weights_fingerprint(trained)
        self._fingerprinted = versions
        return self.config.fingerprint

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # of pickle and deepcopy, which begin to count the versions anew
        if state.get("_fingerprinted") == _versions(self):
            state["_fingerprinted"] = "before copying"
        return state

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, plus the code that `trust_remote_code=True` loads.

        Everything is written beside its place first and moved there when it is complete: a full disk leaves the
        folder as it was.

        Raises:
            ValueError: for a model that was loaded with a `stage`: parts of it are missing.
            OSError: for a folder that cannot be written, or code that cannot be found.
        """
        if self.stage is not None:
            raise ValueError(
                f"A model loaded with stage={self.stage!r} lacks parts and cannot be saved. Load it without `stage`."
            )
        if kwargs.get("distributed_checkpoint"):
            raise ValueError("distributed_checkpoint is not supported. Leave it out: the main process writes it all.")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{save_directory} is a file. Give a folder to save the model in.")
        find_code(self.config)  # an error comes before anything is written
        self.config.fingerprint = self.fingerprint
        set_auto_map(self.config)
        if not is_main_process:  # sharded weights are gathered by all processes together, and one of them writes
            with TemporaryDirectory() as nowhere:
                super().save_pretrained(nowhere, is_main_process=False, state_dict=state_dict, **kwargs)
            return
        with draft_folder(save_directory) as draft:
            super().save_pretrained(draft, state_dict=state_dict, **kwargs)
            copy_code(draft, self.config)
        if push_to_hub:  # only now the folder is complete; this saves once more, into a folder of its own
            hub = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
            options = {key: value for key, value in kwargs.items() if key in hub}
            self.push_to_hub(kwargs.get("repo_id", Path(save_directory).name), **options)


@contextmanager
def draft_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write a checkpoint in, whose files replace those of `folder` when the block ends without an error.

    While they are moved, `folder` has no config, so that a mixture of two checkpoints cannot be loaded. Weights of an
    earlier save that the new one does not have (it may have had more shards) are removed.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for forsaken in folder.glob(f"{DRAFT}*"):  # of a process that was killed
            shutil.rmtree(forsaken)
        with TemporaryDirectory(prefix=DRAFT, dir=folder) as draft:  # inside: the same disk, and its permissions
            yield Path(draft)
            _move(Path(draft), folder)
    except BaseException:
        for place in made:
            with suppress(OSError):  # not empty: somebody else's by now
                place.rmdir()
        raise


def _move(draft: Path, folder: Path) -> None:
    written = [file.relative_to(draft) for file in draft.rglob("*") if file.is_file()]
    configs = [name for name in written if name.name in (CONFIG_NAME, PROCESSOR_NAME)]
    stale = set(filter(_is_weights, folder.iterdir())) if any(map(_is_weights, written)) else set()
    for file in [*(folder / name for name in configs), *stale]:
        file.unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: name in configs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, folder / name)


def _is_weights(file: Path) -> bool:
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", file.name) is not None


def set_auto_map(config: Any) -> None:
    """Name in the config which classes of the folder the Auto classes and `pipeline()` shall load."""
    config.auto_map = dict(AUTO_MAP)
    config.custom_pipelines = {
        task: {"impl": implementation, "pt": ["AutoModel"], "type": "multimodal"}
        for task, implementation in PIPELINES.items()
    }


def copy_code(save_directory: str | os.PathLike, config: Any) -> None:
    """Copy the modules that the auto map names into a checkpoint folder."""
    for source in find_code(config):
        target = Path(save_directory) / source.name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def find_code(config: Any) -> list[Path]:
    """Where the modules are that belong into a checkpoint folder.

    They lie beside this file; a pipeline module that does not (transformers copies only what it loads) comes from the
    installed package or from the checkpoint that the model was loaded from.

    Raises:
        FileNotFoundError: naming the module that is in none of these places.
    """
    folders = [Path(__file__).parent]
    if __name__.startswith("fwd2bot."):
        spec = find_spec("fwd2bot.pipelines")
        if spec is not None:
            folders += [Path(location) for location in spec.submodule_search_locations or []]
    return [_find_module(name, folders, config) for name in (*MODEL_FILES, *PIPELINE_FILES)]


def _find_module(name: str, folders: list[Path], config: Any) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    checkpoint = config.name_or_path
    found = checkpoint and cached_file(
        checkpoint, name, revision=getattr(config, "_commit_hash", None), _raise_exceptions_for_missing_entries=False
    )
    if not found:
        raise FileNotFoundError(
            f"{name}, which belongs into a checkpoint folder, is neither in {[str(folder) for folder in folders]} nor "
            f"in {checkpoint!r}. Install fwd2bot, or load the model from a complete checkpoint."
        )
    return Path(found)


def check_loading_info(info: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raise `ValueError` unless every weight of the checkpoint found its place and every place its weight."""
    problems = {
        kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    problems = {kind: keys for kind, keys in problems.items() if keys}
    if problems:
        listed = "; ".join(
            f"{kind.replace('_keys', '')} ({len(keys)}): {', '.join(keys[:8])}{' …' if len(keys) > 8 else ''}"
            for kind, keys in problems.items()
        )
        raise ValueError(
            f"The weights in {path} do not fit their config: {listed}. The folder is damaged or was put together from "
            "several models; save or download it anew."
        )


def _versions(model: Any) -> list[int]:
    """How often each trained weight has been written to, as autograd counts it."""
    return [0 if value.is_inference() else value._version for value in model.trained_parameters().values()]


def weights_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that identify trained weights: names, shapes and values, in order of name.

    Raises:
        ValueError: for weights that are not here, because they are offloaded or another process has them.
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach()
        if hasattr(value, "full_tensor"):  # a DTensor, of which this process may hold a part
            value = value.full_tensor()
        if value.is_meta or value.numel() == 0:
            raise ValueError(
                f"The weights {name!r} are not in this process (offloaded or sharded), so they have no fingerprint. "
                "Bring them together first, or load the model without offloading."
            )
        value = value.float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]
