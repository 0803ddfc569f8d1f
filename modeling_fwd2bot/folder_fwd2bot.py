"""A checkpoint folder: written whole or not at all, and with the code in it that `trust_remote_code=True` loads."""

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

from .configuration_fwd2bot import STAGES

MODEL_FILES = (
    "adapter_checkpoint_fwd2bot.py",
    "adapters_fwd2bot.py",
    "backbone_fwd2bot.py",
    "checkpoint_fwd2bot.py",
    "configuration_fwd2bot.py",
    "export_fwd2bot.py",
    "final_norm_fwd2bot.py",
    "fingerprint_fwd2bot.py",
    "folder_fwd2bot.py",
    "generation_fwd2bot.py",
    "given_prompt_fwd2bot.py",
    "last_positions_fwd2bot.py",
    "losses_fwd2bot.py",
    "merging_fwd2bot.py",
    "mixed_in_fwd2bot.py",
    "modeling_fwd2bot.py",
    "output_fwd2bot.py",
    "packing_fwd2bot.py",
    "passes_fwd2bot.py",
    "pickling_fwd2bot.py",
    "picture_groups_fwd2bot.py",
    "pictures_fwd2bot.py",
    "placeholders_fwd2bot.py",
    "processing_fwd2bot.py",
    "quantization_fwd2bot.py",
    "summary_fwd2bot.py",
    "weights_fwd2bot.py",
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
    "sentence_fwd2bot.py",
)
# For `SentenceTransformer(folder, trust_remote_code=True)`.
SENTENCE_TRANSFORMERS = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_fwd2bot.Fwd2BotEmbedder"}],
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "similarity_fn_name": "cosine",
        "prompts": {},
        "default_prompt_name": None,
        "requirements": {"sentence-transformers": ">=6.2"},
    },
}

OWN_WEIGHTS = "fwd2bot.safetensors"  # of an adapter-only checkpoint, beside the adapters
DRAFT = ".saving-"
_HOST = re.sub(r"\W", "_", platform.node())
WEIGHT_FILES = rf"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|{re.escape(OWN_WEIGHTS)}"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
MODEL_CLASS = "modeling_fwd2bot.Fwd2BotForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_fwd2bot.Fwd2BotConfig",
    "AutoModel": MODEL_CLASS,
    "AutoModelForImageTextToText": MODEL_CLASS,
    "AutoProcessor": "processing_fwd2bot.Fwd2BotProcessor",
}


def check_name(name: str | os.PathLike, what: str = "checkpoint") -> None:
    """Raise `FileNotFoundError` for a name that is neither a folder nor of the form of an id, which the Hub may know.

    Args:
        what: the error calls it.
    """
    name = os.fspath(name)
    if os.path.isdir(name):
        return
    if not _is_id(name):
        raise FileNotFoundError(
            f"There is no folder {name!r}, and an id on the Hub has the form owner/name. {_remedy(name, what)}"
        )


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _remedy(name: str, what: str) -> str:
    """What to give instead of a name that is neither a folder nor an id."""
    if "://" in name:
        return "Give owner/name instead of an address."
    if (expanded := os.path.expanduser(name)) != name:
        return f"Python does not expand ~: give {expanded!r}."
    name, _, revision = name.partition("@")
    if revision and _is_id(name):
        return f"Give {name!r}, and {revision!r} as the revision."
    return f"Give the folder of a {what}, or the id of one."


@contextmanager
def draft_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to write a checkpoint in, whose files replace those of `folder` when the block ends without an error.

    While they are moved, `folder` has no config, so that a mixture of two checkpoints cannot be loaded. Weights of an
    earlier save that the new one does not have (it may have had more shards) are removed.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file. Give a folder to save in.")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for forsaken in filter(_is_forsaken, folder.glob(f"{DRAFT}*")):
            shutil.rmtree(forsaken, ignore_errors=True)
        prefix = f"{DRAFT}{_HOST}-{os.getpid()}-"
        with TemporaryDirectory(prefix=prefix, dir=folder) as draft:  # inside: the same disk, and its permissions
            yield Path(draft)
            _move(Path(draft), folder)
    except BaseException:
        for place in made:
            with suppress(OSError):  # not empty: somebody else's by now
                place.rmdir()
        raise


def _is_forsaken(draft: Path) -> bool:
    """Whether a draft is of a process of this machine that was killed."""
    host, _, process = draft.name.removeprefix(DRAFT).rpartition("-")[0].rpartition("-")
    if host != _HOST or not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        return False
    return False


def _move(draft: Path, folder: Path) -> None:
    written = [file.relative_to(draft) for file in draft.rglob("*") if file.is_file()]
    configs = [name for name in written if name.name in (CONFIG_NAME, PROCESSOR_NAME)]
    stale = set(_weights(folder)) if _weights(draft) else set()
    for file in [*(folder / name for name in configs), *stale]:
        file.unlink(missing_ok=True)
    for name in sorted(written, key=lambda name: name in configs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, folder / name)
    for stage in STAGES:
        with suppress(OSError):  # not empty: the adapters are there, or something else
            (folder / stage).rmdir()


def _weights(folder: Path) -> list[Path]:
    """Files of weights of a full or an adapter-only checkpoint."""
    full = [file for file in folder.iterdir() if re.fullmatch(WEIGHT_FILES, file.name)]
    return full + [file for stage in STAGES for file in (folder / stage).glob("adapter_*")]


def set_auto_map(config: Any) -> None:
    """Name in the config which classes of the folder the Auto classes and `pipeline()` shall load."""
    config.auto_map = dict(AUTO_MAP)
    config.custom_pipelines = {
        task: {"impl": implementation, "pt": ["AutoModel"], "type": "multimodal"}
        for task, implementation in PIPELINES.items()
    }


def copy_code(save_directory: str | os.PathLike, config: Any, hub: Mapping[str, Any] | None = None) -> None:
    """Put the modules that the auto map names into a checkpoint folder, and what Sentence Transformers reads."""
    for source in find_code(config, hub):
        target = Path(save_directory) / source.name
        if not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)
    for name, content in SENTENCE_TRANSFORMERS.items():
        (Path(save_directory) / name).write_text(json.dumps(content, indent=2) + "\n")


def find_code(config: Any, hub: Mapping[str, Any] | None = None) -> list[Path]:
    """Where the modules are that belong into a checkpoint folder.

    They lie beside this file; a pipeline module that does not (transformers copies only what it loads) comes from the
    installed package or from the checkpoint that the model was loaded from.

    Args:
        hub: the options with which that was loaded, such as `revision` and `cache_dir`.

    Raises:
        FileNotFoundError: naming the module that is in none of these places.
    """
    folders = [Path(__file__).parent]
    if __name__.startswith("fwd2bot."):
        spec = find_spec("fwd2bot.pipelines")
        if spec is not None:
            folders += [Path(location) for location in spec.submodule_search_locations or []]
    return [_find_module(name, folders, config, hub) for name in (*MODEL_FILES, *PIPELINE_FILES)]


def _find_module(name: str, folders: list[Path], config: Any, hub: Mapping[str, Any] | None) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    checkpoint = config.name_or_path
    found = checkpoint and cached_file(checkpoint, name, **(hub or {}), _raise_exceptions_for_missing_entries=False)
    if not found:
        raise FileNotFoundError(
            f"{name}, which belongs into a checkpoint folder, is neither in {[str(folder) for folder in folders]} nor "
            f"in {checkpoint!r}. Install fwd2bot, or load the model from a complete checkpoint."
        )
    return Path(found)
