"""`Fwd2BotForConditionalGeneration`: an LVLM that compresses its own image tokens, and answers from the result.

Compress pass: the backbone reads `[image][prompt][k summary queries]`; its last hidden states at the queries, through
the summary projector, are the summary. Generate pass: the same backbone reads a prompt in which the summary stands in
place of the image, and answers. Source: Fwd2Bot (arXiv 2503.21757) and its NeurIPS 2025 version, "Compress & Cache".
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput
from torch import nn

from .adapters_fwd2bot import (
    checkpoint_stage,
    install_adapter,
    install_queries,
    is_adapter_parameter,
    linear_layer_names,
    run_stage,
)
from .checkpoint_fwd2bot import check_loading_info, copy_code, set_auto_map, weights_fingerprint
from .configuration_fwd2bot import STAGES, Fwd2BotConfig, check_num_summary_tokens
from .losses_fwd2bot import autoregressive_loss, contrastive_loss
from .packing_fwd2bot import packed_attention_mask
from .placeholders_fwd2bot import count_placeholders, expand_placeholders, left_pad, position_ids_from_mask
from .summary_fwd2bot import Fwd2BotSummary, pool_summary, summary_from


@dataclass
class Fwd2BotOutput(ModelOutput):
    """What `forward` returns.

    Args:
        loss: scalar, the weighted sum of the two losses below, as far as their inputs were given.
        autoregressive_loss, contrastive_loss: scalars, unweighted.
        logits: `(N, L', V)`, L' the length of the prompts with their summaries in place.
        summary: [`Fwd2BotSummary`] of the images, with gradients.
        image_embeds: `(N, e)`, text_embeds: `(M, e)`, float32 of unit norm, at the largest length of this batch.
    """

    loss: torch.Tensor | None = None
    autoregressive_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    summary: Fwd2BotSummary | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    past_key_values: Any | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class Fwd2BotForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A frozen LVLM with two stage adapters, learned summary queries and a summary projector.

    Load it with `from_pretrained`, or make an untrained one of any LVLM with `from_backbone`.
    """

    config_class = Fwd2BotConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: Fwd2BotConfig, backbone: PreTrainedModel | None = None, stage: str | None = None):
        if stage not in (None, *STAGES, "text"):
            raise ValueError(f"stage={stage!r} is unknown; choose None (everything), 'compress', 'generate' or 'text'.")
        super().__init__(config)
        self.stage = stage
        if backbone is None:
            backbone = AutoModelForImageTextToText.from_config(
                config.backbone_config,
                attn_implementation=config._attn_implementation,
                dtype=torch.get_default_dtype(),
            )
        self.backbone = backbone
        width = config.get_text_config().hidden_size
        install_queries(backbone.get_input_embeddings(), torch.randn(config.num_summary_tokens, width) * 0.02)
        self._left_out = []
        for name in STAGES:
            if stage in (None, "text", name):
                install_adapter(backbone.get_decoder(), name, config.adapters[name])
            else:
                self._left_out.append(rf"\.lora_(A|B)\.{name}\.")
        if stage in ("generate", "text"):
            self._left_out += _drop_vision(backbone)
        self.summary_projector = nn.Linear(width, width)
        nn.init.zeros_(self.summary_projector.bias)
        nn.init.eye_(self.summary_projector.weight)
        with torch.no_grad():
            self.summary_projector.weight.mul_(0.1)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.initial_temperature)))
        self.post_init()
        self._keys_to_ignore_on_load_unexpected.update(self._left_out)
        if backbone.generation_config is not None:
            self.generation_config = backbone.generation_config

    def init_weights(self) -> None:
        # Every part initialises itself when it is made. A second pass from here would undo LoRA's zero B and a trained
        # backbone's weights.
        self.tie_weights(recompute_mapping=False)

    @classmethod
    def from_backbone(
        cls,
        backbone: PreTrainedModel | str | os.PathLike,
        *,
        num_summary_tokens: int = 16,
        summary_lengths: list[int] | None = None,
        lora_rank: int = 16,
        lora_alpha: int | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> "Fwd2BotForConditionalGeneration":
        """An untrained Fwd2Bot around an LVLM, whose weights it never changes.

        Args:
            backbone: a model of `AutoModelForImageTextToText`, or the id or path of one (at `revision`).
            num_summary_tokens, summary_lengths: see [`Fwd2BotConfig`].
            lora_rank, lora_alpha: of both stage adapters, on every linear layer of the language model; alpha = rank
                by default (VladVA, arXiv 2412.04378, uses 16 and 16).
            kwargs: further fields of [`Fwd2BotConfig`].
        """
        if isinstance(backbone, (str, os.PathLike)):
            backbone = AutoModelForImageTextToText.from_pretrained(backbone, revision=revision)
        if not isinstance(backbone, PreTrainedModel) or not hasattr(backbone.config, "vision_config"):
            raise TypeError(
                f"{type(backbone).__name__} is no vision-language model. Give a model of "
                "transformers.AutoModelForImageTextToText, or the id or path of one."
            )
        lora = {
            "r": lora_rank,
            "lora_alpha": lora_rank if lora_alpha is None else lora_alpha,
            "target_modules": linear_layer_names(backbone.get_decoder()),
        }
        config = Fwd2BotConfig(
            backbone_config=backbone.config,
            backbone_name_or_path=backbone.config.name_or_path or None,
            backbone_revision=revision,
            num_summary_tokens=num_summary_tokens,
            summary_lengths=summary_lengths,
            adapters={stage: dict(lora) for stage in STAGES},
            **kwargs,
        )
        config._attn_implementation = backbone.config._attn_implementation
        model = cls(config, backbone=backbone).to(dtype=backbone.dtype, device=backbone.device)
        model.mark_trainable()
        return model.train(backbone.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> "Fwd2BotForConditionalGeneration":
        """As `PreTrainedModel.from_pretrained`, but a missing or unexpected weight is an error.

        Args:
            stage: `None` loads everything; "compress" without the generate adapter; "generate" without vision tower
                and compress adapter; "text" both adapters without vision tower (embeds texts, answers from summaries).
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        check_loading_info(info, pretrained_model_name_or_path)
        model.mark_trainable()
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, plus the code that `trust_remote_code=True` loads.

        Raises:
            ValueError: for a model that was loaded with a `stage`: parts of it are missing.
        """
        if self.stage is not None:
            raise ValueError(
                f"A model loaded with stage={self.stage!r} lacks parts and cannot be saved. Load it without `stage`."
            )
        if self.config.fingerprint is None:
            self.config.fingerprint = weights_fingerprint(self.trained_parameters())
        set_auto_map(self.config)
        super().save_pretrained(save_directory, *args, **kwargs)
        copy_code(save_directory, self.config)

    # What trains

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that Fwd2Bot adds to the backbone, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if is_adapter_parameter(name)
            or name.endswith(".summary_queries")
            or name.startswith("summary_projector.")
            or name == "logit_scale"
        }

    def mark_trainable(self) -> dict[str, nn.Parameter]:
        """Set `requires_grad` on exactly the parameters of `trained_parameters()`, and return those."""
        trained = self.trained_parameters()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
        return trained

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        # The recomputation must run under the stage of its own forward, so the function is ours whatever was asked for.
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=checkpoint_stage)

    # Shortcuts into the backbone

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.config.backbone_config.image_token_id

    @property
    def _pad_token_id(self) -> int:
        pad = self.generation_config.pad_token_id if self.generation_config is not None else None
        pad = self.config.get_text_config().pad_token_id if pad is None else pad
        return 0 if pad is None else pad

    # The two passes

    def _compress_pass(
        self, num_summary_tokens: int, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        """`[image or text][prompt]` rows `(N, L)` -> summary tokens `(N, k, d)`, with gradients."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, attention_mask = left_pad(input_ids, attention_mask)
        num_rows = len(input_ids)
        first_query = self.get_input_embeddings().num_embeddings
        query_ids = torch.arange(first_query, first_query + num_summary_tokens, device=input_ids.device)
        input_ids = torch.cat([input_ids, query_ids.expand(num_rows, -1)], 1)  # (N, L + k)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(num_rows, num_summary_tokens)], 1)
        with run_stage("compress"):
            hidden = self.backbone.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids_from_mask(attention_mask),
                use_cache=False,
                **inputs,
            ).last_hidden_state  # (N, L + k, d)
        return self.summary_projector(hidden[:, -num_summary_tokens:])

    def _insert(self, summary: Fwd2BotSummary, expanded: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(N, L', d)` input embeddings of the expanded prompts, the summary tokens at their slots."""
        embeds = self.get_input_embeddings()(expanded["input_ids"])
        tokens = summary.tokens[summary.mask].to(embeds.dtype)  # (T, d), T = sum of lengths
        return embeds.masked_scatter(expanded["slots"].unsqueeze(-1), tokens)

    def _draw_lengths(self, num_images: int, num_summary_tokens: int | None) -> torch.Tensor:
        """`(N,)` length per image: the given one, in training otherwise drawn from `config.summary_lengths`."""
        if num_summary_tokens is not None or not self.training:
            return torch.full((num_images,), check_num_summary_tokens(num_summary_tokens, self.config))
        choices = torch.tensor(self.config.summary_lengths)
        return choices[torch.randint(len(choices), (num_images,))]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        num_summary_tokens: int | None = None,
        text_input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        text_image: torch.LongTensor | None = None,
        text_image_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Fwd2BotOutput:
        """One training batch through both passes; without `compress_` inputs, one step of the generate pass.

        Args:
            input_ids, attention_mask, labels: `(N, L)` instructions with one placeholder per image, and what to learn
                (-100 elsewhere).
            compress_input_ids, compress_attention_mask, compress_pixel_values, ...: `process_images` of the images,
                keys prefixed; the i-th image belongs to the i-th placeholder.
            segment_ids: `(N, L)`, for rows that pack many conversations about one image: 0 for the shared prefix, s for
                the s-th conversation, which sees the prefix and itself.
            num_summary_tokens: length k for all images. Default: in training, one drawn per image from
                `config.summary_lengths`; in evaluation `config.num_summary_tokens`.
            text_input_ids, text_attention_mask: `(M, T)` `process_texts` of captions, for the contrastive loss, which
                is averaged over `config.summary_lengths` when the length is drawn.
            text_image, text_image_mask: see `losses_fwd2bot.contrastive_loss`. Default: text i describes image i.

        Returns:
            [`Fwd2BotOutput`].
        """
        compress_inputs = _take_prefixed(kwargs, "compress_")
        if not compress_inputs:
            with run_stage("generate"):
                output = self.backbone(
                    input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
                )
            return Fwd2BotOutput(
                logits=output.logits,
                past_key_values=output.past_key_values,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            )
        if self.training and torch.is_grad_enabled():
            self.config.fingerprint = None

        lengths = self._draw_lengths(len(compress_inputs["input_ids"]), num_summary_tokens)
        k_max = int(lengths.max())
        tokens = self._compress_pass(k_max, **compress_inputs)  # (N, k_max, d)
        output = Fwd2BotOutput(summary=Fwd2BotSummary(tokens, lengths, self._metadata(tokens.dtype)))
        output.image_embeds = pool_summary(tokens, k_max)
        losses = []
        if input_ids is not None:
            output.logits, shifted = self._generate_pass(output.summary, input_ids, attention_mask, labels, segment_ids)
            if labels is not None:
                output.autoregressive_loss = autoregressive_loss(output.logits, shifted, num_items_in_batch)
                losses.append(self.config.autoregressive_loss_weight * output.autoregressive_loss)
        if text_input_ids is not None:
            text_tokens = self._compress_pass(k_max, text_input_ids, text_attention_mask)  # (M, k_max, d)
            output.text_embeds = pool_summary(text_tokens, k_max)
            if text_image is None:
                text_image = torch.arange(len(text_tokens), device=text_tokens.device)
            pooled = [k_max] if num_summary_tokens or not self.training else self.config.summary_lengths
            scale = self._logit_scale()
            output.contrastive_loss = torch.stack([
                contrastive_loss(pool_summary(tokens, k), pool_summary(text_tokens, k), scale, text_image, text_image_mask)
                for k in pooled
                if k <= k_max
            ]).mean()
            losses.append(self.config.contrastive_loss_weight * output.contrastive_loss)
        output.loss = sum(losses) if losses else None
        return output

    def _generate_pass(
        self,
        summary: Fwd2BotSummary,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        segment_ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits `(N, L', V)` of the prompts with their summaries in place, and the labels `(N, L')` moved along."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        expanded = expand_placeholders(
            input_ids, attention_mask, summary.lengths, self.image_token_id, self._pad_token_id, labels, segment_ids
        )
        mask = expanded["attention_mask"]
        position_ids = position_ids_from_mask(mask)
        if segment_ids is not None:
            mask, position_ids = packed_attention_mask(expanded["segment_ids"], mask)
        with run_stage("generate"):
            logits = self.backbone(
                inputs_embeds=self._insert(summary, expanded),
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=False,
            ).logits
        return logits, expanded.get("labels")

    def _logit_scale(self) -> torch.Tensor:
        """1 / temperature; the parameter itself is clamped, so that it can always move back."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(1 / self.config.min_temperature))
        return self.logit_scale.exp()

    # Use

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
        return Fwd2BotSummary(tokens, metadata=self._metadata(tokens.dtype))

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
        k = check_num_summary_tokens(num_summary_tokens or longest, self.config)
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
            kwargs: any argument of `generate()`.

        Returns:
            What `generate()` returns; the sequences are the given `input_ids` and the new ids, `(N, L + new)`.

        Raises:
            ValueError: when placeholders and summaries differ in number, or a summary came from another model.
        """
        summary = self._check_summary(summary)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        expanded = expand_placeholders(
            input_ids, attention_mask, summary.lengths, self.image_token_id, self._pad_token_id
        )
        output = super().generate(
            expanded["input_ids"],
            attention_mask=expanded["attention_mask"],
            inputs_embeds=self._insert(summary, expanded),
            **kwargs,
        )
        return _restore_prompt(output, input_ids, expanded["input_ids"].shape[1])

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
            raise ValueError("generate() needs input_ids: pass everything that processor(images=..., text=...) returned.")
        compress_inputs = _take_prefixed(kwargs, "compress_")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        placeholders = count_placeholders(input_ids, mask, self.image_token_id)
        if compress_inputs:
            summary = self.compress(num_summary_tokens=num_summary_tokens, **compress_inputs)
            return self.generate_from_summary(summary, input_ids, attention_mask, **kwargs)
        if placeholders.any():
            raise ValueError(
                f"The prompts hold {int(placeholders.sum())} image placeholder(s), but no image was given. Pass the "
                "`compress_` tensors of processor(images=..., text=...), or use generate_from_summary."
            )
        return super().generate(input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate_uncompressed(self, **inputs: Any) -> torch.LongTensor | ModelOutput:
        """The baseline: the bare backbone's `generate()` on all its image tokens.

        Args:
            inputs: what `processor.backbone_processor(images=..., text=...)` returned, and arguments of `generate()`.
        """
        with run_stage(None):
            return self.backbone.generate(**inputs)

    # Checks

    def _metadata(self, dtype: torch.dtype) -> dict[str, str | None]:
        return {
            "model": self.config.name_or_path or None,
            "revision": getattr(self.config, "_commit_hash", None),
            "fingerprint": self.config.fingerprint,
            "prompt": self.config.image_prompt,
            "dtype": str(dtype).removeprefix("torch."),
        }

    def _check_compress_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        input_ids = inputs.get("input_ids")
        if input_ids is None or input_ids.ndim != 2 or 0 in input_ids.shape:
            found = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(
                f"Nothing to compress: input_ids must be (N, L) with N and L of at least 1, got {found}. "
                "Pass everything that processor.process_images(images) returned."
            )
        if self.stage == "generate":
            raise ValueError("This model was loaded with stage='generate' and cannot compress. Load it without `stage`.")
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                if self.stage == "text":
                    raise ValueError(
                        f"This model was loaded with stage='text', without its vision tower, and cannot read {name!r}. "
                        "Load it without `stage`, or with stage='compress'."
                    )
                if not torch.isfinite(value).all():
                    raise ValueError(f"{name!r} holds NaN or infinity. Make it anew with processor.process_images.")
                inputs[name] = value.to(self.dtype)
        return inputs

    def _check_summary(self, value: Any) -> Fwd2BotSummary:
        summary = summary_from(value)
        width = self.summary_projector.out_features
        if summary.tokens.shape[-1] != width:
            raise ValueError(f"The summary is {summary.tokens.shape[-1]} wide, but this model's summaries are {width} wide.")
        theirs, ours = summary.metadata, self._metadata(summary.tokens.dtype)
        for key in ("fingerprint", "prompt"):
            if None not in (theirs[key], ours[key]) and theirs[key] != ours[key]:
                raise ValueError(
                    f"The summary was made by another model: {key} {theirs[key]!r} of {theirs['model']!r}, but this one "
                    f"is {ours['model']!r} with {ours[key]!r}. Compress the images anew with this model."
                )
        if not torch.isfinite(summary.tokens).all():
            raise ValueError("The summary holds NaN or infinity. Compress the images anew.")
        return summary.to(device=self.device, dtype=self.dtype)


def _drop_vision(backbone: PreTrainedModel) -> list[str]:
    """Remove what the generate pass does not use; returns patterns of the names of the removed weights."""
    base, decoder = backbone.base_model, backbone.get_decoder()
    patterns = []
    for name, child in list(base.named_children()):
        if not any(module is decoder for module in child.modules()):
            setattr(base, name, None)
            patterns.append(rf"\.{name}\.")
    return patterns


def _take_prefixed(kwargs: dict[str, Any], prefix: str) -> dict[str, Any]:
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
