"""`Fwd2BotForConditionalGeneration`: an LVLM that compresses its own image tokens, and answers from the result.

Compress pass: the backbone reads `[image][prompt][k summary queries]`; its last hidden states at the queries, through
the summary projector, are the summary. Generate pass: the same backbone reads a prompt in which the summary stands in
place of the image, and answers. Source: Fwd2Bot (arXiv 2503.21757) and its NeurIPS 2025 version, "Compress & Cache".
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import can_return_tuple

from .adapters_fwd2bot import (
    checkpoint_stage,
    drop_head,
    drop_vision,
    install_adapter,
    install_queries,
    is_adapter_parameter,
    left_out_pattern,
    reads_words_alone,
    run_stage,
)
from .backbone_fwd2bot import causal_token_types, connector_parameters, reads_token_types
from .checkpoint_fwd2bot import CheckpointMixin
from .configuration_fwd2bot import STAGES, Fwd2BotConfig, check_lengths, check_num_summary_tokens
from .export_fwd2bot import ExportMixin
from .final_norm_fwd2bot import install_final_norm
from .generation_fwd2bot import SummaryGenerationMixin, take_prefixed
from .last_positions_fwd2bot import install_last_positions, only_last_positions
from .losses_fwd2bot import INITIAL_LOGIT_BIAS, autoregressive_loss, contrastive_loss, sigmoid_loss
from .output_fwd2bot import Fwd2BotOutput
from .passes_fwd2bot import PassesMixin
from .placeholders_fwd2bot import check_by_token, check_placeholder_images, check_placeholders, count_placeholders
from .quantization_fwd2bot import check_gradients, shown_to_peft
from .summary_fwd2bot import Fwd2BotSummary


class Fwd2BotForConditionalGeneration(
    CheckpointMixin, ExportMixin, SummaryGenerationMixin, PassesMixin, PreTrainedModel
):
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
            raise ValueError(f"stage={stage!r} is unknown; choose None (all), 'compress', 'generate' or 'text'.")
        missing = [name for name in ("backbone_config", "adapters") if getattr(config, name) is None]
        if missing:
            raise ValueError(
                f"The config has no {' and no '.join(missing)}. Make an untrained model with "
                "Fwd2BotForConditionalGeneration.from_backbone, which fills them in."
            )
        asked_attention = config._attn_implementation  # before super() settles it for a model that may be another's
        super().__init__(config)
        if config.merged_stage is not None:
            if stage not in (None, config.merged_stage):
                raise ValueError(
                    f"The {config.merged_stage} adapter is merged into the weights of this checkpoint, and it cannot "
                    f"be loaded with stage={stage!r}. Load the checkpoint that it was exported from."
                )
            stage = config.merged_stage
        self.stage = stage
        if backbone is None:
            backbone = AutoModelForImageTextToText.from_config(
                config.backbone_config,
                attn_implementation=asked_attention,
                dtype=torch.get_default_dtype(),
            )
        self.backbone = backbone
        self._reads_token_types = reads_token_types(backbone)
        width = config.get_text_config().hidden_size
        install_queries(backbone.get_input_embeddings(), torch.randn(config.num_summary_tokens, width) * 0.02)
        self._left_out = []
        for name in STAGES if config.merged_stage is None else ():
            if stage in (None, "text", name):
                with shown_to_peft(backbone) as decoder:
                    install_adapter(decoder, name, config.adapters[name])
            else:
                self._left_out.append(left_out_pattern(name))
        if stage in ("generate", "text"):
            self._left_out += drop_vision(backbone)
        elif stage == "compress":
            self._left_out += drop_head(backbone)
        if not torch.empty(0).is_meta:  # in loading, afterwards: quantisers replace what is torch.nn.Linear itself
            install_last_positions(backbone.get_decoder())
        if not config.summary_norm:
            install_final_norm(backbone.get_decoder())
        self.summary_projector = nn.Linear(width, width)
        nn.init.zeros_(self.summary_projector.bias)
        nn.init.eye_(self.summary_projector.weight)
        with torch.no_grad():
            self.summary_projector.weight.mul_(0.1)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.initial_temperature)))
        if config.contrastive_loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(INITIAL_LOGIT_BIAS))
        self.post_init()
        ignored = self._keys_to_ignore_on_load_unexpected  # a list or a set, as the version of transformers has it
        ignored = [] if ignored is None else ignored
        self._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, *self._left_out])
        if backbone.generation_config is not None:
            self.generation_config = backbone.generation_config

    def init_weights(self) -> None:
        # Every part initialises itself; a second pass would undo LoRA's zero B and a trained backbone's weights.
        self.tie_weights(recompute_mapping=False)

    # What trains

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that Fwd2Bot adds to the backbone, by name."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if is_adapter_parameter(name)
            or name.endswith(".summary_queries")
            or name.startswith("summary_projector.")
            or name in ("logit_scale", "logit_bias")
        }

    def mark_trainable(self) -> dict[str, nn.Parameter]:
        """Set `requires_grad` on exactly the parameters of `trained_parameters()`, and return those.

        With `config.train_connector`, on those of the backbone's connector as well.
        """
        trained = self.trained_parameters()
        if self.config.train_connector:
            trained |= {f"backbone.{name}": value for name, value in connector_parameters(self.backbone).items()}
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
        return trained

    def _check_trainable(self) -> None:
        check_gradients(self.backbone)
        if self.adapters_merged:
            raise ValueError(
                f"The {self.stage} adapter is merged into the weights of this model, so it cannot train. Load it with "
                "merge_adapters=False, or without `stage`."
            )

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        super()._set_gradient_checkpointing(enable, checkpoint_stage(gradient_checkpointing_func), **kwargs)

    def enable_input_require_grads(self) -> None:
        """Of the language model alone: from the vision tower's embeddings on, gradients would be taken for nothing."""
        self.get_decoder().enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.get_decoder().disable_input_require_grads()

    # Shortcuts into the backbone

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.backbone.get_decoder()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        raise NotImplementedError(
            "The ids after the vocabulary are the summary queries, so it cannot grow once they are in place. Resize "
            "the backbone first, then wrap it with from_backbone."
        )

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first parameter that is not offloaded."""
        first = self._parameters.get("logit_scale")  # each step of an answer asks twice: a walk costs more than it may
        if first is not None and not first.is_meta:
            return first.device
        devices = (parameter.device for parameter in self.parameters() if not parameter.is_meta)
        return next(devices, torch.device("cpu" if hasattr(self, "hf_device_map") else "meta"))

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's; what trains may be in float32 all the same."""
        return self.backbone.dtype

    @property
    def _num_words(self) -> int:
        words = self.__dict__.get("_words")  # each answer asks several times, and the way there takes long
        if words is None:
            words = self.get_input_embeddings()
            if not torch.compiler.is_compiling():  # where a dictionary that changes would break the graph
                self.__dict__["_words"] = words
        return words.num_embeddings

    @property
    def image_token_id(self) -> int:
        """Id of the image placeholder."""
        return self.config.backbone_config.image_token_id

    @property
    def _pad_token_id(self) -> int:
        """What stands at masked places: the padding, or any word where that is no row of the input embedding."""
        pad = self.generation_config.pad_token_id if self.generation_config is not None else None
        pad = self.config.get_text_config().pad_token_id if pad is None else pad
        return pad if pad is not None and 0 <= pad < self._num_words else 0

    def _lengths(
        self, num_images: int, num_summary_tokens: int | torch.Tensor | None
    ) -> tuple[torch.Tensor, list[int]]:
        """`(N,)` length per image for the generate pass, and the lengths at which the contrastive loss is taken.

        Both are the given length. In training, without one, lengths are drawn from `config.summary_lengths`; where
        they are drawn or given image by image, the contrastive loss is taken at all of `config.summary_lengths`.
        """
        if isinstance(num_summary_tokens, torch.Tensor):
            return check_lengths(num_summary_tokens, num_images, self.config), list(self.config.summary_lengths)
        if num_summary_tokens is not None or not self.training:
            k = check_num_summary_tokens(num_summary_tokens, self.config)
            return torch.full((num_images,), k), [k]
        choices = torch.tensor(self.config.summary_lengths)
        return choices[torch.randint(len(choices), (num_images,))], choices.tolist()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        segment_ids: torch.LongTensor | None = None,
        placeholder_image: torch.LongTensor | None = None,
        num_summary_tokens: int | torch.LongTensor | None = None,
        text_input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        text_image: torch.LongTensor | None = None,
        text_image_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> Fwd2BotOutput:
        """One training batch through both passes; without `compress_` inputs, the generate pass on words alone.

        Args:
            input_ids, attention_mask, labels: `(N, L)` instructions with one placeholder per image, and what to learn
                (-100 elsewhere).
            compress_input_ids, compress_attention_mask, compress_pixel_values, ...: `process_images` of the images,
                keys prefixed.
            placeholder_image: `(P,)` row of the image that each placeholder shows, row by row. An image may be in none
                or in several. Default: the i-th placeholder shows the i-th image.
            segment_ids: `(N, L)`, for rows that pack many conversations about one image: 0 for the shared prefix, s
                for the s-th conversation, which sees the prefix and itself.
            num_summary_tokens: length k for all images, or `(N,)` for each. Default: in training, one drawn per image
                from `config.summary_lengths`; in evaluation `config.num_summary_tokens`.
            text_input_ids, text_attention_mask: `(M, T)` `process_texts` of captions, for the contrastive loss, which
                is averaged over `config.summary_lengths` when lengths vary.
            text_image, text_image_mask: see `losses_fwd2bot.contrastive_loss`. Default: text i describes image i.
            position_ids, inputs_embeds, logits_to_keep, ...: of one step of generation; not together with images.
            num_items_in_batch: labels in all batches of one optimiser step, as `Trainer` counts them.

        Returns:
            [`Fwd2BotOutput`].

        Raises:
            TypeError, ValueError: for inputs that do not fit together, before any compute.
        """
        compress_inputs = take_prefixed(kwargs, "compress_")
        if not compress_inputs:
            if text_input_ids is not None or segment_ids is not None or placeholder_image is not None:
                raise ValueError(
                    "Captions, segment_ids and placeholder_image need images: give the `compress_` tensors as well."
                )
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is None:
                raise ValueError("forward() got nothing to read. Give what the processor returned for text or images.")
            self._require_stage("generate")
            if inputs_embeds is None and kwargs.get("past_key_values") is None:
                self._check_no_image(input_ids, attention_mask, kwargs)
            if self._reads_token_types:
                kwargs["token_type_ids"] = causal_token_types(given)
            partly = isinstance(logits_to_keep, int) and 0 < logits_to_keep < given.shape[1]
            with (
                run_stage("generate"),
                only_last_positions(logits_to_keep if partly and not self._tells_all(kwargs) else None),
            ):
                output = self.backbone(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    logits_to_keep=logits_to_keep,
                    **kwargs,
                )
                # generate() wants logits and cache, and each step pays for an output of ours
                if labels is None and reads_words_alone():
                    return output
            loss = None if labels is None else autoregressive_loss(output.logits, labels, num_items_in_batch)
            return Fwd2BotOutput(
                loss=loss,
                autoregressive_loss=loss,
                logits=output.logits,
                past_key_values=output.past_key_values,
                hidden_states=output.hidden_states,
                attentions=output.attentions,
            )
        if kwargs or inputs_embeds is not None or position_ids is not None:
            raise TypeError(f"forward() on images takes no {sorted(kwargs) or 'inputs_embeds or position_ids'}.")
        compress_inputs = self._check_compress_inputs(compress_inputs)
        if self.training:
            self._check_trainable()
        num_images = len(compress_inputs["input_ids"])
        lengths, pooled = self._lengths(num_images, num_summary_tokens)
        if input_ids is not None:
            self._require_stage("generate")
            self._check_ids(input_ids, attention_mask)
            check_by_token(input_ids, labels=labels, segment_ids=segment_ids)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            per_row = count_placeholders(input_ids, mask, self.image_token_id)
            if placeholder_image is None:
                check_placeholders(per_row, num_images)
            else:
                check_placeholder_images(placeholder_image, per_row, num_images)
        elif placeholder_image is not None:
            raise ValueError("placeholder_image says what the placeholders of input_ids show: give those as well.")
        if text_input_ids is not None:
            self._check_ids(text_input_ids, text_attention_mask)
        elif text_image is not None or text_attention_mask is not None:
            raise ValueError("text_image and text_attention_mask are of captions: give text_input_ids as well.")

        k_max = max(*pooled, int(lengths.max()))
        tokens = self._compress_pass(k_max, **compress_inputs)  # (N, k_max, d)
        output = Fwd2BotOutput(summary=Fwd2BotSummary(tokens, lengths))
        output.image_embeds = self._pool(tokens, k_max)
        output.image_embeds_by_length = torch.stack([self._pool(tokens, k) for k in pooled])  # (K, N, e)
        losses = []
        share = 1.0  # of this batch in its optimiser step, over which the contrastive loss is averaged
        if input_ids is not None:
            shown = output.summary
            if placeholder_image is not None:
                shown = shown[placeholder_image] if len(placeholder_image) else None
            output.logits, labels = self._generate_pass(shown, input_ids, mask, labels, segment_ids)
            if labels is not None:
                output.autoregressive_loss = autoregressive_loss(output.logits, labels, num_items_in_batch)
                losses.append(self.config.autoregressive_loss_weight * output.autoregressive_loss)
                if num_items_in_batch is not None:
                    share = (labels[:, 1:] != -100).sum() / num_items_in_batch
        if text_input_ids is not None:
            texts = {"input_ids": text_input_ids, "attention_mask": text_attention_mask}
            text_tokens = self._compress_pass(k_max, **texts)  # (M, k_max, d)
            output.text_embeds = self._pool(text_tokens, k_max)
            if text_image is None:
                if len(text_tokens) != num_images:
                    raise ValueError(
                        f"{len(text_tokens)} text(s) came with {num_images} image(s). Give one for each, or say with "
                        "text_image which text describes which image."
                    )
                text_image = torch.arange(len(text_tokens), device=text_tokens.device)
            texts = torch.stack([self._pool(text_tokens, k) for k in pooled])  # (K, M, e)
            output.contrastive_loss = self.contrastive_loss(
                output.image_embeds_by_length, texts, text_image, text_image_mask
            )
            losses.append(self.config.contrastive_loss_weight * share * output.contrastive_loss)
        output.loss = sum(losses) if losses else None
        return Fwd2BotOutput(**output)  # in the order of its fields, as a tuple has them: the loss first

    def contrastive_loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        text_image: torch.Tensor,
        text_image_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The contrastive loss that the config names, at this model's temperature: its mean over K lengths.

        Args:
            image_embeds: `(K, N, e)`, text_embeds: `(K, M, e)`, each length at its place.
            text_image, text_image_mask: see `losses_fwd2bot.contrastive_loss`.
        """
        given = (self._logit_scale().to(image_embeds.device),)
        function = contrastive_loss
        if self.config.contrastive_loss == "sigmoid":
            function, given = sigmoid_loss, (*given, self.logit_bias.to(image_embeds.device))
        pairs = zip(image_embeds, text_embeds, strict=True)
        losses = [function(images, texts, *given, text_image, text_image_mask) for images, texts in pairs]
        return torch.stack(losses).mean()

    def _logit_scale(self) -> torch.Tensor:
        """1 / temperature; the parameter itself is clamped, so that it can always move back."""
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(1 / self.config.min_temperature))
        return self.logit_scale.exp()
