"""`fwd2bot-answer`: questions about pictures, or about their summaries alone."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from .answer_inputs import (
    ROW_COLUMNS,
    is_one_question,
    pair_question,
    pair_questions,
    question_prompt,
    row_to_item,
)
from .pipeline_batches import (
    BatchedPipeline,
    check_summary,
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
MAX_NEW_TOKENS = 256


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

    own_parameters = OWN_PARAMETERS  # for messages

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
            return_tensors: "generated_token_ids", the new ids `(T,)` without padding, in place of "generated_text".
            skip_special_tokens, clean_up_tokenization_spaces: of the decoding.
            batch_size, num_workers, progress: see [`BatchedPipeline`].

        Returns:
            For one question `[{"generated_text": str}]`, with as many entries as `num_return_sequences`. For a list of
            questions a list of such lists; for a data set or an iterator an iterator of them.

        Raises:
            TypeError, ValueError, FileNotFoundError: before any compute for an empty list, for both or neither of
                images and summary, for numbers of questions, pictures and placeholders that do not match (naming
                them), for a summary of the wrong dtype or shape, or for an argument that `generate()` does not have.
        """
        running = {name: kwargs.pop(name) for name in RUN_PARAMETERS if name in kwargs}
        _, forward_params, _ = self._sanitize_parameters(**kwargs)
        if is_one_question(questions):
            inputs = self._item(pair_question(questions, images, summary))
        else:
            self._check_streamer(forward_params, running)
            rows = self._rows(questions, images, summary, forward_params)
            inputs = each_input(rows, self._item, "question", ROW_COLUMNS)
        return super().__call__(inputs, **kwargs, **running)

    def _check_streamer(self, forward_params: dict, running: dict) -> None:
        generate = {**self._forward_params.get("generate_kwargs", {}), **forward_params.get("generate_kwargs", {})}
        batch_size = running.get("batch_size") or self._batch_size or 1
        if generate.get("streamer") is not None and batch_size > 1:
            raise ValueError("A streamer follows one question at a time. Leave out batch_size, or the streamer.")

    def _rows(self, questions: Any, images: Any, summary: Any, forward_params: dict) -> Any:
        """Several questions as rows, each with its pictures or summary."""
        if images is None and summary is None:
            return questions  # they bring their own
        if not isinstance(questions, (list, tuple)):
            raise TypeError(
                f"Questions in a {type(questions).__name__} cannot be paired with images or summary. Give rows with "
                "their own, {'question': …, 'images': …}, or a list of questions."
            )
        if questions and summary is None and is_picture(images):  # one picture that all are about
            for question in questions:
                question_prompt(question, 1, self.processor)  # an error comes before any compute
            picture = self.processor.load_image(checked_picture(images))
            length = {**self._forward_params, **forward_params}.get("num_summary_tokens")
            images, summary = None, self.compress_pictures([picture], length)
        if is_summary(summary):
            check_summary(summary, self.summary_width)
            summary = summary.to("cpu")  # once, and not for every question
        return pair_questions(list(questions), images, summary)

    def _item(self, row: Any) -> dict[str, Any]:
        return row_to_item(row, self.processor, self.summary_width)

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
        _check_generate_names(generate, self)
        generate = {**_settings(generate.pop("generation_config", None)), **generate}
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
        generate_kwargs = self._generate_arguments(generate_kwargs or {}, return_dict_in_generate=False)
        summary = self._summary(items, num_summary_tokens)
        inputs = self.processor(text=[item["prompt"] for item in items]).to(self.device)
        output = self.model.generate_from_summary(summary, **inputs, **generate_kwargs)
        answers = self._new_ids(output, inputs["input_ids"], generate_kwargs)
        return [{"question": item["question"], "ids": ids} for item, ids in zip(items, answers, strict=True)]

    def _generate_arguments(self, generate_kwargs: dict[str, Any], **fixed: Any) -> dict[str, Any]:
        """Arguments of `generate()`, with our limit of the length where neither they nor the model have one."""
        arguments = {**generate_kwargs, **fixed}
        settings = self._generation_settings(arguments)
        if settings.get("max_new_tokens") is None and settings.get("max_length") is None:
            arguments["max_new_tokens"] = MAX_NEW_TOKENS
        return arguments

    def _generation_settings(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What holds in `generate()`: the arguments, and what the model's generation config sets."""
        return {**_settings(self.model.generation_config), **arguments}

    def _new_ids(
        self, output: torch.Tensor, input_ids: torch.Tensor, generate_kwargs: dict[str, Any]
    ) -> list[list[torch.Tensor]]:
        """The answers to each of the prompts `(B, L)` in what `generate()` returned, as ids without padding."""
        new = output[:, input_ids.shape[1] :]  # (B * num_return_sequences, T)
        settings = self._generation_settings(generate_kwargs)
        ends, padding = (_token_ids(settings.get(name), new) for name in ("eos_token_id", "pad_token_id"))
        rows = new.reshape(len(input_ids), -1, new.shape[-1])
        return [[_without_padding(one, ends, padding) for one in row] for row in rows]

    def _summary(self, items: list[dict[str, Any]], num_summary_tokens: int | None) -> Any:
        """The summaries of all items in the order of their placeholders; all pictures are compressed together.

        The model checks each that was given by itself. The batch leaves out what made them: parts of which one does
        not say so, or that are of a picture and of a text, could not be joined with it.
        """
        given = [self.model._check_summary(item["summary"]) if "summary" in item else None for item in items]
        pictures = [picture for item in items for picture in item.get("pictures", ())]
        compressed = self.compress_pictures(pictures, num_summary_tokens) if pictures else None
        parts, start = [], 0
        for item, summary in zip(items, given, strict=True):
            if summary is None:
                end = start + len(item["pictures"])
                summary = compressed[start:end]
                start = end
            parts.append(summary)
        kind = type(parts[0])  # of the model's own copy of the class, which is not imported here
        return kind.cat([kind(part.tokens, part.lengths) for part in parts])

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


def _settings(config: GenerationConfig | None) -> dict[str, Any]:
    """What a generation config sets, as arguments of `generate()`: it deprecates taking both together."""
    if config is None:
        return {}
    if not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a transformers.GenerationConfig, got {type(config).__name__}.")
    default = {name: value for name, value in vars(GenerationConfig()).items() if not name.startswith("_")}
    default.pop("transformers_version", None)
    return {name: getattr(config, name) for name, value in default.items() if getattr(config, name) != value}


def _token_ids(value: Any, like: torch.Tensor) -> torch.Tensor:
    """A setting of `generate()`, None, an id or several, as a tensor of ids."""
    return torch.as_tensor([] if value is None else value, dtype=like.dtype, device=like.device).reshape(-1)


def _without_padding(ids: torch.Tensor, ends: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """The new ids `(T,)` of one answer up to its first end token; without any, as far as they are no padding."""
    found = torch.isin(ids, ends).nonzero()
    if len(found) == 0:
        found = torch.isin(ids, padding, invert=True).nonzero()[-1:]  # behind it, a stop sequence ended the answer
    return ids[: int(found[0]) + 1] if len(found) else ids[:0]


def _full_text(question: Any, answer: str) -> Any:
    if isinstance(question, str):
        return f"{question} {answer}"
    return [*question, {"role": "assistant", "content": answer}]


def _check_generate_names(given: Mapping[str, Any], pipeline: AnswerPipeline) -> None:
    """Raise `TypeError` for an argument that `generate()` does not have."""
    pipelines_own = (*pipeline.own_parameters, *RUN_PARAMETERS)
    own = {"self", "inputs", "kwargs"}
    allowed = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    allowed |= set(inspect.signature(GenerationMixin.generate).parameters) - own | {"tokenizer"}
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, [*allowed, *pipelines_own], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{type(pipeline).__name__} has no argument {key!r}.{hint} It takes {', '.join(pipelines_own)} and "
                "the arguments of generate()."
            )
