"""What weights are: strict loading, and the sample that a backbone is known by."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .adapters_fwd2bot import BASE_LAYER, is_adapter_parameter, is_plain_float

QUERIES = "summary_queries"
SAMPLE_SIZE = 8  # numbers of each weight
# Settings that say how a model is loaded, called or saved, not what it computes.
OF_LOADING = {
    "architectures", "attn_implementation", "dtype", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "problem_type", "quantization_config", "return_dict", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


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


@dataclass
class WeightSample:
    """A weight as another copy of it is known: its shape, and a few of its numbers in its own dtype."""

    shape: tuple[int, ...]
    values: torch.Tensor


def sample_weights(backbone: PreTrainedModel) -> dict[str, WeightSample]:
    """A sample of each weight of the backbone that is here unquantised, under its name without adapters.

    Not a hash: that would be of one dtype only, and would have to read every weight.
    """
    sample = {}
    for name, value in _frozen(backbone):
        if is_plain_float(value):
            flat = value.detach().flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLE_SIZE, len(flat)), dtype=torch.float64).long()
            sample[name] = WeightSample(tuple(value.shape), flat[places.to(flat.device)].cpu())
    return sample


def check_same_backbone(
    expected: Mapping[str, WeightSample], config: Any, backbone: PreTrainedModel, trained_on: str, path: Any
) -> None:
    """Raise `ValueError` unless the backbone has the weights that a sample was taken from, and the same config.

    Numbers are compared in the coarser of both dtypes. Weights that are quantised here or were there are passed over,
    but not all of them. Of the config, what both versions of transformers know and what changes what is computed.
    """
    found, names = sample_weights(backbone), {name for name, _ in _frozen(backbone)}
    both = sorted(expected.keys() & found.keys())
    shapes = [
        f"{name} has the shape {found[name].shape}, not {expected[name].shape}"
        for name in both
        if found[name].shape != expected[name].shape
    ]
    missing = [f"there is no {name}" for name in sorted(expected.keys() - names)]
    values = [f"{name} has other values" for name in both if not _same_values(expected[name], found[name])]
    settings = [
        f"its config has {name}={here!r}, not {there!r}" for name, there, here in _differing(config, backbone.config)
    ]
    problems = shapes or missing or values or settings
    if not both and not problems:
        problems = ["none of its weights can be compared, since they are quantised or offloaded"]
    if problems:
        listed = f"{'; '.join(problems[:3])}{f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''}"
        raise ValueError(
            f"{path} was not trained on this backbone, {type(backbone).__name__}, but on {trained_on}: {listed}. Hand "
            "over the right one: from_pretrained(path, backbone=...)."
        )


def _differing(expected: Any, found: Any) -> list[tuple[str, Any, Any]]:
    """Names of settings that differ, of both configs, and the two values."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, Mapping):
                yield from flat(value, f"{prefix}{name}.")
            elif name not in OF_LOADING and not name.startswith("_"):
                yield f"{prefix}{name}", value

    there, here = (dict(flat(json.loads(config.to_json_string(use_diff=False)))) for config in (expected, found))
    return [(name, there[name], here[name]) for name in there if name in here and there[name] != here[name]]


def _same_values(expected: WeightSample, found: WeightSample) -> bool:
    if expected.shape != found.shape:
        return False
    there, here = expected.values, found.values
    if {there.dtype, here.dtype} == {torch.float16, torch.bfloat16}:  # neither holds the other's numbers
        return torch.allclose(there.float(), here.float(), rtol=2**-7, atol=2**-24)
    return torch.equal(there.to(here.dtype), here.to(there.dtype).to(here.dtype))


def _frozen(backbone: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in backbone.named_parameters():
        if not is_adapter_parameter(name) and not name.endswith(f".{QUERIES}"):
            yield name.replace(BASE_LAYER, "."), value
