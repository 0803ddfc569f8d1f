"""What a Fwd2Bot is used for: compress images, embed, and answer from summaries. Checks come before any compute."""

import os
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .adapters_fwd2bot import run_stage
from .configuration_fwd2bot import check_num_summary_tokens
from .placeholders_fwd2bot import check_placeholders, count_placeholders, expand_placeholders
from .summary_fwd2bot import Fwd2BotSummary, pool_summary, summary_from


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
            summary = self.compress(num_summary_tokens=num_summary_tokens, **inputs)
        summary = self._check_summary(summary)
        shortest, longest = int(summary.lengths.min()), summary.num_summary_tokens
        if num_summary_tokens is None and shortest != longest:
            raise ValueError(
                f"The summaries have lengths {shortest} to {longest}, and embeddings compare at equal length only. "
                f"Give num_summary_tokens, at most {shortest}."
            )
        k = check_num_summary_tokens(longest if num_summary_tokens is None else num_summary_tokens, self.config)
        return pool_summary(summary.truncate(k).tokens, k)

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
            kwargs: any argument of `generate()` but `assistant_model` and `prompt_lookup_num_tokens`, which read the
                prompt as words.

        Returns:
            What `generate()` returns; the sequences are the given `input_ids` and the new ids, `(N, L + new)`.

        Raises:
            ValueError: when placeholders and summaries differ in number, or a summary came from another model.
        """
        self._require_stage("generate")
        self._check_ids(input_ids, attention_mask)
        return self._generate(self._check_summary(summary), input_ids, attention_mask, kwargs)

    def _generate(
        self,
        summary: Fwd2BotSummary | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.LongTensor | ModelOutput:
        """The one way to generated ids, with or without summaries: left-padded, summaries in place."""
        refused = sorted(name for name in ("assistant_model", "prompt_lookup_num_tokens") if kwargs.get(name))
        if refused:
            raise ValueError(f"{refused[0]} reads the prompt as words, which a summary has none of. Leave it out.")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        lengths = torch.zeros(0, dtype=torch.long) if summary is None else summary.lengths
        expanded = expand_placeholders(input_ids, attention_mask, lengths, self.image_token_id, self._pad_token_id)
        width = expanded["input_ids"].shape[1]
        for name in ("max_length", "min_length"):  # the caller counts one placeholder per picture
            if kwargs.get(name) is not None:
                kwargs[name] += width - input_ids.shape[1]
        if summary is not None:
            kwargs["inputs_embeds"] = self._insert(summary, expanded)
        output = super().generate(expanded["input_ids"], attention_mask=expanded["attention_mask"], **kwargs)
        return _restore_prompt(output, input_ids, width)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_summary_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | ModelOutput:
        """`compress`, then `generate_from_summary`, on what `processor(images=..., text=...)` returned."""
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
        self._check_no_image(input_ids, mask, kwargs)
        return self._generate(None, input_ids, attention_mask, kwargs)

    @torch.no_grad()
    def generate_uncompressed(self, **inputs: Any) -> torch.LongTensor | ModelOutput:
        """The baseline: the bare backbone's `generate()` on all its image tokens.

        Args:
            inputs: what `processor.backbone_processor(images=..., text=...)` returned, and arguments of `generate()`.
        """
        if self.stage in ("generate", "text"):
            raise ValueError(
                f"This model was loaded with stage={self.stage!r}, without its vision tower. Load it without `stage`."
            )
        self.backbone.generation_config = self.generation_config
        with run_stage(None):
            return self.backbone.generate(**inputs)

    def load_summary(self, path: str | os.PathLike) -> Fwd2BotSummary:
        """Read a file that `summary.save_file` wrote, and check that this model made it.

        Raises:
            ValueError: when the file is damaged, or its summaries are another model's or hold NaN.
        """
        return self._check_summary(Fwd2BotSummary.load_file(path))

    # Checks

    def _require_stage(self, name: str) -> None:
        if self.stage not in (None, "text", name):
            raise ValueError(
                f"This model was loaded with stage={self.stage!r} and cannot {name}. Load it without `stage`."
            )

    def _metadata(self, dtype: torch.dtype, prompt: str) -> dict[str, str | None]:
        return {
            "model": _public_name(self.config.name_or_path),
            "revision": getattr(self.config, "_commit_hash", None),
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
        words = self.get_input_embeddings().num_embeddings
        low, high = input_ids.aminmax()
        if low < 0 or high >= words:
            raise ValueError(f"input_ids hold {int(low)} to {int(high)}; the vocabulary is 0 to {words - 1}. {remedy}")
        if attention_mask is None:
            return
        if attention_mask.shape != input_ids.shape:
            found = f"{tuple(attention_mask.shape)} for input_ids of shape {tuple(input_ids.shape)}"
            raise ValueError(f"attention_mask must have the shape of input_ids, got {found}. {remedy}")
        empty = (attention_mask.sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask leaves no token in row(s) {empty}. {remedy}")

    def _check_no_image(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, inputs: dict) -> None:
        """Raise for words alone that have a placeholder, or come with pixels that nothing would compress."""
        remedy = "Pass the `compress_` tensors of processor(images=..., text=...), or use generate_from_summary."
        pixels = sorted(name for name in inputs if name.startswith("pixel"))
        if pixels:
            raise TypeError(f"{pixels} would go past the compress pass. {remedy}")
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
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if self.stage == "text":
                    raise ValueError(
                        f"This model was loaded with stage='text', without its vision tower, and cannot read "
                        f"{name!r}. Load it without `stage`, or with stage='compress'."
                    )
                if not torch.isfinite(value).all():
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
        made_by, name = summary.metadata, _public_name(self.config.name_or_path)
        for key, allowed in (
            ("fingerprint", [self.fingerprint]),
            ("prompt", [self.config.image_prompt, self.config.text_prompt]),
        ):
            if made_by[key] is not None and made_by[key] not in allowed:
                raise ValueError(
                    f"The summary was made by another model: its {key} is {made_by[key]!r}, of model "
                    f"{made_by['model']!r}; this is {name!r} with {allowed[0]!r}. Compress the images anew with it."
                )
        if not torch.isfinite(summary.tokens).all():
            raise ValueError("The summary holds NaN or infinity. Compress the images anew.")
        return summary.to(device=self.device, dtype=self.dtype)


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


def _restore_prompt(
    output: torch.Tensor | ModelOutput, input_ids: torch.Tensor, expanded_length: int
) -> torch.Tensor | ModelOutput:
    """Put the caller's prompt, one placeholder per image, back in front of the new ids."""
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    repeats = len(sequences) // len(input_ids)  # num_return_sequences
    prompt = input_ids.to(sequences.device).repeat_interleave(repeats, 0)
    sequences = torch.cat([prompt, sequences[:, expanded_length:]], 1)
    if isinstance(output, torch.Tensor):
        return sequences
    output.sequences = sequences
    return output
