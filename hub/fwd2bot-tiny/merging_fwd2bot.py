"""An adapter folded into the weights that it stands beside: as a state dict, or in place."""

import copy

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapters_fwd2bot import BASE_LAYER, adds_a_product, is_adapter_parameter, is_plain_float
from .last_positions_fwd2bot import LastPositions
from .mixed_in_fwd2bot import mix_in
from .summary_fwd2bot import all_finite


def merged_state(module: nn.Module, stage: str) -> dict[str, torch.Tensor]:
    """State dict of a module with the adapter of `stage` folded into its weights, under the names without adapters.

    The sum is taken in float32 and rounded once to the weights' own dtype; the module stays as it is.

    Raises:
        ValueError: for quantised weights, into which nothing can be folded exactly.
    """
    state = {name: value for name, value in module.state_dict().items() if not is_adapter_parameter(name)}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            for key, value in _merged_layer(layer, stage, name).items():
                state[f"{name}.base_layer.{key}"] = value
    return {name.replace(BASE_LAYER, "."): value for name, value in state.items()}


def merge_in_place(language_model: nn.Module, stage: str) -> None:
    """Fold the adapter of `stage` into the weights and take all adapters away; layers go under their own names again.

    The sums are those of `merged_state`. New tensors take the place of the weights, which may be mapped from a file.
    """
    for name, layer in list(language_model.named_modules()):
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            weights = dict(base.named_parameters())
            for key, value in _merged_layer(layer, stage, name).items():
                weights[key].data = value
            if isinstance(layer, LastPositions):
                mix_in(LastPositions, base)
            parent, _, last = name.rpartition(".")
            setattr(language_model.get_submodule(parent), last, base)


def cannot_merge(language_model: nn.Module) -> str | None:
    """Why adapters cannot be folded into the weights of this language model; None where they can."""
    for name, layer in language_model.named_modules():
        if isinstance(layer, LoraLayer):
            for weight in layer.parameters():
                if not is_plain_float(weight):
                    return (
                        f"the weights of {name} are quantised or elsewhere ({type(weight).__name__}, {weight.dtype})"
                    )
    return None


def _merged_layer(layer: LoraLayer, stage: str, name: str) -> dict[str, torch.Tensor]:
    weights = layer.get_base_layer().state_dict()
    for weight in weights.values():
        if not is_plain_float(weight):
            raise ValueError(
                f"The weights of {name} are quantised or elsewhere ({type(weight).__name__}, {weight.dtype}, "
                f"{weight.device}), so no adapter can be merged into them. Load the model unquantised, without "
                "offloading, and merge that."
            )
    if adds_a_product(layer, stage):  # without copies of all adapters, which take longer than the sum
        low, up = layer.lora_A[stage].weight.float(), layer.lora_B[stage].weight.float()
        merged = torch.addmm(weights["weight"].float(), up, low, alpha=layer.scaling[stage])  # (out, in)
        if not all_finite(merged):
            raise ValueError(f"The adapter of {name} holds NaN or infinity. Save or download the checkpoint anew.")
        return {**weights, "weight": _rounded(merged, weights["weight"].dtype, name)}
    copied = copy.deepcopy(layer).float()
    copied.merge(safe_merge=True, adapter_names=[stage])
    sums = copied.get_base_layer().state_dict()
    return {key: _rounded(value, weights[key].dtype, name) for key, value in sums.items()}


def _rounded(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Finite numbers in the dtype of a weight, where they fit it."""
    rounded = values.to(dtype)
    if dtype != values.dtype and not all_finite(rounded):
        raise ValueError(
            f"The weights of {name} with their adapter reach {values.abs().max().item():.4g}, which does not fit "
            f"{dtype} (largest {torch.finfo(dtype).max:.4g}). Load the model in torch.bfloat16 or torch.float32, or "
            "with merge_adapters=False."
        )
    return rounded
