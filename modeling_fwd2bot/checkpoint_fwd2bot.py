"""What lies in a checkpoint folder beside the weights: the code for `trust_remote_code=True`, and strict loading."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

MODEL_FILES = (
    "adapters_fwd2bot.py",
    "checkpoint_fwd2bot.py",
    "configuration_fwd2bot.py",
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
PIPELINE_FILES = tuple(sorted({implementation.split(".")[0] + ".py" for implementation in PIPELINES.values()}))

MODEL_CLASS = "modeling_fwd2bot.Fwd2BotForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_fwd2bot.Fwd2BotConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
    "AutoProcessor": "processing_fwd2bot.Fwd2BotProcessor",
}


def set_auto_map(config: Any) -> None:
    """Name in the config which classes of the folder the Auto classes and `pipeline()` shall load."""
    config.auto_map = dict(AUTO_MAP)
    config.custom_pipelines = {
        task: {"impl": implementation, "pt": ["AutoModel"], "type": "multimodal"}
        for task, implementation in PIPELINES.items()
    }


def copy_code(save_directory: str | os.PathLike, config: Any) -> None:
    """Copy the modules that the auto map names into a checkpoint folder.

    They come from beside this file; a pipeline module that is not there (transformers copies only what it loads) comes
    from the installed package or from the checkpoint that the model was loaded from.
    """
    for name in (*MODEL_FILES, *PIPELINE_FILES):
        source, target = _find_code(name, config), Path(save_directory) / name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


def _find_code(name: str, config: Any) -> Path:
    folders = [Path(__file__).parent]
    if __name__.startswith("fwd2bot."):
        spec = find_spec("fwd2bot.pipelines")
        if spec is not None:
            folders += [Path(location) for location in spec.submodule_search_locations or []]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    found = cached_file(config.name_or_path, name, revision=getattr(config, "_commit_hash", None)) if config.name_or_path else None
    if found is None:
        raise FileNotFoundError(
            f"{name}, which belongs into a checkpoint folder, is neither in {[str(folder) for folder in folders]} nor in "
            f"{config.name_or_path!r}. Install fwd2bot, or load the model from a complete checkpoint."
        )
    return Path(found)


def check_loading_info(info: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Raise `ValueError` unless every weight of the checkpoint found its place and every place its weight."""
    problems = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
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


def weights_fingerprint(parameters: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that identify trained weights: names, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        value = parameters[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]
