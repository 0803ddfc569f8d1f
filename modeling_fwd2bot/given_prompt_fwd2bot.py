"""What the caller of `generate()` sees: the prompts as they were given, not as they run, with summaries in place."""

from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput


def show_given_prompt(kwargs: dict[str, Any], input_ids: torch.Tensor, width: int) -> None:
    """Let what the caller gave to `generate()` see `[input_ids][new ids]`, not the prompts `(N, width)` it runs on."""

    def given(ids: torch.Tensor) -> torch.Tensor:
        prompt = input_ids.to(ids.device).repeat_interleave(len(ids) // len(input_ids), 0)  # beams of a row together
        return torch.cat([prompt, ids[:, width:]], 1)

    for name in ("logits_processor", "stopping_criteria"):
        if kwargs.get(name) is not None:
            kwargs[name] = [
                lambda ids, scores, function=function, **options: function(given(ids), scores, **options)
                for function in kwargs[name]
            ]
    allowed = kwargs.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, torch.cat([input_ids[row].to(ids.device), ids[width:]])
        )
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _GivenPromptStreamer(kwargs["streamer"], input_ids)


class _GivenPromptStreamer(BaseStreamer):
    """Hands on to a streamer; the prompts, which come first, as the caller gave them."""

    def __init__(self, streamer: BaseStreamer, input_ids: torch.Tensor):
        self.streamer, self.prompt = streamer, input_ids.cpu()

    def put(self, value: torch.Tensor) -> None:
        prompt, self.prompt = self.prompt, None
        self.streamer.put(value if prompt is None else prompt)

    def end(self) -> None:
        self.streamer.end()


def restore_prompt(
    output: torch.Tensor | ModelOutput, input_ids: torch.Tensor, expanded_length: int
) -> torch.Tensor | ModelOutput:
    """Put the caller's prompt, one placeholder per image, back in front of the new ids."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    repeats = len(sequences) // len(input_ids)  # num_return_sequences
    prompt = input_ids.to(sequences.device)
    prompt = prompt if repeats == 1 else prompt.repeat_interleave(repeats, 0)
    sequences = torch.cat([prompt, sequences[:, expanded_length:]], 1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
