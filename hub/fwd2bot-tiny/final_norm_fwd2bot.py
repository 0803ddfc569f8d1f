"""The language model's final norm, which the compress pass may leave out: summaries of what the last layer gives."""

from typing import Any

from torch import nn

from .mixed_in_fwd2bot import RUNNING, MixedIn, mix_in


def install_final_norm(decoder: nn.Module) -> None:
    """Let a language model's final norm be left out by `during(without_norm=True)`.

    Raises:
        ValueError: the language model has no `norm`.
    """
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        raise ValueError(
            f"summary_norm=False needs a language model whose final norm is its `norm`; {type(decoder).__name__} has "
            "none. Leave summary_norm at True."
        )
    mix_in(FinalNorm, norm)


class FinalNorm(MixedIn):
    """Mixed into the final norm of a language model."""

    prefix = "Final"

    def forward(self, hidden_states: Any, *inputs: Any, **kwargs: Any) -> Any:
        return hidden_states if RUNNING.without_norm else super().forward(hidden_states, *inputs, **kwargs)
