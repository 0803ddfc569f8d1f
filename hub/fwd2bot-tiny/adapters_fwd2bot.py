"""Stage adapters: one LoRA for the compress pass and one for the generate pass, on PEFT's own layers.

PEFT keeps the active adapter in the layers, for all threads at once, and its `set_adapter` flips `requires_grad`. Here
the stage belongs to the running pass instead: a layer asks `current_stage()` when it runs. So passes of different
stages may run at once in several threads, and the recomputation of gradient checkpointing runs under the stage of the
forward that it repeats (see `checkpoint_stage`).
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .configuration_fwd2bot import STAGES
from .mixed_in_fwd2bot import RUNNING, MixedIn, during, mix_in

# Fields of `LoraConfig` by which training would not be that of an adapter beside the weights, and what they may be.
HARMLESS = {
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}
BASE_LAYER = ".base_layer."  # what PEFT puts into the name of a weight that it wraps


def run_stage(stage: str | None) -> AbstractContextManager[None]:
    """Run a block under the adapter of `stage`; `None` is the bare backbone. Holds for the calling thread only."""
    return during(stage=stage)


def current_stage() -> str | None:
    """The stage that the calling thread runs, `None` outside of `run_stage`."""
    return RUNNING.stage


def answer_words() -> AbstractContextManager[None]:
    """Run a block's generate passes for ids that are words: checked before, or written by the model.

    For the calling thread only. A compress pass within, as a caller's stopping criterion may run one, reads queries.
    """
    return during(words=True)


def reads_words_alone() -> bool:
    """Whether the calling thread runs a generate pass inside of `answer_words`."""
    return RUNNING.words and RUNNING.stage == "generate"


def checkpoint_stage(checkpoint: Callable) -> Callable:
    """`checkpoint`, a function like `torch.utils.checkpoint.checkpoint`, with recomputation under the forward's stage.

    The stage is set inside the checkpointed function because the backward pass runs outside of `run_stage`, and on
    CUDA in another thread.
    """

    def run_checkpoint(function: Callable, *args: Any, **kwargs: Any) -> Any:
        stage = current_stage()

        def run(*inputs: Any) -> Any:
            with run_stage(stage):
                return function(*inputs)

        return checkpoint(run, *args, **kwargs)

    return run_checkpoint


def linear_layer_names(module: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers in a language model: PEFT's `target_modules`."""
    names = {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if _is_linear(child)}
    if not names:
        raise ValueError(f"{type(module).__name__} has no linear layer to put a LoRA on. Give target_modules.")
    return sorted(names)


