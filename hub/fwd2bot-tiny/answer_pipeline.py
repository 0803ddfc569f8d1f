"""`fwd2bot-answer`: questions about pictures, or about their summaries alone."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .pipeline_batches import (
    NO_SUMMARY,
    BatchedPipeline,
    checked_picture,
    each_input,
    is_picture,
    is_summary,
)

OWN_PARAMETERS = (
    "num_summary_tokens", "max_new_tokens", "generate_kwargs", "stop_sequence", "return_full_text", "return_tensors",
    "skip_special_tokens", "clean_up_tokenization_spaces",
)  # fmt: skip
RUN_PARAMETERS = ("batch_size", "num_workers", "progress")


class AnswerPipeline(BatchedPipeline):
    """Ask about pictures. Each is compressed first; the answer comes from its summary alone, which may be an old one.

    ```python
    pipe = pipeline("fwd2bot-answer")
    pipe("How many things are there?", images="a.jpg")                    # [{"generated_text": "three"}]
    pipe(["Is there a dog?", "What colour is the field?"], images="a.jpg")   # compressed once, a list per question
    pipe("Is there a dog?", summary=summary[3], max_new_tokens=8, streamer=streamer)
    ```

    Unless the call or the model's generation config say otherwise, an answer has at most 256 tokens.
    """

    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def __call__(self, questions: Any, *, images: Any = None, summary: Any = None, **kwargs: Any) -> Any:
        """Answer one question, a list of questions, or a stream of rows.

        Args:
            questions: a `str`, in which image tokens may mark the places of the pictures (otherwise they come first);
                or a chat, a list of messages with "role" and "content", `{"type": "image"}` at their places; or a list
                of these. Or rows that bring their own pictures, `{"question": …, "images": …}` or `{"question": …,
                "summary": …}`: one, a list, a data set (columns "question" and "images" or "image"), an iterator.
            images: for one question a picture, or a list of the several that it is about. For a list of questions one
                picture that all are about, or a list with an entry (a picture or a list) for each.
            summary: instead of images a `Fwd2BotSummary` or a `(N, k, d)` tensor. For one question all of it; for a
                list of questions a single summary for all, one of as many pictures as there are questions, or a list
                with a summary for each.
            num_summary_tokens: length k to which `images` are compressed. Default: the largest that the model has.
            max_new_tokens, do_sample, num_beams, streamer, generation_config, …: any argument of `generate()`, here or
                together in `generate_kwargs`. A streamer sees one question after the other.
            stop_sequence: text or texts after which an answer ends.
            return_full_text: with the question (or, for a chat, the messages) before the answer. Default: False.
            return_tensors: "generated_token_ids", the new ids, in place of "generated_text".
            skip_special_tokens, clean_up_tokenization_spaces: of the decoding.
            batch_size, num_workers, progress: see [`BatchedPipeline`].

        Returns:
            For one question `[{"generated_text": str}]`, with as many entries as `num_return_sequences`. For a list of
            questions a list of such lists; for a data set or an iterator an iterator of them.

        Raises:
            TypeError, ValueError, FileNotFoundError: before any compute for an empty list, for both or neither of
                images and summary, for numbers of questions, pictures and placeholders that do not match (naming
                them), or for an argument that `generate()` does not have.
        """
        running = {name: kwargs.pop(name) for name in RUN_PARAMETERS if name in kwargs}
        _, forward_params, _ = self._sanitize_parameters(**kwargs)
        several = isinstance(questions, (list, tuple)) and not _is_chat(questions)
        single = not several and (isinstance(questions, (str, Mapping)) or _is_chat(questions))
        streamer = {**self._forward_params.get("generate_kwargs", {}), **forward_params.get("generate_kwargs", {})}
        if (
            streamer.get("streamer") is not None
            and not single
            and (running.get("batch_size") or self._batch_size or 1) > 1
        ):
            raise ValueError("A streamer follows one question at a time. Leave out batch_size, or the streamer.")
        if images is None and summary is None:
            rows = questions
        elif single:
            rows = _row(questions, images, summary)
        elif several:
            rows = self._pair(list(questions), images, summary, forward_params)
        else:
            raise TypeError(
                f"Questions in a {type(questions).__name__} cannot be paired with images or summary. Give rows with "
                "their own, {'question': …, 'images': …}, or a list of questions."
            )
        inputs = self._input(rows) if single else each_input(rows, self._input, "question", _columns(rows))
        return super().__call__(inputs, **kwargs, **running)

    def _pair(self, questions: list[Any], images: Any, summary: Any, forward_params: dict) -> list[dict]:
        """One row for each of several questions."""
        if not questions:
            raise ValueError("No question was given: the list is empty.")
        if images is not None and summary is not None:
            _row(questions[0], images, summary)
        if images is not None and is_picture(images):
            for question in questions:
                self._prompt(question, 1)
            picture = self.processor.load_image(checked_picture(images))
            length = {**self._forward_params, **forward_params}.get("num_summary_tokens")
            summary, images = self.compress_pictures([picture], length), None
        name, values = ("images", images) if summary is None else ("summary", summary)
        if is_summary(values):
            count = _count(values)
            values = [values[:]] * len(questions) if count == 1 else [values[i : i + 1] for i in range(count)]
        if not isinstance(values, Iterable):
            raise TypeError(f"{name} for several questions must be a list with an entry for each, got {values!r}.")
        if not isinstance(values, (list, tuple)):
            # A stream is read no further than to see that it is too long.
            values = list(islice(iter(values), len(questions) + 1))
        if len(values) != len(questions):
            raise ValueError(
                f"{len(questions)} question(s) were given with {name} for {len(values)}. Give one entry for each "
                "question (a list where one is about several pictures), or a single one for all."
            )
        return [_row(question, **{name: value}) for question, value in zip(questions, values, strict=True)]

    def _input(self, row: Any) -> dict[str, Any]:
        """A row -> its prompt, its checked pictures or summary, and what was asked."""
        if not isinstance(row, Mapping):
            _row(row)
        questions = [row[name] for name in ("question", "text") if row.get(name) is not None]
        if len(questions) != 1:
            raise ValueError(f"A row must have a 'question' (or 'text'), got the keys {sorted(map(str, row))}.")
        images = row["image"] if row.get("images") is None and "image" in row else row.get("images")
        [question] = questions
        _row(question, images, row.get("summary"))
        if images is None:
            if not is_summary(row["summary"]):
                raise TypeError(NO_SUMMARY.format(type(row["summary"]).__name__))
            about = {"summary": row["summary"]}
            count = _count(row["summary"])
        else:
            pictures = [images] if is_picture(images) or isinstance(images, Mapping) else images
            about = {"pictures": list(each_input(pictures, checked_picture, "picture"))}
            count = len(about["pictures"])
            if count == 0:
                raise ValueError("No picture was given: images is empty.")
        return {"question": question, "prompt": self._prompt(question, count), **about}

    def _prompt(self, question: Any, num_pictures: int) -> str:
        """The question in the chat template, with a placeholder for each picture."""
        token = self.processor.image_token
        placeholders = [{"type": "image"}] * num_pictures
        if isinstance(question, str):
            if not question.strip():
                raise ValueError("The question is empty. Give at least one word.")
            content = [{"type": "text", "text": question}]
            chat = [{"role": "user", "content": content if token in question else [*placeholders, *content]}]
        elif _is_chat(question):
            chat = [_message(message, token) for message in question]
            if not any(part["type"] == "image" for message in chat for part in message["content"]):
                first = next((message for message in chat if message["role"] == "user"), None)
                if first is None:
                    raise ValueError("The chat has no message of the role 'user'. Add the question as one.")
                first["content"] = [*placeholders, *first["content"]]
        else:
            raise TypeError(f"A question must be a str or a chat (a list of messages), got {type(question).__name__}.")
        if chat[-1]["role"] == "assistant":
            raise ValueError("The chat ends with an answer. Let a message of the role 'user' come last.")
        prompt = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        found = prompt.count(token)
        if found != num_pictures:
            raise ValueError(
                f"The question has {found} place(s) for pictures (marked by {token!r} or {{'type': 'image'}}), but "
                f"{num_pictures} picture(s) were given. Mark one for each, or none to have them all come first."
            )
        return prompt

    def _sanitize_parameters(
        self,
        num_summary_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        stop_sequence: str | list[str] | None = None,
        return_full_text: bool | None = None,
        return_tensors: bool | None = None,
        skip_special_tokens: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        **generate: Any,
    ) -> tuple[dict, dict, dict]:
        twice = sorted(set(generate) & set(generate_kwargs or {}))
        if twice:
            raise ValueError(f"{twice} was given twice, in generate_kwargs and as an argument. Use one of the two.")
        generate = {**(generate_kwargs or {}), **generate}
        _check_generate_names(generate, type(self).__name__)
        if stop_sequence is not None:
            generate["stop_strings"] = [stop_sequence] if isinstance(stop_sequence, str) else list(stop_sequence)
        if generate.get("stop_strings"):
            generate.setdefault("tokenizer", self.processor.tokenizer)
        if return_full_text and return_tensors:
            raise ValueError("return_full_text and return_tensors exclude each other. Set only one of the two.")
        forward = {"num_summary_tokens": num_summary_tokens, "generate_kwargs": generate or None}
        after = {
            "return_full_text": return_full_text,
            "return_tensors": return_tensors,
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return {}, *({name: value for name, value in part.items() if value is not None} for part in (forward, after))

    def input_name(self, index: int, value: Any) -> str:
        return f"Question {index}"

    def preprocess(self, item: dict[str, Any]) -> dict[str, Any]:
        if "pictures" not in item:
            return item
        return {**item, "pictures": [self.processor.load_image(picture) for picture in item["pictures"]]}

    def _forward(
        self,
        items: list[dict[str, Any]],
        num_summary_tokens: int | None = None,
        generate_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        generate_kwargs = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=False)
        pictures = [picture for item in items for picture in item.get("pictures", ())]
        made = self.compress_pictures(pictures, num_summary_tokens) if pictures else None
        parts, start = [], 0
        for item in items:  # in the order of the placeholders
            end = start + len(item.get("pictures", ()))
            part = item["summary"].to(device=self.device, dtype=self.dtype) if end == start else made[start:end]
            parts.append(part)
            start = end
        inputs = self.processor(text=[item["prompt"] for item in items]).to(self.device)
        output = self.model.generate_from_summary(_join(parts), **inputs, **generate_kwargs)
        new = output[:, inputs["input_ids"].shape[1] :]  # (B * num_return_sequences, T)
        return [
            {"question": item["question"], "ids": ids}
            for item, ids in zip(items, new.reshape(len(items), -1, new.shape[-1]), strict=True)
        ]

    def postprocess(
        self,
        output: dict[str, Any],
        return_full_text: bool = False,
        return_tensors: bool = False,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[dict[str, Any]]:
        if return_tensors:
            return [{"generated_token_ids": ids} for ids in output["ids"]]
        texts = self.processor.batch_decode(
            output["ids"],
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )
        answers = [text.strip() for text in texts]
        if return_full_text:
            return [{"generated_text": _full_text(output["question"], answer)} for answer in answers]
        return [{"generated_text": answer} for answer in answers]


def _row(question: Any, images: Any = None, summary: Any = None) -> dict[str, Any]:
    if isinstance(question, Mapping) and images is None and summary is None:
        return question
    if (images is None) == (summary is None):
        raise ValueError(
            f"Give images or summary, what the question is about, got {'neither' if images is None else 'both'}. To "
            "ask about both at once, compress the images and join the summaries with Fwd2BotSummary.cat."
        )
    if isinstance(question, Mapping):
        raise ValueError(
            f"A row with the keys {sorted(map(str, question))} brings its own pictures. Leave out images and summary, "
            "or give the question as a str."
        )
    return {"question": question, "images": images, "summary": summary}


def _columns(rows: Any) -> tuple[str, ...]:
    """The columns of a data set that are used, without those of other pictures, which would be decoded for nothing."""
    return ("question", "text", "images", "image", "summary") if hasattr(rows, "column_names") else ()


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= set(message) for message in value)
    )


def _message(message: Mapping[str, Any], token: str) -> dict[str, Any]:
    """A message with its content as a list of parts."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
    for part in parts:
        if part.get("type") not in ("text", "image") or set(part) - {"type", "text"}:
            raise ValueError(
                "A part of a message must be {'type': 'text', 'text': …} or {'type': 'image'}, got "
                f"{ {key: str(value)[:40] for key, value in part.items()} }. Give the pictures as images or summary."
            )
    if any(token in part.get("text", "") for part in parts):
        raise ValueError(
            f"The text of a message holds {token!r}. Mark the places of pictures with {{'type': 'image'}}."
        )
    return {"role": message["role"], "content": parts}


