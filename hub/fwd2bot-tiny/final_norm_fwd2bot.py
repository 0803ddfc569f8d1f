"""The language model's final norm, which the compress pass may leave out: summaries of what the last layer gives."""

from typing import Any

from torch import nn

from .mixed_in_fwd2bot import RUNNING


def install_final_norm(decoder: nn.Module) -> None:
    """Let a language model's final norm be left out by `during(without_norm=True)`.

    By a hook, since kernels of transformers and others put a `forward` of their own in the place of a norm's.

    Raises:
        ValueError: the language model has no `norm`.
    """
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(
            f"summary_norm=False needs a language model whose final norm is its `norm`; {type(decoder).__name__} has "
            "none. Leave summary_norm at True."
        )
    norm.register_forward_hook(_as_given)


def _as_given(norm: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
    return given[0] if RUNNING.without_norm else None
