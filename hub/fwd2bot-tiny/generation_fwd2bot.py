"""What a Fwd2Bot is used for: compress images, embed, and answer from summaries. Checks come before any compute."""

import copy
import os
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .adapters_fwd2bot import answer_words, run_stage
from .configuration_fwd2bot import check_num_summary_tokens
from .given_prompt_fwd2bot import restore_prompt, show_given_prompt
from .placeholders_fwd2bot import check_placeholders, count_placeholders, expand_placeholders
from .summary_fwd2bot import Fwd2BotSummary, all_finite, pool_summary, read_range, summary_from

# Settings with which `generate()` reads the prompt from its ids: decoding with drafts, and a prompt in chunks.
FOR_WORDS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp", "prefill_chunk_size")


class SummaryGenerationMixin(GenerationMixin):
    """The public methods of [`Fwd2BotForConditionalGeneration`], upon its two passes."""

    @torch.no_grad()
    def compress(self, *, num_summary_tokens: int | None = None, **inputs: Any) -> Fwd2BotSummary:
        """Compress images (or texts) to `num_summary_tokens` vectors each.

        Args:
            num_summary_tokens: length k in 1..config.num_summary_tokens. Default: the largest.
            inputs: what `processor.process_images(images)` returned.

        Returns:
            [`Fwd2BotSummary`] with tokens `(N, k, d)`. Its first j vectors are the summary of length j.

        Raises:
            TypeError, ValueError: for a length out of range, an empty batch, NaN, or a model without its vision tower.
        """
        k = check_num_summary_tokens(num_summary_tokens, self.config)
        inputs = self._check_compress_inputs(inputs)
        tokens = self._compress_pass(k, **inputs)
        prompt = self.config.text_prompt if _are_texts(inputs) else self.config.image_prompt
        return Fwd2BotSummary(tokens, metadata=self._metadata(tokens.dtype, prompt))

    @torch.no_grad()
    def embed(
        self, *, summary: Any | None = None, num_summary_tokens: int | None = None, **inputs: Any
    ) -> torch.Tensor:
        """Embeddings of images, of texts, or of summaries made earlier.

        Args:
            summary: a [`Fwd2BotSummary`] or a `(N, k, d)` tensor; or instead
            inputs: what `processor.process_images(images)` or `processor.process_texts(texts)` returned.
            num_summary_tokens: length k; embeddings compare at equal k only. Default: `config.num_summary_tokens`, or
                the length of the given summaries.

        Returns:
            `(N, d)` float32 of unit norm.
        """
        if (summary is None) == (not inputs):
            raise ValueError("embed() takes either `summary` or the tensors of process_images / process_texts.")
        if summary is None:
            k = check_num_summary_tokens(num_summary_tokens, self.config)
            tokens = self._compress_pass(k, **self._check_compress_inputs(inputs))
            _check_finite(tokens)
            return self._pool(tokens.to(self.device), k)
        summary = self._check_summary(summary)
        shortest, longest = summary.min_summary_tokens, summary.num_summary_tokens
        if num_summary_tokens is None and shortest != longest:
            raise ValueError(
                f"The summaries have lengths {shortest} to {longest}, and embeddings compare at equal length only. "
                f"Give num_summary_tokens, at most {shortest}."
            )
        k = check_num_summary_tokens(longest if num_summary_tokens is None else num_summary_tokens, self.config)
        return self._pool(summary.truncate(k).tokens, k)

    def _pool(self, tokens: torch.Tensor, num_summary_tokens: int) -> torch.Tensor:
        """`(N, k_max, d)` -> `(N, e)` embeddings at length k; a model with another pooling has its own."""
        return pool_summary(tokens, num_summary_tokens)

    @torch.no_grad()
    def generate_from_summary(
        self,
        summary: Any,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | ModelOutput:
        """Answer prompts in which summaries stand in place of images.

        Args:
            summary: a [`Fwd2BotSummary`] or a `(S, k, d)` tensor, one summary per placeholder, row by row.
            input_ids, attention_mask: `(N, L)` from `processor(text=prompts)`.
            kwargs: any argument of `generate()` but those of assisted decoding and of chunked prefill. Logits
                processors, stopping criteria and streamers of the caller see the given `input_ids`, with one
                placeholder per image, at every k, and lengths count these. With `past_key_values` of an earlier call,
                `input_ids` are all of the conversation, and the summaries the same; only what is new is computed.

        Returns:
            What `generate()` returns; the sequences are the given `input_ids` and the new ids, `(N, L + new)`.

        Raises:
            ValueError: when placeholders and summaries differ in number, or a summary came from another model.
        """
        self._require_stage("generate")
        self._check_ids(input_ids, attention_mask)
        if "num_summary_tokens" in kwargs:
            raise TypeError("The length of a summary is its own: give summary.truncate(k), not num_summary_tokens.")
        return self._generate(self._check_summary(summary), input_ids, attention_mask, kwargs)

    def _generate(
        self,
        summary: Fwd2BotSummary | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.LongTensor | ModelOutput:
        """The one way to generated ids, with or without summaries: left-padded, summaries in place."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self._check_pad_token_id(len(input_ids), kwargs)
        lengths = torch.zeros(0, dtype=torch.long) if summary is None else summary.lengths
        expanded = expand_placeholders(input_ids, attention_mask, lengths, self.image_token_id, self._pad_token_id)
        width = expanded["input_ids"].shape[1]
        _check_cache(kwargs.get("past_key_values"), width)
        if summary is not None:
            for name in FOR_WORDS:
                if self._setting(name, kwargs):
                    raise ValueError(
                        f"{name} reads the prompt as words, which a summary has none of. Leave it out; it works for "
                        "prompts without images."
                    )
        self._add_to_lengths(kwargs, width - input_ids.shape[1])
        if not torch.equal(expanded["input_ids"], input_ids):
            show_given_prompt(kwargs, input_ids, width)
        with answer_words():
            if summary is not None:
                kwargs["inputs_embeds"] = self._insert(summary, expanded)
            output = super().generate(expanded["input_ids"], attention_mask=expanded["attention_mask"], **kwargs)
        return restore_prompt(output, input_ids, width)

    def _setting(self, name: str, kwargs: dict[str, Any]) -> Any:
        """A setting as `generate()` finds it: among its arguments, in the config given to it, in the model's own."""
        value = kwargs.get(name)
        if value is None and kwargs.get("generation_config") is not None:
            value = getattr(kwargs["generation_config"], name, None)
        return getattr(self.generation_config, name, None) if value is None else value

    def _add_to_lengths(self, kwargs: dict[str, Any], more: int) -> None:
        """Let `max_length` and `min_length` count the prompt as the caller does, one placeholder per picture."""
        if more == 0:
            return
        lengths = {name: self._setting(name, kwargs) for name in ("max_length", "min_length")}
        longer = {name: length + more for name, length in lengths.items() if length}
        config = kwargs.get("generation_config")
        if config is None:
            kwargs.update(longer)
        elif longer:  # settings beside a config are deprecated, so a copy of it is changed
            kwargs["generation_config"] = config = copy.deepcopy(config)
            config.update(**longer)
            kwargs.update({name: length for name, length in longer.items() if kwargs.get(name) is not None})

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_summary_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | ModelOutput:
        """`compress`, then `generate_from_summary`, on what `processor(images=..., text=...)` returned.

        For words alone nothing is compressed, so that `num_summary_tokens` is checked and has no effect.
        """
        if input_ids is None:
            raise ValueError(
                "generate() needs input_ids: pass everything that processor(images=..., text=...) returned."
            )
        compress_inputs = take_prefixed(kwargs, "compress_")
        self._require_stage("generate")
        self._check_ids(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        placeholders = count_placeholders(input_ids, mask, self.image_token_id)
        if compress_inputs:
            check_placeholders(placeholders, len(compress_inputs.get("input_ids", ())))
            summary = self.compress(num_summary_tokens=num_summary_tokens, **compress_inputs)
            return self.generate_from_summary(summary, input_ids, attention_mask, **kwargs)
        check_num_summary_tokens(num_summary_tokens, self.config)
        self._check_no_image(input_ids, mask, kwargs)
        return self._generate(None, input_ids, attention_mask, kwargs)

    @torch.no_grad()
    def generate_uncompressed(self, **inputs: Any) -> torch.LongTensor | ModelOutput:
        """The baseline: the bare backbone's `generate()` on all its image tokens.

        Args:
            inputs: what `processor.backbone_processor(images=..., text=...)` returned, and arguments of `generate()`.
        """
        if self.stage is not None:
            raise ValueError(self._lacks_parts("run the bare backbone"))
        self.backbone.generation_config = self.generation_config
        with run_stage(None):
            return self.backbone.generate(**inputs)

    def load_summary(self, path: str | os.PathLike) -> Fwd2BotSummary:
        """Read a file that `summary.save_file` wrote, and check that this model made it.

        Raises:
            ValueError: when the file is damaged, or its summaries are another model's or hold NaN.
        """
        return self._check_summary(Fwd2BotSummary.load_file(path))

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        quantizer = getattr(self.backbone, "hf_quantizer", None)
        can_compile = quantizer is None or quantizer.is_compileable
        return can_compile and super()._valid_auto_compile_criteria(*args, **kwargs)

    # What `generate()` would find out from the signature of `forward`, which takes long to make

    def _supports_logits_to_keep(self) -> bool:
        return True

    def _supports_mm_encoder_outputs(self) -> bool:
        return False

    # Checks

    def _lacks_parts(self, action: str) -> str:
        """Why a model of one stage cannot do something, and the remedy."""
        if self.config.merged_stage is not None:
            return (
                f"The {self.stage} adapter is merged into the weights of this model, so it cannot {action}. Load the "
                "checkpoint that it was exported from."
            )
        return f"This model was loaded with stage={self.stage!r} and cannot {action}. Load it without `stage`."

    def _require_stage(self, name: str) -> None:
        if self.stage not in (None, "text", name):
            raise ValueError(self._lacks_parts(name))

    def _metadata(self, dtype: torch.dtype, prompt: str) -> dict[str, str | None]:
        return {
            "model": _public_name(self.config.name_or_path),
            "revision": self._hub.get("revision"),
            "fingerprint": self.fingerprint,
            "prompt": prompt,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _check_ids(self, input_ids: Any, attention_mask: Any = None) -> None:
        remedy = "Pass everything that the processor returned."
        if not isinstance(input_ids, torch.Tensor) or input_ids.is_floating_point():
            found = f"a {input_ids.dtype} tensor" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
            raise TypeError(f"input_ids must be an integer tensor of shape (N, L), got {found}. {remedy}")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            found = tuple(input_ids.shape)
            raise ValueError(f"input_ids must have shape (N, L) with N and L of at least 1, got {found}. {remedy}")
        if attention_mask is not None:
            if not isinstance(attention_mask, torch.Tensor):
                raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}. {remedy}")
            if attention_mask.shape != input_ids.shape:
                found = f"{tuple(attention_mask.shape)} for input_ids of shape {tuple(input_ids.shape)}"
                raise ValueError(f"attention_mask must have the shape of input_ids, got {found}. {remedy}")
        low, high, fewest = _read_ids(input_ids, attention_mask)
        if fewest == 0:
            empty = (attention_mask.sum(1) == 0).nonzero().flatten().tolist()
            raise ValueError(f"attention_mask leaves no token in row(s) {empty}. {remedy}")
        if attention_mask is not None and (low < 0 or high >= self._num_words):  # the padding may be any id
            low, high = read_range(input_ids.masked_fill(attention_mask == 0, 0))
        if low < 0 or high >= self._num_words:
            found = low if low < 0 else high
            raise ValueError(f"input_ids hold {found}; the vocabulary is 0 to {self._num_words - 1}. {remedy}")

    def _check_pad_token_id(self, num_rows: int, kwargs: dict[str, Any]) -> None:
        """Raise for a padding that the model cannot read, where rows that end early are filled with it."""
        num_rows *= self._setting("num_return_sequences", kwargs) or 1
        pad = self._setting("pad_token_id", kwargs) if num_rows > 1 else None
        if pad is not None and not 0 <= pad < self._num_words:
            raise ValueError(
                f"pad_token_id={int(pad)} is no row of the input embedding (0 to {self._num_words - 1}), and answers "
                "that end before others are filled with it. Give pad_token_id, or set "
                "model.generation_config.pad_token_id, to an id within: that of the end of the text, for example."
            )

    def _check_no_image(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, inputs: dict) -> None:
        """Raise for words alone that have a placeholder, or come with pixels that nothing would compress."""
        remedy = "Pass the `compress_` tensors of processor(images=..., text=...), or use generate_from_summary."
        pixels = sorted(name for name in inputs if name.startswith("pixel"))
        if pixels:
            raise TypeError(f"{pixels} would go past the compress pass. {remedy}")
        if torch.compiler.is_compiling():  # the graph would break at the values; generate() has looked at them
            return
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape == input_ids.shape:  # not that of packed rows or of a prepared cache
            found = int(count_placeholders(input_ids, mask, self.image_token_id).sum())
            if found:
                raise ValueError(f"The prompts hold {found} image placeholder(s), but no image was given. {remedy}")

    def _check_compress_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        self._require_stage("compress")
        input_ids = inputs.get("input_ids")
        self._check_ids(input_ids, inputs.get("attention_mask"))
        if _are_texts(inputs) and (input_ids == self.image_token_id).any():
            raise ValueError(
                "input_ids hold image tokens, but no pixels came with them. Pass everything that "
                "processor.process_images(images) returned."
            )
        for name, value in inputs.items():
            if isinstance(value, (bool, int, float, str)):
                raise TypeError(
                    f"compress and embed have no argument {name!r} (={value!r}); beside num_summary_tokens they take "
                    "the tensors of process_images or process_texts."
                )
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if self.stage == "text":
                    raise ValueError(
                        f"This model was loaded with stage='text', without its vision tower, and cannot read "
                        f"{name!r}. Load it without `stage`, or with stage='compress'."
                    )
                if not all_finite(value):
                    raise ValueError(f"{name!r} holds NaN or infinity. Make it anew with processor.process_images.")
                inputs[name] = value.to(self.dtype)
        return inputs

    def _check_summary(self, value: Any) -> Fwd2BotSummary:
        summary = summary_from(value)
        width = self.summary_projector.out_features
        if summary.tokens.shape[-1] != width:
            raise ValueError(
                f"The summary is {summary.tokens.shape[-1]} wide, but this model's summaries are {width} wide. "
                "Compress the images anew with this model."
            )
        made_by = summary.metadata
        if made_by["fingerprint"] not in (None, fingerprint := self.fingerprint):
            raise self._made_by_another(made_by, "fingerprint", fingerprint)
        prompt = self.config.image_prompt
        if made_by["prompt"] not in (None, prompt) and made_by["prompt"] != self.config.text_prompt:
            raise self._made_by_another(made_by, "prompt", prompt)
        _check_finite(summary.tokens)
        return summary.to(device=self.device, dtype=self.summary_projector.weight.dtype)

    def _made_by_another(self, made_by: dict[str, str | None], key: str, own: str) -> ValueError:
        return ValueError(
            f"The summary was made by another model: its {key} is {made_by[key]!r}, of model {made_by['model']!r}; "
            f"this is {_public_name(self.config.name_or_path)!r} with {own!r}. Compress the images anew with it."
        )


def _check_finite(tokens: torch.Tensor) -> None:
    if not all_finite(tokens):
        raise ValueError("The summary holds NaN or infinity. Compress the images anew.")


def _read_ids(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[int, int, int | None]:
    """The smallest and the largest id, and with a mask the fewest tokens of a row, in one transfer."""
    if attention_mask is None:
        return *read_range(input_ids), None
    fewest = attention_mask.bool().sum(1).min().to(input_ids.device)
    low, high, fewest = torch.stack([*input_ids.aminmax(), fewest]).tolist()
    return low, high, fewest


def _public_name(name_or_path: str | None) -> str | None:
    """A Hub id as it is; of a folder its name alone, since where it lies is this machine's business."""
    if name_or_path and os.path.isdir(name_or_path):
        return os.path.basename(os.path.abspath(name_or_path))
    return name_or_path or None


def _are_texts(inputs: dict[str, Any]) -> bool:
    """Whether compress inputs are those of `process_texts`: no tensor of pixels among them."""
    return set(inputs) <= {"input_ids", "attention_mask"}


def take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Move the entries of `kwargs` that start with `prefix` into a dictionary of their own, without it."""
    return {name.removeprefix(prefix): kwargs.pop(name) for name in list(kwargs) if name.startswith(prefix)}


def _check_cache(cache: Any, width: int) -> None:
    """Raise unless the prompts of `width` go on where an earlier call ended."""
    length = 0 if cache is None else int(cache.get_seq_length())
    if length >= width:
        raise ValueError(
            f"past_key_values hold {length} tokens, but the prompts have {width} with their summaries in place, and "
            "must go on after them. Give the ids of the whole conversation: the sequences of the earlier call, and "
            "the new turn."
        )
