"""Modules that are given another `forward` and stay what they are, and what the calling thread is about to run.

As `torch.nn.utils.parametrize` does it, the instance changes class: its weights, names, hooks and state dict stay.
Beside hooks this costs next to nothing in each call.
"""

import functools
import threading
from types import TracebackType
from typing import Any

from torch import nn


class Running(threading.local):
    """What the calling thread runs; what holds outside of all blocks is in the class."""

    stage: str | None = None
    words: bool = False
    last: int | None = None
    without_norm: bool = False


RUNNING = Running()


class during:  # noqa: N801, a context manager as in contextlib
    """Let `RUNNING` have other values within a block, for the calling thread only."""

    def __init__(self, **values: Any):
        self.values = values

    def __enter__(self) -> None:
        self.before = {name: getattr(RUNNING, name) for name in self.values}
        for name, value in self.values.items():
            setattr(RUNNING, name, value)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, value in self.before.items():
            setattr(RUNNING, name, value)


class MixedIn:
    """Base of the classes that are put in front of a module's own by `mix_in`."""

    prefix: str
    root_class: type  # that of the module before all
    mixins: tuple[type, ...] = ()

    def __reduce_ex__(self, protocol: int) -> tuple:
        # Classes that are made while the program runs cannot be found by name, so pickle makes them again.
        return _rebuild, (self.root_class, *self.mixins), self.__getstate__()


def mix_in(mixin: type[MixedIn], module: nn.Module) -> None:
    """Put `mixin` in front of the class of one module, once.

    Raises:
        TypeError: for a class whose instances Python lays out otherwise, such as one with `abc.ABC` in front.
    """
    if isinstance(module, mixin):
        return
    left_behind = getattr(vars(module).get("forward"), "__func__", None) is type(module).forward
    module.__class__ = _mixed_class(mixin, type(module))
    if left_behind:  # by accelerate, where it takes its hooks away; it would hide that of the class
        del module.forward
    if hasattr(module, "_old_forward"):  # what accelerate's hooks call, which move inputs between devices
        module._old_forward = type(module).forward.__get__(module)


@functools.cache
def _mixed_class(mixin: type[MixedIn], base: type) -> type:
    mixins = (*getattr(base, "mixins", ()), mixin)
    made = {"root_class": getattr(base, "root_class", base), "mixins": mixins}
    return type(f"{mixin.prefix}{base.__name__}", (mixin, base), made)


def _rebuild(root_class: type, *mixins: type[MixedIn]) -> nn.Module:
    made = root_class
    for mixin in mixins:
        made = _mixed_class(mixin, made)
    return made.__new__(made)