def _is_linear(module: nn.Module) -> bool:
    # Some quantised layers (HQQ, GPTQ, AWQ) are linear, but no torch.nn.Linear.
    return isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def lora_arguments(
    adapters: Mapping[str, LoraConfig | Mapping[str, Any]] | None, default: dict[str, Any], language_model: nn.Module
) -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig` for both stages, as they stand in a config file.

    Args:
        adapters: a `LoraConfig` or its arguments for one stage or both; `default` for the other.

    Raises:
        ValueError: for an unknown stage, or a LoRA that would train or replace weights of the backbone itself.
    """
    if adapters is not None and not isinstance(adapters, Mapping):
        raise TypeError(
            f"adapters must map stages to LoRA settings, got {type(adapters).__name__}. Give {{'compress': lora, "
            "'generate': lora}."
        )
    unknown = sorted(set(adapters or {}) - set(STAGES))
    if unknown:
        raise ValueError(f"adapters has the stage(s) {unknown}; the allowed ones are {list(STAGES)}.")
    chosen = {}
    for stage in STAGES:
        lora = (adapters or {}).get(stage, default)
        if not isinstance(lora, (LoraConfig, Mapping)):
            raise TypeError(
                f"adapters[{stage!r}] must be a peft.LoraConfig or a dict of its arguments, got {type(lora).__name__}."
            )
        values = _changed_fields(lora) if isinstance(lora, LoraConfig) else dict(lora)
        for name, harmless in HARMLESS.items():
            if values.get(name) not in harmless:
                raise ValueError(
                    f"adapters[{stage!r}] has {name}={values[name]!r}, which changes weights or layers of the "
                    f"backbone, and they stay as they are. Leave it out{_or_choose(harmless)}."
                )
        if values.get("layers_to_transform") is not None:  # PEFT finds no layers by number in a bare language model
            raise ValueError(
                f"adapters[{stage!r}] has layers_to_transform={values['layers_to_transform']!r}, which is not "
                "supported. Name the layers by a regular expression: target_modules=r'layers\\.(0|1)\\..*up_proj'."
            )
        if values.get("target_modules") is None:
            values["target_modules"] = linear_layer_names(language_model)
        chosen[stage] = values
    return chosen


def _or_choose(values: tuple[Any, ...]) -> str:
    named = [repr(value) for value in values if value is not None and value != []]
    return f", or choose {' or '.join(named)}" if named else ""


def _changed_fields(lora: LoraConfig) -> dict[str, Any]:
    """The fields of a `LoraConfig` that differ from its defaults, as JSON takes them."""
    default, values = LoraConfig().to_dict(), lora.to_dict()
    changed = {name: value for name, value in values.items() if value != default.get(name)}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()}


def install_adapter(language_model: nn.Module, stage: str, lora: dict[str, Any]) -> None:
    """Inject the LoRA of `stage` into the language model, where only `run_stage(stage)` wakes it.

    Args:
        lora: arguments of `peft.LoraConfig` (`r`, `lora_alpha`, `target_modules`, ...).
    """
    config = LoraConfig(**lora)
    if next(language_model.parameters()).is_meta:  # its weights are about to be read, and drawing some takes time
        config.init_lora_weights = False
    try:
        inject_adapter_in_model(config, language_model, adapter_name=stage)
    except ValueError as error:
        raise ValueError(
            f"The adapter of the stage {stage!r} does not fit the language model, {type(language_model).__name__}, to "
            f"which the names in target_modules are relative ('layers.0.self_attn.q_proj'): {error}"
        ) from error
    if any(_adapts_embedding(module) for module in language_model.modules()):
        raise ValueError(
            f"The adapter of the stage {stage!r} has the word embedding among its target_modules, which holds the "
            "summary queries here. Leave it out."
        )
    del language_model.peft_config  # PEFT's record of its adapters; here `config.adapters` is that, for both stages
    for module in language_model.modules():
        if isinstance(module, LoraLayer):
            mix_in(_StageLayer, module)


def _adapts_embedding(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Embedding)


def left_out_pattern(stage: str) -> str:
    """Pattern of the names of a stage's adapter weights, to be passed over where that stage is not loaded."""
    return rf"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.{stage}(\.weight|\.bias)?$"


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter name belongs to a stage adapter."""
    return ".lora_" in name


def drop_vision(backbone: PreTrainedModel) -> list[str]:
    """Remove what the generate pass does not use; returns patterns of the names of the removed weights."""
    base, decoder = backbone.base_model, backbone.get_decoder()
    patterns = []
    for name, child in list(base.named_children()):
        if not any(module is decoder for module in child.modules()):
            setattr(base, name, None)
            patterns.append(rf"\.{name}\.")
    return patterns


def drop_head(backbone: PreTrainedModel) -> list[str]:
    """Remove the output head, which the compress pass does not use; returns patterns of the names of its weights.

    A head that shares its weight with the input embedding stays: it takes no memory.
    """
    head = backbone.get_output_embeddings()
    name = next((name for name, module in backbone.named_modules() if module is head), None)
    if name is None or f"{name}.weight" in backbone.all_tied_weights_keys:
        return []
    parent, _, last = name.rpartition(".")
    setattr(backbone.get_submodule(parent), last, None)
    return [rf"(^|\.){re.escape(last)}\."]


def adds_a_product(layer: LoraLayer, stage: str) -> bool:
    """Whether the adapter adds a product of two matrices to an ordinary linear layer, and nothing else."""
    ordinary = isinstance(layer, Linear) and type(layer.base_layer) is nn.Linear
    return ordinary and stage not in layer.lora_variant and not layer.lora_bias.get(stage)


def is_plain_float(weight: torch.Tensor) -> bool:
    """Whether a weight holds its numbers as they are: not quantised, not offloaded, not divided among processes."""
    here = weight.numel() > 0 and not weight.is_meta
    return type(weight.data) is torch.Tensor and weight.is_floating_point() and here


class _StageLayer(MixedIn):
    """Mixed into a PEFT layer: the active adapter is the stage that the calling thread runs."""

    prefix = "Stage"

    @property
    def active_adapter(self) -> list[str]:
        stage = current_stage()
        return [] if stage is None else [stage]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        stage = current_stage()
        if args or kwargs or torch.is_grad_enabled() or torch.compiler.is_compiling() or not self._is_plain(stage, x):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)  # (..., out)
        if stage not in self.lora_A:
            return result
        low = F.linear(x, self.lora_A[stage].weight)  # (..., r)
        up = self.lora_B[stage].weight.t()  # (r, out)
        # In place: what PEFT's own sum costs beyond its products is three more passes over the result.
        result.view(-1, up.shape[1]).addmm_(low.view(-1, up.shape[0]), up, alpha=self.scaling[stage])
        return result

    def _is_plain(self, stage: str | None, x: torch.Tensor) -> bool:
        """Whether the layer adds a product of two matrices in the dtype of its input, and nothing else."""
        if self.root_class is not Linear or not adds_a_product(self, stage):
            return False
        if self.merged or self.disable_adapters or self.base_layer._forward_hooks:  # which may keep the base's result
            return False
        if stage not in self.lora_A:
            return True
        return (
            not hasattr(self.lora_A[stage], "_hf_hook")  # by which accelerate brings an offloaded weight
            and (not self.training or isinstance(self.lora_dropout[stage], nn.Identity))
            and self.lora_A[stage].weight.dtype == self.lora_B[stage].weight.dtype == x.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )


class _QueryEmbedding(MixedIn):
    """Mixed into an input embedding: ids past its last row stand for the learned summary queries."""

    prefix = "Query"
    summary_queries: nn.Parameter

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if reads_words_alone():
            return super().forward(input_ids)
        query = input_ids - self.num_embeddings  # (N, L), >= 0 for a query
        is_query = query >= 0
        words = super().forward(input_ids.masked_fill(is_query, 0))  # (N, L, d)
        queries = self.summary_queries[query.clamp(min=0)].to(words.dtype)  # (N, L, d)
        return torch.where(is_query.unsqueeze(-1), queries, words)


def install_queries(embedding: nn.Module, queries: torch.Tensor) -> None:
    """Give the input embedding `(K, d)` learned queries at the ids after its last row.

    They are no rows of its weight: a tied output head never sees them, so a query cannot become a generated word, and
    an embedding that scales its words (Gemma) leaves them alone.
    """
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(
            f"The backbone's input embedding must be a torch.nn.Embedding, got {type(embedding).__name__}."
        )
    embedding.summary_queries = nn.Parameter(queries)
    mix_in(_QueryEmbedding, embedding)