def _count(summary: Any) -> int:
    return len(summary.tokens) if hasattr(summary, "tokens") else len(summary)


def _join(parts: list[Any]) -> Any:
    """Summaries, or bare tensors of one length, as one batch."""
    if len(parts) == 1:
        return parts[0]
    kinds = [type(part) for part in parts if not isinstance(part, torch.Tensor)]
    if not kinds:
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"Summaries given as tensors must agree in all but N, got {[tuple(part.shape) for part in parts]}. "
                "Give them as Fwd2BotSummary, which may differ in length."
            )
        return torch.cat(parts)
    return kinds[0].cat([kinds[0](part) if isinstance(part, torch.Tensor) else part for part in parts])


def _full_text(question: Any, answer: str) -> Any:
    if isinstance(question, str):
        return f"{question} {answer}"
    return [*question, {"role": "assistant", "content": answer}]


def _check_generate_names(given: Mapping[str, Any], name: str) -> None:
    """Raise `TypeError` for an argument that `generate()` does not have."""
    own = {"self", "inputs", "kwargs"}
    allowed = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    allowed |= set(inspect.signature(GenerationMixin.generate).parameters) - own | {"tokenizer"}
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *OWN_PARAMETERS, *RUN_PARAMETERS], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{name} has no argument {key!r}.{hint} It takes {', '.join((*OWN_PARAMETERS, *RUN_PARAMETERS))} and "
                "the arguments of generate()."
            )
