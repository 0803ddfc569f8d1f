"""A conversation about a few pictures of a store, in which the model reads their summaries once."""

import time
from typing import Any

import torch

from fwd2bot.placeholders_fwd2bot import expand_placeholders

from .rag_context import check_room, numbered_prompt, question_text

# Arguments of `generate()` that would leave a cache that cannot be gone on with, or are set by the chat itself.
REFUSED = ("use_cache", "cache_implementation", "cache_config", "return_dict_in_generate")


class RagChat:
    """Several questions about the same pictures; `pipe.chat(…)` of `fwd2bot-rag` makes it.

    Each question is asked with the whole conversation before it. What the model has read of it stays in its key/value
    cache, so that only what is new is computed. Before it is used, the tokens of the conversation are compared with
    those that were read: from the first that differs on, the conversation is read anew; all of it, where the cache
    cannot be cut there (layers with a sliding window or a recurrent state), or the model's generation config asks for
    a `cache_implementation` of its own.

    Attributes:
        messages: the conversation, to be read; a new chat begins another one.
        pictures: those that it is about, as the pipeline returns them.
    """

    def __init__(self, pipe: Any, pictures: list[dict[str, Any]], summary: Any, seconds: dict[str, float]):
        self._pipe, self._summary, self._seconds = pipe, summary, seconds
        self.pictures = pictures
        self.messages: list[dict[str, Any]] = []
        self._cache: Any = None
        self._read = torch.zeros(0, dtype=torch.long)  # (P,) the ids in the cache, one for each summary token

    def ask(self, question: str, **generate: Any) -> dict[str, Any]:
        """Answer the next question.

        Args:
            question: a `str`.
            generate: as in a call of `fwd2bot-rag`: arguments of `generate()`, `stop_sequence`, ….

        Returns:
            As a call of `fwd2bot-rag`; the time of retrieving and reading is that of the first question's. Also
            "tokens": how many the prompt has, summaries in place, and how many of them were in the cache.

        Raises:
            TypeError, ValueError: for an empty question, an argument that a chat cannot have, or a conversation that
                has become longer than the model reads. The chat stays as it was.
        """
        question_text(question)
        if not isinstance(question, str):
            raise TypeError("A chat asks one question after the other. Give each as a str.")
        pipe = self._pipe
        _, forward, after = pipe._sanitize_parameters(**generate)
        kwargs = {**pipe._forward_params.get("generate_kwargs", {}), **forward.pop("generate_kwargs", {})}
        refused = sorted({*forward, *(set(REFUSED) & set(kwargs))})
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot be chosen for a question of a chat. Leave it out.")
        kwargs = pipe._generate_arguments(kwargs, return_dict_in_generate=True)
        settings = pipe._settings(kwargs)
        if (settings.get("num_beams") or 1) > 1:
            raise ValueError("A chat follows one answer and has no beams. Leave out num_beams.")

        begin = time.perf_counter()
        messages = [*self.messages, {"role": "user", "content": [{"type": "text", "text": question}]}]
        asked = numbered_prompt(messages, len(self.pictures), pipe.processor)
        inputs = pipe.processor(text=[asked], verbose=False)  # what is too long is an error below
        prompt = self._in_place(inputs)  # (L',)
        check_room(pipe.model, len(prompt), settings, f"{len(self.pictures)} summaries and all that was said")
        cache, self._cache = self._usable_cache(prompt), None  # which is of no use when an error comes
        cached = 0 if cache is None else cache.get_seq_length()
        inputs = inputs.to(pipe.device)
        output = pipe.model.generate_from_summary(self._summary, **inputs, past_key_values=cache, **kwargs)
        [[ids]] = pipe._new_ids(output.sequences, inputs["input_ids"], kwargs)
        if output.past_key_values is not None and not settings.get("cache_implementation"):
            self._cache = output.past_key_values
            new = output.sequences[0, inputs["input_ids"].shape[1] :].cpu()
            # Of the new ids, the last has not been read.
            self._read = torch.cat([prompt, new])[: self._cache.get_seq_length()]
        seconds = {**self._seconds, "answer": time.perf_counter() - begin}

        result = pipe.postprocess(
            {"question": question, "text": question, "ids": [ids], "pictures": self.pictures, "seconds": seconds},
            **{**pipe._postprocess_params, **after},
        )
        said = {"role": "assistant", "content": [{"type": "text", "text": result["answer"]}]}
        self.messages = [*messages, said]
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return {**result, "tokens": {"prompt": len(prompt), "cached": cached}}

    def _in_place(self, inputs: Any) -> torch.Tensor:
        """The ids of the prompt `(L',)` with as many placeholders as there are summary tokens."""
        model = self._pipe.model
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        expanded = expand_placeholders(ids, mask, self._summary.lengths, model.image_token_id, model._pad_token_id)
        return expanded["input_ids"][0]

    def _usable_cache(self, prompt: torch.Tensor) -> Any:
        """The cache, cut to what it has in common with the beginning of the prompt; None where there is none."""
        if self._cache is None:
            return None
        length = min(len(self._read), len(prompt) - 1)  # the last token is always read, for what follows it
        differs = (self._read[:length] != prompt[:length]).nonzero()
        common = int(differs[0]) if len(differs) else length
        surplus = len(self._read) - common
        if common == 0 or surplus and (not self._cache.is_croppable or any(self._cache.is_sliding)):
            return None
        if surplus:
            self._cache.crop(-surplus)
        return self._cache
