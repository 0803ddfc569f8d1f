"""Adapter-only checkpoints: what training made, without the backbone, which is loaded from where it came from.

In the folder: `compress/` and `generate/`, each an adapter that plain PEFT reads; `fwd2bot.safetensors` with queries,
projector, temperature, and a sample of the backbone's weights, by which another backbone is refused.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import cached_file

from .adapters_fwd2bot import is_adapter_parameter
from .configuration_fwd2bot import STAGES
from .fingerprint_fwd2bot import weights_fingerprint
from .folder_fwd2bot import OWN_WEIGHTS
from .weights_fwd2bot import QUERIES, WeightSample, check_loading_info, sample_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as PEFT calls it
SAMPLE, SHAPES, DIGESTS = "backbone_sample.", "backbone_shapes", "adapters"


def save_adapters(model: Any, folder: Path, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the trained weights of a Fwd2Bot, and the sample of its backbone, into a folder.

    Args:
        state_dict: the trained weights in another dtype, under the names of `model.state_dict()`.

    Raises:
        ValueError: when no weight of the backbone is here unquantised, so that no sample can be taken.
    """
    sample = sample_weights(model.backbone)
    if not sample:
        raise ValueError(
            "No weight of the backbone is here unquantised, so nothing could tell it from another one when the "
            "adapters are loaded. Save the model where its backbone is loaded without offloading."
        )
    state = model.state_dict() if state_dict is None else state_dict
    own = {name: state[full] for name, full in _own_names(model).items()}
    away = [name for name, value in model.trained_parameters().items() if value.is_meta]
    if away:
        raise ValueError(
            f"Trained weights are offloaded ({away[0]}, …). Save in full, without adapter_only, or load the model "
            "without offloading."
        )
    prefix, digests = _decoder_prefix(model), {}
    decoder_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    for stage in STAGES:
        weights = _adapter_state(model, stage, decoder_state)
        weights = {_peft_prefix(model) + name: value for name, value in weights.items()}
        (folder / stage).mkdir()
        _adapter_config(model, stage).save_pretrained(folder / stage)
        _save(weights, folder / stage / ADAPTER_WEIGHTS)
        digests[stage] = weights_fingerprint(weights)
    values = {SAMPLE + name: weight.values for name, weight in sample.items()}
    shapes = {name: weight.shape for name, weight in sample.items()}
    _save({**own, **values}, folder / OWN_WEIGHTS, {SHAPES: json.dumps(shapes), DIGESTS: json.dumps(digests)})


@dataclass
class SavedAdapters:
    """What `save_adapters` wrote.

    Args:
        own: queries, projector and temperature.
        stages: the weights of each stage's adapter, under PEFT's names.
        sample: of the backbone's weights.
        changed: stages whose adapter is not the one that was saved.
    """

    own: dict[str, torch.Tensor]
    stages: dict[str, dict[str, torch.Tensor]]
    sample: dict[str, WeightSample]
    changed: list[str]


def read_adapters(path: str | os.PathLike, stages: Iterable[str], hub: Mapping[str, Any]) -> SavedAdapters:
    """Read the files of an adapter-only checkpoint, before anything is changed.

    Args:
        hub: options of `cached_file`, such as `revision` and `token`.

    Raises:
        ValueError: for a damaged file. OSError: for one that is not there.
    """
    weights, metadata = _read(path, OWN_WEIGHTS, hub)
    try:
        shapes, digests = json.loads(metadata[SHAPES]), json.loads(metadata[DIGESTS])
        sample = {name: WeightSample(tuple(shape), weights[SAMPLE + name]) for name, shape in shapes.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}/{OWN_WEIGHTS} lacks {error}. Save or download the checkpoint anew.") from error
    own = {name: value for name, value in weights.items() if not name.startswith(SAMPLE)}
    adapters = {stage: _read(path, f"{stage}/{ADAPTER_WEIGHTS}", hub)[0] for stage in stages}
    changed = [stage for stage, values in adapters.items() if weights_fingerprint(values) != digests.get(stage)]
    return SavedAdapters(own, adapters, sample, changed)


