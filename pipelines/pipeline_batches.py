"""What the three pipelines share: every sort of input, batches, progress, saving."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Pipeline
from transformers.utils import logging

PICTURE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)
NO_SUMMARY = (
    "summary must be a Fwd2BotSummary or a (N, k, d) tensor, got {}. Load a file of summaries with "
    "Fwd2BotSummary.load_file."
)
BAR_DELAY = 2.0  # seconds that several inputs may take before a progress bar appears
PUSH_ARGUMENTS = (
    "repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags"
)  # fmt: skip


class BatchedPipeline(Pipeline):
    """A `Pipeline` whose batch is the list of what `preprocess` returned, so that the processor makes the tensors.

    transformers' own batches pad the tensors of single inputs, which fits no processor whose pictures differ in their
    number of patches. Here `_forward` takes a list and returns a list of the same length.

    What a call returns follows what it was given: for one input one output, for a list or tuple a list, and for a data
    set or an iterator an iterator that works as it is read.

    Args:
        batch_size: inputs that go through the model at once, 1 by default; here or in the call. It changes no result.
        num_workers: processes that read and decode the inputs ahead, 0 by default; here or in the call.
        progress: whether several inputs show a progress bar: True, False, or None for one after two seconds. That of
            a data set or an iterator begins at the first reading; it has a total where the length is known.

    Raises:
        TypeError: for a model that is no Fwd2Bot.
        ValueError: without a processor, or for one that does not fit the model.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args: Any, progress: bool | None = None, **kwargs: Any):
        self._progress = progress
        super().__init__(*args, **kwargs)
        check_model(self.model, type(self).__name__)
        if self.processor is None:
            raise ValueError(
                f"{type(self).__name__} needs a processor beside the model. Give "
                "processor=AutoProcessor.from_pretrained(path), or name the checkpoint: pipeline(task, model=path)."
            )
        check_fit(self.processor, self.model)

    def __call__(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        num_workers: int | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run prepared `inputs`: one, a list, or a [`Rows`] or iterator; subclasses say what they take."""
        batch_size = _first(batch_size, self._batch_size, 1)
        num_workers = _first(num_workers, self._num_workers, 0)
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        parameters = [
            _merged(ours, given)
            for ours, given in zip(
                (self._preprocess_params, self._forward_params, self._postprocess_params),
                self._sanitize_parameters(**kwargs),
                strict=True,
            )
        ]
        self.call_count += 1
        if not isinstance(inputs, (list, Dataset, Iterator)):
            return self.run_single(inputs, *parameters)
        outputs = self.get_iterator(inputs, num_workers, batch_size, *parameters)
        total = len(inputs) if isinstance(inputs, Sized) else None
        outputs = self._with_bar(outputs, total, progress)
        return list(outputs) if isinstance(inputs, list) else outputs

    def _with_bar(
        self, values: Iterable[Any], total: int | None, progress: bool | None, what: str = ""
    ) -> Iterator[Any]:
        progress = _first(progress, self._progress)
        yield from logging.tqdm(  # made at the first reading, so that neither bar nor delay begins before
            values,
            total=total,
            desc=f"{self.task or ''} {what}".strip() or None,
            delay=0 if progress else BAR_DELAY,
            disable=progress is False,
        )

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        [output] = self.forward([self.preprocess(inputs, **preprocess_params)], **forward_params)
        return self.postprocess(output, **postprocess_params)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[Any]:
        if isinstance(inputs, Sized):
            prepared = _Prepared(inputs, self._prepare, preprocess_params)
        else:
            prepared = _PreparedStream(inputs, self._prepare, preprocess_params)
            num_workers = min(num_workers, 1)  # every worker would read the whole stream
        for batch in DataLoader(prepared, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            for output in self.forward(batch, **forward_params):
                yield self.postprocess(output, **postprocess_params)

    def _prepare(self, index: int, value: Any, parameters: dict) -> Any:
        return _named(self.input_name(index, value), lambda value: self.preprocess(value, **parameters), value)

    def input_name(self, index: int, value: Any) -> str:
        """What an error calls an input that cannot be read."""
        return f"Input {index}"

    @property
    def summary_width(self) -> int:
        """d, the width of the model's summaries."""
        return self.model.summary_projector.out_features

    def compress_pictures(self, pictures: list[Image.Image], num_summary_tokens: int | None) -> Any:
        """The model's summary of loaded pictures, on the model's device."""
        inputs = self.processor.process_images(pictures).to(self.device)
        return self.model.compress(**inputs, num_summary_tokens=num_summary_tokens)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model, processor and code: a folder that `pipeline(task, model=…)` loads, for all three tasks.

        Args:
            push_to_hub: upload all of it too, in one commit, as `pipe.push_to_hub(repo_id)` does.
            kwargs: arguments of the model's `save_pretrained`, and with `push_to_hub` those of `pipe.push_to_hub`
                (`repo_id`, by default the folder's name, `private`, `revision`, …).
        """
        hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if push_to_hub and name in kwargs}
        self.processor.save_pretrained(save_directory)  # first: a new model shall not come to lie beside an old one
        self.model.save_pretrained(save_directory, **kwargs)
        if push_to_hub:
            if "max_shard_size" in kwargs:
                hub["max_shard_size"] = kwargs["max_shard_size"]
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)


class Rows(Dataset):
    """The rows of a data set, each handed to `function` when it is read."""

    def __init__(self, rows: Any, function: Callable[[Any], Any]):
        self.rows = rows
        self.function = function

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.rows[index])

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # many data sets raise no IndexError behind their end


def each_input(values: Any, function: Callable[[Any], Any], what: str, columns: tuple[str, ...] = ()) -> Any:
    """Several inputs in the form that [`BatchedPipeline`] runs, each through `function`.

    Args:
        values: a list or tuple, gone through at once, so that a bad input is found before any compute; or a data set,
            an iterator or another iterable, gone through as it is read.
        what: what the inputs are, for messages.
        columns: the only columns that are read, where `values` is a `datasets.Dataset`.

    Raises:
        ValueError: for an empty list, naming the place of a bad input in a list. TypeError: for what is no collection.
    """
    if isinstance(values, (list, tuple)):
        if not values:
            raise ValueError(f"No {what} was given: the list is empty.")
        return [_named(f"{what.capitalize()} {index}", function, value) for index, value in enumerate(values)]
    if isinstance(values, Mapping):
        raise TypeError(f"{type(values).__name__} is a mapping. Choose one of its entries: {sorted(values)[:8]}.")
    names = getattr(values, "column_names", None)
    if names and columns:
        found = [name for name in columns if name in names]
        if not found:
            raise ValueError(
                f"The data set has the columns {list(names)}, none of which is {' or '.join(map(repr, columns))}. "
                "Rename one with rename_column, or give one alone, as in dataset['photo']."
            )
        values = values.select_columns(found)
    is_stream = isinstance(values, IterableDataset)  # which has a __getitem__ that raises, and may have a length
    if isinstance(values, Sized) and hasattr(values, "__getitem__") and not is_stream:
        return Rows(values, function)
    if isinstance(values, Iterable):
        return (function(value) for value in values)
    raise TypeError(f"Expected a {what}, a list of them, a data set or an iterator, got {type(values).__name__}.")


def is_picture(value: Any) -> bool:
    """Whether the type of `value` is one that the processor's `load_image` takes."""
    return isinstance(value, PICTURE_TYPES)


def is_summary(value: Any) -> bool:
    """Whether `value` is a Fwd2BotSummary, of whichever copy of its module, or a tensor that may stand for one."""
    return isinstance(value, torch.Tensor) or (hasattr(value, "tokens") and hasattr(value, "lengths"))


def check_summary(value: Any, width: int) -> None:
    """Raise `TypeError` or `ValueError` for what the model could not read as a summary; its values are not read.

    Args:
        width: d, that of the model's summaries.
    """
    if not is_summary(value):
        raise TypeError(NO_SUMMARY.format(type(value).__name__))
    tokens = value.tokens if hasattr(value, "tokens") else value
    if not tokens.is_floating_point():
        raise TypeError(
            f"summary must be a floating point tensor (float32, bfloat16 or float16), got {tokens.dtype}. Give what "
            "compress returned; if you have quantized it, turn it back first."
        )
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            f"summary must have shape (N, k, d) with no empty dimension, got {tuple(tokens.shape)}. That of a single "
            "picture has N = 1: summary[None]."
        )
    if tokens.shape[-1] != width:
        raise ValueError(
            f"The summary is {tokens.shape[-1]} wide, but this model's summaries are {width} wide. Compress the "
            "images anew with this model."
        )


def count_summaries(summary: Any) -> int:
    """N, the number of pictures, of a Fwd2BotSummary or a `(N, k, d)` tensor."""
    return len(summary.tokens) if hasattr(summary, "tokens") else len(summary)


def checked_picture(value: Any) -> Any:
    """`value`, or its entry "image" where it is a row of a data set; checked as far as that needs no reading."""
    if isinstance(value, Mapping) and "image" in value:
        value = value["image"]
    if not is_picture(value):
        raise TypeError(
            f"A picture must be a path, a URL, bytes, a PIL.Image or a uint8 array, got {type(value).__name__}."
        )
    if isinstance(value, (str, os.PathLike)) and not is_url(value) and not os.path.isfile(value):
        raise FileNotFoundError(f"Picture {str(value)!r} does not exist or is no file.")
    return value


def is_url(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def refuse_unknown(unknown: Mapping[str, Any], pipeline: Pipeline, allowed: Iterable[str]) -> None:
    """Raise `TypeError` when arguments are left over, naming the allowed ones."""
    if unknown:
        raise TypeError(
            f"{type(pipeline).__name__} has no argument {', '.join(map(repr, unknown))}. It takes: "
            f"{', '.join(allowed)}."
        )


def check_model(model: Any, name: str) -> None:
    """Raise `TypeError` unless the model has what the pipelines use; its class may be of another copy of the code."""
    if not all(hasattr(model, method) for method in ("compress", "embed", "generate_from_summary")):
        raise TypeError(
            f"{name} needs a Fwd2Bot model, got a {type(model).__name__}. Load the checkpoint of one, "
            "AutoModel.from_pretrained(path), or make an untrained one of a vision-language model with "
            "Fwd2BotForConditionalGeneration.from_backbone(model)."
        )


def check_fit(processor: Any, model: Any) -> None:
    """Raise `ValueError` unless the processor makes the inputs that the model was trained on."""
    values = {
        "image_prompt": model.config.image_prompt,
        "text_prompt": model.config.text_prompt,
        "image_token_id": model.image_token_id,
    }
    for name, expected in values.items():
        found = getattr(processor, name, None)
        if found != expected:
            raise ValueError(
                f"The processor does not fit the model: {name} is {found!r} in the {type(processor).__name__}, but "
                f"{expected!r} in the model, so that summaries and answers would be silently different. Load both "
                "from the same checkpoint, processor=AutoProcessor.from_pretrained(path), or make it with "
                "Fwd2BotProcessor(backbone_processor, image_prompt=model.config.image_prompt, "
                "text_prompt=model.config.text_prompt)."
            )
    tokens, words = len(processor.tokenizer), model.get_input_embeddings().num_embeddings
    if tokens > words:
        raise ValueError(
            f"The processor is another model's: its tokenizer has {tokens} tokens, this model reads {words}. Load "
            "both from the same checkpoint, processor=AutoProcessor.from_pretrained(path)."
        )


class _Prepared(Dataset):
    def __init__(self, inputs: Any, prepare: Callable[[int, Any, dict], Any], parameters: dict):
        self.inputs, self.prepare, self.parameters = inputs, prepare, parameters

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.prepare(index, self.inputs[index], self.parameters)


class _PreparedStream(IterableDataset):
    def __init__(self, inputs: Iterable[Any], prepare: Callable[[int, Any, dict], Any], parameters: dict):
        self.inputs, self.prepare, self.parameters = inputs, prepare, parameters

    def __iter__(self) -> Iterator[Any]:
        return (self.prepare(index, value, self.parameters) for index, value in enumerate(self.inputs))


def _named(name: str, function: Callable[[Any], Any], value: Any) -> Any:
    """`function(value)`; an error about the value says which it is."""
    try:
        return function(value)
    except (TypeError, ValueError, FileNotFoundError) as error:
        if type(error) not in (TypeError, ValueError, FileNotFoundError):
            raise  # a subclass, which may be made of other arguments
        raise type(error)(f"{name}: {error}") from error


def _merged(ours: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the pipeline and those of one call, which win; dicts among them (`generate_kwargs`) are joined."""
    both = {
        name: {**ours[name], **value}
        for name, value in given.items()
        if isinstance(value, Mapping) and isinstance(ours.get(name), Mapping)
    }
    return {**ours, **given, **both}


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)
