"""Of what a result is: the weights by their hash, the seed, and the versions of what computed it."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEED = 0  # of torch in an evaluation; what is drawn for it is seeded by its own numbers
PACKAGES = ("fwd2bot", "torch", "transformers", "peft")


def provenance(checkpoint: str | Path, model: Any) -> dict[str, Any]:
    """`checkpoint`, `sha256` of its weights (of a folder) or `revision` (of a Hub id), `dtype`, `seed`, `versions`."""
    found: dict[str, Any] = {"checkpoint": Path(checkpoint).name}
    if Path(checkpoint).is_dir():
        found["sha256"] = weights_hash(Path(checkpoint))
    else:
        found["revision"] = getattr(model.config, "_commit_hash", None)
    found["dtype"] = str(model.dtype).removeprefix("torch.")
    return found | {"seed": SEED, "versions": versions()}


def versions() -> dict[str, str]:
    """Of Python and of the packages that figures depend on."""
    return {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files of a checkpoint, its adapters' among them: their places and contents."""
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors file; name the folder of a checkpoint")
    digest = hashlib.sha256()
    for name in files:
        digest.update(name.encode() + b"\0")
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
