"""One stage's adapter folded into the weights, for a process that does nothing else.

The compress export is a Fwd2Bot without adapters and output head. The generate export is an ordinary causal language
model, which transformers loads by itself and servers take that accept prompts as embeddings.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .backbone_fwd2bot import check_processor
from .configuration_fwd2bot import STAGES
from .folder_fwd2bot import copy_code, draft_folder, set_auto_map
from .merging_fwd2bot import merged_state
from .quantization_fwd2bot import is_quantized
from .weights_fwd2bot import QUERIES

# Language models that transformers has inside of an LVLM only, and what computes the same on plain positions.
CAUSAL_TWINS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
    "glm4v_text": "glm4",
}
# What they have a setting for, and an LVLM's language model does always.
ALWAYS = {"qwen3_moe": {"norm_topk_prob": True}}
# What some causal language models do to the logits after their head, and the value with which they do nothing. Many
# LVLMs around the same language model do nothing.
AFTER_HEAD = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
PROBE_LENGTH = 16
# Largest difference of the logits, as a share of the largest logit, between the export and the model that it is of.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class ExportMixin:
    """`merge_and_export` of [`Fwd2BotForConditionalGeneration`]."""

    @torch.no_grad()
    def merge_and_export(self, stage: str, save_directory: str | os.PathLike, processor: Any) -> None:
        """Write a checkpoint of one stage, its adapter merged into the weights; the model itself stays as it is.

        The weights of one language model are needed in memory beside the model's own.

        Args:
            stage: "compress": a Fwd2Bot that compresses and embeds, for `AutoModel.from_pretrained(save_directory,
                trust_remote_code=True)`. "generate": a causal language model, for `AutoModelForCausalLM`, which given
                embeddings with the summary in place says what `generate_from_summary` says. Its `config.fwd2bot` has
                the fingerprint, the image token that the chat template writes, and its id in the vocabulary.
            save_directory: a new or empty folder.
            processor: the model's [`Fwd2BotProcessor`], which is saved along; for "generate" its tokenizer alone.

        Raises:
            ValueError: for an unknown stage, a model that lacks parts or is quantised, or a language model that no
                causal language model of transformers can express: what was written is loaded and compared first.
            FileExistsError: when the folder holds anything.
        """
        if stage not in STAGES:
            raise ValueError(f"stage={stage!r} is unknown; choose one of {list(STAGES)}.")
        if self.stage is not None:
            raise ValueError(self._lacks_parts("be exported"))
        if not hasattr(processor, "backbone_processor"):
            raise TypeError(
                f"processor must be the Fwd2BotProcessor of this model, got {type(processor).__name__}. Wrap it: "
                "Fwd2BotProcessor(backbone_processor)."
            )
        check_processor(self.backbone, processor.backbone_processor)
        if is_quantized(self.backbone):
            raise ValueError(
                "The backbone is quantised, and no adapter can be merged into it exactly. Load the model unquantised, "
                "export it, and quantise the export when it is loaded."
            )
        if os.path.isdir(save_directory) and os.listdir(save_directory):
            raise FileExistsError(f"{save_directory} is not empty. Give a new folder for the export.")
        was_training = self.training
        self.eval()
        try:
            with draft_folder(save_directory) as draft:
                if stage == "compress":
                    _write_compressor(self, draft)
                    processor.save_pretrained(draft)
                else:
                    config = _write_language_model(self, draft, processor)
                    _compare(self, draft, config)
        finally:
            self.train(was_training)


def _write_compressor(model: Any, folder: Path) -> None:
    config = copy.deepcopy(model.config)
    config.fingerprint, config.merged_stage, config.adapter_only = model.fingerprint, "compress", False
    config._attn_implementation = None
    set_auto_map(config)
    with torch.device("meta"):
        merged = type(model)(config)
    places = merged.state_dict().keys()
    state = {name: value for name, value in merged_state(model, "compress").items() if name in places}
    merged.load_state_dict(state, assign=True)
    merged.tie_weights(recompute_mapping=False)
    PreTrainedModel.save_pretrained(merged, folder)
    copy_code(folder, config, model._hub)


def _write_language_model(model: Any, folder: Path, processor: Any) -> PreTrainedConfig:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = _causal_config(model)
    config.tie_word_embeddings = head.weight is embedding.weight
    config.fwd2bot = {
        "fingerprint": model.fingerprint,
        "image_token": processor.image_token,
        "image_token_id": processor.image_token_id,
        "num_summary_tokens": model.config.num_summary_tokens,
    }
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config)
    names = {module: name for name, module in language_model.named_modules()}
    parts = {
        names[language_model.base_model]: merged_state(model.get_decoder(), "generate"),
        names[language_model.get_output_embeddings()]: head.state_dict(),
    }
    state = {
        f"{part}.{name}": value
        for part, values in parts.items()
        for name, value in values.items()
        if not name.endswith(QUERIES)
    }
    try:
        language_model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(_cannot_express(model, config, str(error))) from error
    language_model.tie_weights()
    language_model.generation_config = model.generation_config
    language_model.save_pretrained(folder)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)
    return config


def _causal_config(model: Any) -> PreTrainedConfig:
    """Config of the causal language model that computes what the backbone's language model does."""
    text_config = model.config.get_text_config()
    if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        config = copy.deepcopy(text_config)
    elif text_config.model_type in CAUSAL_TWINS:
        config_class = CONFIG_MAPPING[CAUSAL_TWINS[text_config.model_type]]
        known = set(config_class.__dataclass_fields__) - {"model_type", "transformers_version", "architectures"}
        values, renamed = text_config.to_dict(), text_config.attribute_map  # {"num_experts": "num_local_experts"}
        fields = {name: values[renamed.get(name, name)] for name in known if renamed.get(name, name) in values}
        fields |= ALWAYS.get(config_class.model_type, {})
        # All positions of a word are equal in the generate pass: one rotary angle, as in plain RoPE.
        rope = {
            name: value
            for name, value in fields["rope_parameters"].items()
            if not name.startswith("mrope") and name != "type"  # "type": "mrope" is an older name of "rope_type"
        }
        if "head_dim" in known and not fields.get("head_dim"):
            fields["head_dim"] = text_config.hidden_size // text_config.num_attention_heads
        config = config_class(**{**fields, "rope_parameters": rope})
    else:
        raise ValueError(
            f"transformers has no causal language model for {text_config.model_type!r}, the language model of "
            f"{type(model.backbone).__name__}. Answer with from_pretrained(path, stage='generate') instead."
        )
    if getattr(config, "use_bidirectional_attention", None):  # PaliGemma, which gives its own mask
        config.use_bidirectional_attention = False
    if _logits_are_the_heads(model):
        for name, value in AFTER_HEAD.items():
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
    config.dtype = model.dtype
    config._attn_implementation = text_config._attn_implementation
    return config


