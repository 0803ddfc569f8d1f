"""Pickle and deepcopy of a model that has run, as processes that share the work need them."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
except ImportError:  # private: another version may do without, and loading must not depend on it
    _CAN_RECORD_REGISTRY = None


def without_recording(module: nn.Module, copies: dict[int, nn.Module] | None = None) -> nn.Module:
    """A shallow copy of a tree of modules without the hooks by which transformers records hidden states.

    The first pass of a model installs them, and again in a copy. They are local functions, which pickle refuses.
    """
    copies = {} if copies is None else copies
    if id(module) not in copies:
        copy = copies[id(module)] = module.__new__(type(module))
        state = dict(module.__dict__)
        state.pop("_output_capturing_hooks_installed", None)
        hooks = [(key, hook) for key, hook in module._forward_hooks.items() if not _records(hook)]
        state["_forward_hooks"] = type(module._forward_hooks)(hooks)
        state["_modules"] = {
            name: None if child is None else without_recording(child, copies)
            for name, child in module._modules.items()
        }
        copy.__dict__.update(state)
    return copies[id(module)]


def allow_recording(model: nn.Module) -> None:
    """What each model's `__init__` tells transformers: that its hidden states can be recorded.

    Without it a vision tower that came out of a pickle in a new process has none, and LLaVA reads them.
    """
    for module in model.modules():
        if _CAN_RECORD_REGISTRY is not None and isinstance(module, PreTrainedModel):
            by_class = type(_CAN_RECORD_REGISTRY) is dict  # in earlier versions of transformers
            _CAN_RECORD_REGISTRY[str(type(module)) if by_class else module] = module._can_record_outputs


def _records(hook: Any) -> bool:
    return getattr(hook, "__name__", None) == "output_capturing_hook"
