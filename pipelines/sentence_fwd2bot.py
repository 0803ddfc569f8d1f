"""The module that `modules.json` names: `SentenceTransformer(folder, trust_remote_code=True)` embeds with this model.

Sentence Transformers imports this file; nothing else does, so that it stays optional.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from sentence_transformers.base.modality import infer_modality
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel, AutoProcessor

SETTINGS = "config_sentence_transformers.json"


class Fwd2BotEmbedder(InputModule):
    """Texts and pictures to the embeddings that `model.embed` gives.

    Args:
        model, processor: a Fwd2Bot and its processor.
        num_summary_tokens: length k of every embedding; `encode(..., num_summary_tokens=k)` chooses another. Default:
            the largest that the model has.
    """

    config_file_name = "sentence_fwd2bot_config.json"
    config_keys = ["num_summary_tokens"]
    forward_kwargs = {"num_summary_tokens"}

    def __init__(self, model: Any, processor: Any, num_summary_tokens: int | None = None):
        super().__init__()
        self.model = model
        self.processor = processor
        self.num_summary_tokens = num_summary_tokens

    @property
    def modalities(self) -> list[str]:
        # "message" is what Sentence Transformers calls a batch of texts and pictures mixed.
        return ["text"] if self.model.stage == "text" else ["text", "image", "message"]

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Tokens of a text with its prompt; the end of a longer text is left out."""
        return self.tokenizer.model_max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.model_max_length = value

    def get_embedding_dimension(self) -> int:
        return self.model.summary_projector.out_features

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Texts and pictures, in any order, to the tensors of `process_texts` and `process_images`.

        Args:
            inputs: a str is a text, or a picture if it is the path of a picture or its URL; a `PIL.Image`, a path
                object, bytes and a `(height, width, 3)` uint8 array are pictures; `{"text": ...}` and
                `{"image": ...}` say which it is, as does a message of one part.
            prompt: is put in front of the texts, as it is.

        Raises:
            TypeError, ValueError: for anything else, before any compute.
        """
        read = [_read(one) for one in inputs]
        texts = [(prompt or "") + value for modality, value in read if modality == "text"]
        pictures = [value for modality, value in read if modality == "image"]
        features = {"is_picture": torch.tensor([modality == "image" for modality, _ in read])}
        if texts:
            batch = self.processor.process_texts(texts, truncation=True)
            features |= {f"text_{name}": value for name, value in batch.items()}
        if pictures:
            batch = self.processor.process_images(pictures)
            features |= {f"image_{name}": value for name, value in batch.items()}
        return features

    def forward(
        self, features: dict[str, Any], num_summary_tokens: int | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Adds `sentence_embedding` `(N, d)`, and the summaries `(N, k, d)` as `token_embeddings`."""
        if self.training and torch.is_grad_enabled():
            raise NotImplementedError(
                "Embeddings made by Sentence Transformers have no gradient. Train the model with fwd2bot.training."
            )
        k = self.num_summary_tokens if num_summary_tokens is None else num_summary_tokens
        is_picture = features["is_picture"]
        for prefix, rows in (("text_", ~is_picture), ("image_", is_picture)):
            inputs = {name.removeprefix(prefix): value for name, value in features.items() if name.startswith(prefix)}
            if inputs:
                summary = self.model.compress(**inputs, num_summary_tokens=k)
                for name, value in (
                    ("sentence_embedding", self.model.embed(summary=summary)),
                    ("token_embeddings", summary.tokens),
                ):
                    if name not in features:
                        features[name] = value.new_zeros(len(is_picture), *value.shape[1:])
                    features[name][rows] = value
        features["attention_mask"] = is_picture.new_ones(features["token_embeddings"].shape[:2])
        return features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write model, processor and code, beside what Sentence Transformers has written already."""
        if not safe_serialization:
            raise ValueError("The weights are saved as safetensors only. Leave safe_serialization out.")
        settings = Path(output_path, SETTINGS)
        written = settings.read_bytes() if settings.exists() else None
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)
        if written is not None:  # the prompts, similarity and width of this model, not the defaults of a new one
            settings.write_bytes(written)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> "Fwd2BotEmbedder":
        """Load a checkpoint; `model_kwargs` are those of `AutoModel.from_pretrained`, `stage` among them."""
        if backend != "torch":
            raise ValueError(f"backend={backend!r} is not supported; the only one is 'torch'.")
        place = {"subfolder": subfolder, "token": token, "revision": revision, "local_files_only": local_files_only}
        hub = {**place, "cache_dir": cache_folder, "trust_remote_code": trust_remote_code}
        model = AutoModel.from_pretrained(
            model_name_or_path, **{**hub, **(config_kwargs or {}), **(model_kwargs or {})}
        )
        processor = AutoProcessor.from_pretrained(model_name_or_path, **{**hub, **(processor_kwargs or {})})
        config = cls.load_config(model_name_or_path, **place, cache_folder=cache_folder)
        return cls(model, processor, **config)


def _read(sample: Any) -> tuple[str, Any]:
    """What a sample is, "text" or "image", and the str or the picture itself."""
    if isinstance(sample, (bytes, bytearray, memoryview, os.PathLike)):
        return "image", sample
    modality = infer_modality(sample)
    if modality == "message":
        return _read_message(sample)
    value = sample[modality] if isinstance(sample, dict) and set(sample) == {modality} else sample
    if modality not in ("text", "image") or isinstance(value, (list, tuple)):
        found = "+".join(modality) if isinstance(modality, tuple) else modality
        raise ValueError(
            f"An embedding is of one text or of one picture, got {found} ({type(value).__name__}). "
            "Encode each part on its own."
        )
    if isinstance(value, str) and value.startswith("data:image/"):
        with urlopen(value) as content:
            value = content.read()
    return modality, value


def _read_message(messages: Any) -> tuple[str, Any]:
    messages = messages if isinstance(messages, list) else [messages]
    content = messages[0]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if len(messages) != 1 or len(parts) != 1 or parts[0].get("type") not in ("text", "image"):
        raise ValueError(
            "An embedding is of one text or of one picture; the conversation has more, or something else. Encode each "
            f"part on its own: {str(messages)[:200]}"
        )
    [part] = parts
    value = next((part[name] for name in (part["type"], "url", "path") if name in part), None)
    return _read({part["type"]: value})