def _logits_are_the_heads(model: Any) -> bool:
    """Whether the backbone gives out what its head does, and does nothing to it."""
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        logits = model(**_probe(model)[0]).logits
    finally:
        hook.remove()
    return torch.equal(seen[-1], logits)


def _compare(model: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Load what was written, and raise `ValueError` unless it says what the generate pass says."""
    language_model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, attn_implementation=config._attn_implementation, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(_cannot_express(model, config, f"loading it, {info}"))
    language_model = language_model.to(model.device)
    inputs, ids = _probe(model)
    if not torch.equal(language_model.get_input_embeddings()(ids), model.get_input_embeddings()(ids)):
        raise ValueError(_cannot_express(model, config, "it embeds words otherwise"))
    expected, found = model(**inputs).logits.float(), language_model(**inputs).logits.float()
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE.get(model.dtype, TOLERANCE[torch.float32]):
        raise ValueError(_cannot_express(model, config, f"its logits differ by {difference:.2%} of the largest"))


def _probe(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs of the generate pass, random vectors and then words, and the ids `(1, L)` of these words."""
    words, random = model.get_input_embeddings(), torch.Generator().manual_seed(0)
    ids = torch.randint(words.num_embeddings, (1, PROBE_LENGTH), generator=random).to(model.device)
    summary = torch.randn(1, PROBE_LENGTH, words.embedding_dim, generator=random).to(model.device, model.dtype)
    embeds = torch.cat([summary * words(ids).std(), words(ids)], 1)  # (1, 2L, d)
    return {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones_like(embeds[..., 0], dtype=torch.long),
        "position_ids": torch.arange(embeds.shape[1], device=embeds.device).unsqueeze(0),
    }, ids


def _cannot_express(model: Any, config: PreTrainedConfig, why: str) -> str:
    return (
        f"A causal language model of type {config.model_type!r} cannot express the language model of "
        f"{type(model.backbone).__name__}: {why}. Answer with from_pretrained(path, stage='generate') instead."
    )
