"""The fingerprint of a model: by what it trained, in whatever dtype, merged or copied, until a value changes."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .pickling_fwd2bot import allow_recording, without_recording


class FingerprintMixin:
    """`fingerprint` of [`Fwd2BotForConditionalGeneration`], which pickle and deepcopy keep."""

    _merged_fingerprint: str | None = None  # of the checkpoint whose adapters are not to be seen any more
    _loaded_hash: str | None = None  # of the weights as they were loaded, merged or in another dtype
    _loaded_fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """Hash of the trained weights: that of the loaded checkpoint, in whatever dtype, until their values change.

        What changes weights behind autograd's back (`parameter.data`) is not seen.
        """
        versions, known = _versions(self), self.config.fingerprint
        if known is None or self.__dict__.get("_fingerprinted") != versions:
            trained = self.trained_parameters()
            if known is None or not any(value.is_meta for value in trained.values()):
                found = weights_fingerprint(trained, self._merged_fingerprint)
                known = self.config.fingerprint = self._loaded_fingerprint if found == self._loaded_hash else found
        self.__dict__["_fingerprinted"] = versions
        return known

    def _remember_weights(self) -> None:
        """Note the hash of the weights as they are now, with the fingerprint that the checkpoint gives them.

        The two differ for merged weights, and in another dtype than that of the first save. Weights that are written
        or put in place anew with the values that they had (accelerate, `load_state_dict`) are so known again.
        """
        self._fingerprinted = _versions(self)
        trained = self.trained_parameters()
        elsewhere = any(value.is_meta or value.numel() == 0 for value in trained.values())  # offloaded or sharded
        if self.config.fingerprint is not None and not elsewhere:
            self._loaded_hash = weights_fingerprint(trained, self._merged_fingerprint)
            self._loaded_fingerprint = self.config.fingerprint

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Of `half()`, `to()` and their like, which round the weights and leave the counters as they are."""
        known = self.config.fingerprint is not None and self.__dict__.get("_fingerprinted") == _versions(self)
        before = _dtypes(self) if known else []
        module = super()._apply(*args, **kwargs)
        if known and _dtypes(self) != before:
            self._remember_weights()
        return module

    def __getstate__(self) -> dict[str, Any]:
        versions = _versions(self)
        state = dict(without_recording(self).__dict__)  # of pickle and deepcopy, which count the versions anew
        state["_fingerprinted"] = "before copying" if state.get("_fingerprinted") == versions else None
        for name in ("_trained_places", "_words"):  # which point into this model
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._fingerprinted is not None:
            self._fingerprinted = _versions(self)
        allow_recording(self)


def weights_fingerprint(parameters: Mapping[str, torch.Tensor], merged: str | None = None) -> str:
    """16 hexadecimal digits that identify trained weights: names, shapes and values, in order of name.

    Args:
        merged: the fingerprint of a model whose adapters were merged, since they are not among its parameters.

    Raises:
        ValueError: for weights that are not here, because they are offloaded or another process has them.
    """
    digest = hashlib.sha256((merged or "").encode())
    for name in sorted(parameters):
        value = parameters[name].detach()
        if hasattr(value, "full_tensor"):  # a DTensor, of which this process may hold a part
            value = value.full_tensor()
        if value.is_meta or value.numel() == 0:
            raise ValueError(
                f"The weights {name!r} are not in this process (offloaded or sharded), so they have no fingerprint. "
                "Bring them together first, or load the model without offloading."
            )
        value = value.float().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def _versions(model: Any) -> list[int]:
    """How often each trained weight has been written to, as autograd counts it.

    Each summary asks for it, and a walk through all modules would take longer than a step of a small model.
    """
    places = model.__dict__.get("_trained_places")
    if places is None or any(holder.get(key) is not value for holder, key, value in places):
        if places is not None:  # other tensors are there, which may have been written to as often
            model.__dict__["_fingerprinted"] = None
        places = model.__dict__["_trained_places"] = _trained_places(model)
    weights = (value for _, _, value in places if isinstance(value, torch.Tensor))
    return [0 if value.is_inference() else value._version for value in weights]


def _dtypes(model: nn.Module) -> list[torch.dtype]:
    return [value.dtype for value in model.trained_parameters().values()]


def _trained_places(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Where the trained weights are, and the modules on the way to them: a dictionary, a key, what is there."""
    trained = {id(value) for value in model.trained_parameters().values()}
    places: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
    for path, module in model.named_modules():
        weights = [(key, value) for key, value in module._parameters.items() if id(value) in trained]
        parent = model
        for name in path.split(".") if weights and path else ():
            places[id(parent._modules), name] = (parent._modules, name, parent._modules[name])
            parent = parent._modules[name]
        for key, value in weights:
            places[id(module._parameters), key] = (module._parameters, key, value)
    return list(places.values())
