"""Stage adapters: one LoRA for the compress pass and one for the generate pass, on PEFT's own layers.

PEFT keeps the active adapter in the layers, for all threads at once, and its `set_adapter` flips `requires_grad`. Here
the stage belongs to the running pass instead: a layer asks `current_stage()` when it runs. So passes of different
stages may run at once in several threads, and the recomputation of gradient checkpointing runs under the stage of the
forward that it repeats (see `checkpoint_stage`).
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .configuration_fwd2bot import STAGES

_running = threading.local()


@contextmanager
def run_stage(stage: str | None) -> Iterator[None]:
    """Run the block under the adapter of `stage`; `None` is the bare backbone. Holds for the calling thread only."""
    previous = current_stage()
    _running.stage = stage
    try:
        yield
    finally:
        _running.stage = previous


def current_stage() -> str | None:
    """The stage that the calling thread runs, `None` outside of `run_stage`."""
    return getattr(_running, "stage", None)


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
    names = {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    if not names:
        raise ValueError(
            f"{type(module).__name__} has no torch.nn.Linear layer to put a LoRA on. Give target_modules."
        )
    return sorted(names)


def lora_arguments(
    adapters: Mapping[str, LoraConfig | Mapping[str, Any]] | None, default: dict[str, Any], language_model: nn.Module
) -> dict[str, dict[str, Any]]:
    """Arguments of `peft.LoraConfig` for both stages, as they stand in a config file.

    Args:
        adapters: a `LoraConfig` or its arguments for one stage or both; `default` for the other.

    Raises:
        ValueError: for an unknown stage, or a LoRA that would train or replace weights of the backbone itself.
    """
    unknown = sorted(set(adapters or {}) - set(STAGES))
    if unknown:
        raise ValueError(f"adapters has the stage(s) {unknown}; the allowed ones are {list(STAGES)}.")
    chosen = {}
    for stage in STAGES:
        lora = (adapters or {}).get(stage, default)
        values = _changed_fields(lora) if isinstance(lora, LoraConfig) else dict(lora)
        for name, harmless in (("modules_to_save", (None, [])), ("bias", (None, "none"))):
            if values.get(name) not in harmless:
                raise ValueError(
                    f"adapters[{stage!r}] has {name}={values[name]!r}, which changes weights of the backbone, and "
                    "they stay as they are. Leave it out."
                )
        if values.get("target_modules") is None:
            values["target_modules"] = linear_layer_names(language_model)
        chosen[stage] = values
    return chosen


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
    inject_adapter_in_model(LoraConfig(**lora), language_model, adapter_name=stage)
    del language_model.peft_config  # PEFT's record of its adapters; here `config.adapters` is that, for both stages
    for module in language_model.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, _StageLayer):
            module.__class__ = _stage_class(type(module))


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


class _StageLayer:
    """Mixed into a PEFT layer: the active adapter is the stage that the calling thread runs."""

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (_stage_class, type(self).__bases__[1]), self.__dict__

    @property
    def active_adapter(self) -> list[str]:
        stage = current_stage()
        return [] if stage is None else [stage]


@functools.cache
def _stage_class(layer_class: type) -> type:
    # As torch.nn.utils.parametrize does: the instance changes class, so its weights, names and state dict stay.
    return type(f"Stage{layer_class.__name__}", (_StageLayer, layer_class), {})


class _QueryEmbedding:
    """Mixed into an input embedding: ids past its last row stand for the learned summary queries."""

    summary_queries: nn.Parameter

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _rebuild, (_query_class, type(self).__bases__[1]), self.__dict__

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        query = input_ids - self.num_embeddings  # (N, L), >= 0 for a query
        is_query = query >= 0
        words = super().forward(input_ids.masked_fill(is_query, 0))  # (N, L, d)
        queries = self.summary_queries[query.clamp(min=0)].to(words.dtype)  # (N, L, d)
        return torch.where(is_query.unsqueeze(-1), queries, words)


@functools.cache
def _query_class(embedding_class: type) -> type:
    return type(f"Query{embedding_class.__name__}", (_QueryEmbedding, embedding_class), {})


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
    embedding.__class__ = _query_class(type(embedding))


def _rebuild(make_class: Callable[[type], type], base: type) -> nn.Module:
    # Classes that are made while the program runs cannot be found by name, so pickle makes them again.
    instance_class = make_class(base)
    return instance_class.__new__(instance_class)