def fill_adapters(model: Any, saved: SavedAdapters, path: str | os.PathLike) -> None:
    """Fill a model with untrained adapters with saved ones; strict.

    Raises:
        ValueError: when a weight is missing, unexpected or of another shape.
    """
    parameters = dict(model.named_parameters())
    places = {name: parameters[full] for name, full in _own_names(model).items()}
    _check_fit(saved.own, places, path)
    prefix = _peft_prefix(model)
    stages = {
        stage: {name.removeprefix(prefix): value for name, value in weights.items()}
        for stage, weights in saved.stages.items()
    }
    for stage, weights in stages.items():
        _check_fit(weights, _adapter_state(model, stage), f"{path}/{stage}")
    with torch.no_grad():
        for name, value in saved.own.items():
            places[name].copy_(value)
    with _peft_record(model) as decoder:
        for stage, weights in stages.items():
            set_peft_model_state_dict(decoder, weights, adapter_name=stage)


def _own_names(model: Any) -> dict[str, str]:
    """Names in the file of the trained weights that are no adapters, and their names in the model."""
    names = [name for name in model.trained_parameters() if not is_adapter_parameter(name)]
    return {QUERIES if name.endswith(f".{QUERIES}") else name: name for name in names}


def _decoder_prefix(model: Any) -> str:
    """What stands before the names of the language model's weights, `backbone.model.language_model.`."""
    decoder = model.get_decoder()
    return next(f"{name}." for name, module in model.named_modules() if module is decoder)


def _peft_prefix(model: Any) -> str:
    """The same in PEFT's files: `base_model.model.model.language_model.`."""
    return f"base_model.model.{_decoder_prefix(model).removeprefix('backbone.')}"


def _adapter_config(model: Any, stage: str) -> LoraConfig:
    """The adapter as PEFT would describe it on the backbone, each layer by its full name: nothing else matches."""
    layers = {
        name.removeprefix("backbone."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and stage in module.lora_A
    }
    settings = {**model.config.adapters[stage], "target_modules": list(layers)}
    settings.pop("exclude_modules", None)
    for pattern, values in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        if settings.get(pattern):  # their names were relative to the language model
            settings[pattern] = {
                f"^{re.escape(name)}": getattr(layer, values)[stage] for name, layer in layers.items()
            }
    return LoraConfig(
        **settings,
        base_model_name_or_path=model.config.backbone_name_or_path,
        revision=model.config.backbone_revision,
        inference_mode=True,
    )


@contextmanager
def _peft_record(model: Any) -> Iterator[nn.Module]:
    """The language model with PEFT's own record of its adapters, which its functions ask for."""
    decoder = model.get_decoder()
    decoder.peft_config = {name: LoraConfig(**model.config.adapters[name]) for name in STAGES}
    try:
        yield decoder
    finally:
        del decoder.peft_config


def _adapter_state(model: Any, stage: str, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    with _peft_record(model) as decoder:
        return get_peft_model_state_dict(decoder, state, adapter_name=stage, save_embedding_layers=False)


def _check_fit(weights: Mapping[str, torch.Tensor], places: Mapping[str, torch.Tensor], path: Any) -> None:
    info = {
        "missing_keys": places.keys() - weights.keys(),
        "unexpected_keys": weights.keys() - places.keys(),
        "mismatched_keys": [
            f"{name} {tuple(weights[name].shape)} for {tuple(places[name].shape)}"
            for name in weights.keys() & places.keys()
            if weights[name].shape != places[name].shape
        ],
    }
    check_loading_info(info, path)


def _save(weights: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    weights = {name: value.detach().contiguous() for name, value in weights.items()}
    save_file(weights, path, metadata={"format": "pt", **(metadata or {})})


def _read(
    path: str | os.PathLike, name: str, hub: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    file = cached_file(path, name, **hub)
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}/{name} is damaged ({error}). Save or download the checkpoint anew.") from error
