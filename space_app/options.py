"""How a Space is started: from the command line, or by environment variables where there is none."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import typer
from fwd2bot_cli.models import ModelOptions, load, open_store

from fwd2bot.pipelines.embedded import default_checkpoint, gallery

from .collection import Shipped, StoreCollection
from .service import Service

DTYPES = ("auto", "float32", "bfloat16", "float16")
VARIABLES = {
    "model": "FWD2BOT_SPACE_MODEL",
    "revision": "FWD2BOT_SPACE_REVISION",
    "trust_remote_code": "FWD2BOT_SPACE_TRUST_REMOTE_CODE",
    "store": "FWD2BOT_SPACE_STORE",
    "device": "FWD2BOT_SPACE_DEVICE",
    "dtype": "FWD2BOT_SPACE_DTYPE",
}


@dataclass(frozen=True)
class SpaceOptions:
    """What a Space runs on.

    Args:
        model: a checkpoint, a folder or an id on the Hub. Default: that inside the package; with a store, that which
            made it. revision: of one on the Hub.
        trust_remote_code: run the code that lies in the checkpoint instead of the package's.
        store: one made by `fwd2bot index`, whose pictures are offered in place of the gallery; only read.
        device, dtype: as for `fwd2bot search`.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    store: str | None = None
    device: str | None = None
    dtype: str | None = None

    def or_environment(self, environment: Mapping[str, str] = os.environ) -> "SpaceOptions":
        """These options, and where one is not given, the environment variable of `VARIABLES`.

        Raises:
            ValueError: for a switch that is neither 1 nor 0.
        """
        found: dict[str, Any] = {}
        for name, variable in VARIABLES.items():
            value = environment.get(variable, "")
            if not value or getattr(self, name):
                continue
            if name == "trust_remote_code":
                if value not in ("0", "1"):
                    raise ValueError(f"{variable}={value!r} must be 1 (run the checkpoint's own code) or 0.")
                value = value == "1"
            found[name] = value
        return replace(self, **found)


def load_service(options: SpaceOptions) -> Service:
    """Load the model, and compress the gallery or open the store.

    Raises:
        OSError, ValueError: for a checkpoint or a store that is not there or does not fit, a device or a precision
            that does not exist, with the remedy.
        ImportError: for a store without the extra `store`.
    """
    _check_dtype(options.dtype)
    chosen = ModelOptions(options.model, options.revision, options.trust_remote_code, options.device, options.dtype)
    if options.store is None:
        chosen = chosen.or_embedded()
    else:
        chosen = chosen.or_of_store(open_store(options.store).config)
    try:
        model, processor = load(chosen, None)
    except (OSError, ValueError, ImportError):
        raise
    except typer.BadParameter as error:  # of the device
        raise ValueError(f"{error.message} Give another --device, or none.") from error
    except Exception as error:  # a file that is cut off or damaged fails in whatever way its reader has
        raise ValueError(
            f"The checkpoint {chosen.name!r} cannot be loaded ({type(error).__name__}: {str(error)[:200]}). Most "
            "likely one of its files is damaged, cut off, or only the pointer that Git LFS leaves: download it again, "
            "with `git lfs pull` in a clone."
        ) from error
    if options.store is None:
        collection: Shipped | StoreCollection = Shipped(gallery())
    else:
        collection = StoreCollection(open_store(options.store, model, processor))
    service = Service(model, processor, collection, is_embedded=_is_embedded(model))
    service.warm_up()
    return service


def _is_embedded(model: Any) -> bool:
    """Whether a model is the one inside the package, wherever it was loaded from."""
    try:
        config = json.loads((default_checkpoint() / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:  # a package without it
        return False
    return model.fingerprint == config["fingerprint"]


def _check_dtype(name: str | None) -> None:
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is not known. Give one of {', '.join(DTYPES)}.")
