"""Conversations as token ids, of which the assistant's turns are learnt, for the chat template of any backbone."""

import re
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from fwd2bot import Fwd2BotProcessor

from ..data import IGNORED
from .rows import MalformedRowError

Messages = list[dict[str, Any]]  # {"role", "content": [{"type": "image"} or {"type": "text", "text"}]}
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation, one image token for each image.

    Args:
        text: as the chat template writes it, with the end tokens that it leaves out.
        input_ids, labels: of equal length; labels are IGNORED outside the assistant's turns.
    """

    text: str
    input_ids: list[int]
    labels: list[int]


class ConversationEncoder:
    """Renders conversations by the backbone's chat template and finds what is learnt: answers and their end tokens.

    Where an answer begins is read from the template's `{% generation %}` blocks; a template that has none is rendered
    once more for each answer, up to the prompt for it, which must be how the whole begins. An answer ends with the
    token that the template writes behind the last one. Where it writes none (LLaVA-1.5) the tokenizer's end token is
    put, in place of spaces, so that the model learns to stop.

    Args:
        processor: its `backbone_processor` has a fast tokenizer.

    Raises:
        ValueError: naming the processor, for a template by which it cannot be told what the assistant says.
    """

    def __init__(self, processor: Fwd2BotProcessor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.name = f"the chat template of {type(processor.backbone_processor).__name__}"
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{self.name} has a slow tokenizer ({type(self.tokenizer).__name__}), which does not say where its "
                "tokens lie in the text. Load the backbone's processor with use_fast=True."
            )
        self.image_token = processor.image_token
        self.merged_token = self.tokenizer.convert_ids_to_tokens(processor.image_token_id)
        self.has_generation = GENERATION.search(processor.chat_template) is not None
        self._specials = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special and token.content not in (self.image_token, self.merged_token)
        ]
        try:
            self.end_token = self._find_end_token()
            self._check_template()
        except MalformedRowError as error:
            raise ValueError(
                f"{self.name} does not show what the assistant says: {error}. Put {{% generation %}} and "
                "{% endgeneration %} around the assistant's words in it, or correct it."
            ) from error

    def __call__(self, messages: Messages) -> EncodedConversation:
        """Encode a conversation that has at least one turn of the assistant.

        Raises:
            MalformedRowError: when the template cannot write it so that its answers are found.
        """
        pieces = self._pieces(messages)
        merged = [(text.replace(self.image_token, self.merged_token), learnt) for text, learnt in pieces]
        encoded = self.processor._tokenize(
            ["".join(text for text, _ in merged)], return_tensors=None, return_offsets_mapping=True, verbose=False
        )
        [input_ids], [offsets] = encoded["input_ids"], encoded["offset_mapping"]
        labels = [IGNORED] * len(input_ids)
        position = 0
        for text, learnt in merged:
            start, position = position, position + len(text)
            if learnt:  # a token that begins before the answer and reaches into it is learnt: it holds the answer
                for index, (first, end) in enumerate(offsets):
                    if first < position and end > start:
                        labels[index] = input_ids[index]
        images = sum(part["type"] == "image" for message in messages for part in message["content"])
        found = input_ids.count(self.processor.image_token_id)
        if found != images:
            raise MalformedRowError(f"it has {images} image(s), but {self.name} wrote {found} image token(s)")
        return EncodedConversation("".join(text for text, _ in pieces), input_ids, labels)

    def fitting(self, messages: Messages, max_length: int) -> tuple[Messages, EncodedConversation] | None:
        """The turns of a conversation that fit into `max_length` tokens, up to an answer; None if there are none."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise MalformedRowError("no turn of the assistant: there is nothing to learn")
        for last in reversed(answers):
            encoded = self(messages[: last + 1])
            if len(encoded.input_ids) <= max_length:
                return messages[: last + 1], encoded
        return None

    def num_tokens(self, text: str) -> int:
        """Tokens of a caption by itself."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _pieces(self, messages: Messages) -> list[tuple[str, bool]]:
        """The rendered conversation in pieces, each with whether it is learnt."""
        messages = [self._without_image_tokens(message) for message in messages]
        answers = ["".join(p["text"] for p in m["content"]) for m in messages if m["role"] == "assistant"]
        text, starts = self._starts(messages)
        if len(starts) != len(answers):
            raise MalformedRowError(f"it has {len(answers)} answer(s), but {self.name} wrote {len(starts)}")
        pieces, position = [], 0
        for start, answer in zip(starts, answers, strict=True):
            content = start + len(text[start:]) - len(text[start:].lstrip())
            if start < position or not text.startswith(answer, content):
                raise MalformedRowError(f"{self.name} does not write the answer {answer[:40]!r} as it is")
            end = content + len(answer)
            blank = len(text[end:]) - len(text[end:].lstrip())
            after = text[end + blank :]
            ends = [token for token in (self.end_token, self.tokenizer.eos_token) if after.startswith(token)]
            pieces.append((text[position:start], False))
            if ends:
                position = end + blank + len(ends[0])
                pieces.append((text[start:position], True))
            else:
                position = end + len(text[end:]) - len(text[end:].lstrip(" "))
                pieces.append((text[start:end] + self.end_token, True))
        return [*pieces, (text[position:], False)]

    def _starts(self, messages: Messages) -> tuple[str, list[int]]:
        """The rendered conversation, and where each answer begins in it."""
        if self.has_generation:
            try:
                rendered, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.processor.chat_template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
            except TemplateError as error:
                raise MalformedRowError(f"{self.name} refuses it: {error}") from error
            return rendered[0], [start for start, _ in spans[0]]
        text, starts = self._render(messages), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:index], add_generation_prompt=True)
                if not text.startswith(prompt):
                    raise MalformedRowError(
                        f"{self.name} writes the prompt of an answer ({prompt[-60:]!r}) otherwise than it stands "
                        "before the answer"
                    )
                starts.append(len(prompt))
        return text, starts

    def _render(self, messages: Messages, **options: Any) -> str:
        try:
            return self.processor.apply_chat_template(messages, **options)
        except TemplateError as error:  # two turns of the user, or a system turn where there is none
            raise MalformedRowError(f"{self.name} refuses it: {error}") from error

    def _without_image_tokens(self, message: dict[str, Any]) -> dict[str, Any]:
        """Words cannot stand for a picture that is not there, and white space around a turn is the template's own."""
        parts = [
            part | {"text": part["text"].replace(self.image_token, " ").replace(self.merged_token, " ")}
            if part["type"] == "text"
            else part
            for part in message["content"]
        ]
        if message["role"] == "assistant":
            parts = [{"type": "text", "text": "".join(part["text"] for part in parts).strip()}]
            if not parts[0]["text"]:
                raise MalformedRowError("an answer of the assistant is empty")
        return message | {"content": parts}

    def _find_end_token(self) -> str:
        """What ends the assistant's turn: the first special token that the template writes after the last answer."""
        answer = _PROBE[-1]["content"][0]["text"]
        tail = self._render(_PROBE).rpartition(answer)[2]
        found = [(tail.index(token), token) for token in self._specials if token in tail]
        end_token = min(found)[1] if found else self.tokenizer.eos_token
        if end_token is None:
            raise ValueError(
                f"{self.name} writes no token after an answer, and the tokenizer has no eos_token, so a model could "
                "not learn to stop. Set eos_token."
            )
        return end_token

    def _check_template(self) -> None:
        answers = [message["content"][0]["text"] for message in _PROBE if message["role"] == "assistant"]
        encoded = self(_PROBE)
        learnt = [token for token in encoded.labels if token != IGNORED]
        told = self.tokenizer.decode(learnt, skip_special_tokens=False)
        if re.sub(r"\s+", "", told) != "".join(f"{answer}{self.end_token}" for answer in answers):
            raise MalformedRowError(f"what would be learnt of {answers} is {told!r}")


_PROBE: Messages = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Question-one?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Answer-one."}]},
    {"role": "user", "content": [{"type": "text", "text": "Question-two?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Answer-two."}]},
]
