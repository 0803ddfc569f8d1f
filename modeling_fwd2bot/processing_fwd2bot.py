"""`Fwd2BotProcessor`: images and texts to tensors, by the backbone's own processor and chat template."""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import TextKwargs
from transformers.utils import PROCESSOR_NAME, cached_file, logging

from .backbone_fwd2bot import merged_token_id
from .configuration_fwd2bot import IMAGE_PROMPT, TEXT_PROMPT
from .folder_fwd2bot import AUTO_MAP, HUB_OPTIONS, check_name, draft_folder
from .picture_groups_fwd2bot import groups_of, is_by_picture, join_rows
from .pictures_fwd2bot import load_image

logger = logging.get_logger(__name__)

# A fast tokenizer keeps its padding as a state, so calls from several threads must not overlap.
_tokenizing = threading.Lock()


def adds_special_tokens(tokenizer: Any, prompts: Sequence[str]) -> bool:
    """Whether the tokenizer shall add its start token: not where the chat template has written it already.

    For the `add_special_tokens` of a backbone's own processor; without the start token it answers worse.
    """
    return not (tokenizer.bos_token and prompts[0].startswith(tokenizer.bos_token))


class Fwd2BotProcessor(ProcessorMixin):
    """Wraps the processor of the backbone; adds the two prompts of the compress pass.

    Args:
        backbone_processor: the backbone's own processor, with a chat template.
        image_prompt, text_prompt: what follows the image, or the text, in the compress pass.
    """

    def __init__(
        self, backbone_processor: Any = None, image_prompt: str = IMAGE_PROMPT, text_prompt: str = TEXT_PROMPT
    ):
        # ProcessorMixin.__init__ is left out: it wants the parts, which belong to the backbone's processor.
        if not hasattr(backbone_processor, "image_processor") or not hasattr(backbone_processor, "tokenizer"):
            raise TypeError(
                "backbone_processor must be the processor of a vision-language model, with an image processor and a "
                f"tokenizer, got {type(backbone_processor).__name__}. Load it with AutoProcessor.from_pretrained."
            )
        self.backbone_processor = backbone_processor
        self.image_processor = backbone_processor.image_processor
        self.tokenizer = backbone_processor.tokenizer
        self.chat_template = backbone_processor.chat_template or self.tokenizer.chat_template
        if self.chat_template is None:
            raise ValueError(
                f"{type(backbone_processor).__name__} has no chat template, which Fwd2Bot's prompts are made with. "
                "Set backbone_processor.chat_template."
            )
        self.image_prompt = image_prompt
        self.text_prompt = text_prompt
        self.image_token = getattr(backbone_processor, "image_token", None) or self.tokenizer.image_token
        self.image_token_id = merged_token_id(backbone_processor)
        self._takes_groups: bool | None = None  # whether large pictures may go through in groups; not tried yet
        self._merged_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    load_image = staticmethod(load_image)  # for the pipelines, which decode pictures ahead of the model

    @classmethod
    def get_attributes(cls) -> list[str]:
        return []  # the parts are saved and loaded by the backbone's processor

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            *(f"compress_{name}" for name in self.backbone_processor.model_input_names),
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts, with one image token per image, and the images' compress inputs.

        Args:
            images: a picture, a list of pictures, or a list of lists; their number equals that of the image tokens in
                `text`, in order. What a picture may be: see [`load_image`].
            text: prompts, as `apply_chat_template` gives them. Without `text`, the compress inputs alone.
            padding, padding_side: of the prompts.
            kwargs: further options of the tokenizer, such as `truncation` and `max_length`.

        Returns:
            `input_ids`, `attention_mask` `(N, L)`; with images also the tensors of `process_images`, keys prefixed
            with `compress_`.

        Raises:
            ValueError: when image tokens and images differ in number (with `images` given), or for an empty list.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; the only one is 'pt'.")
        if images is None and text is None:
            raise ValueError("Nothing to process: give text, images or both.")
        options = {name: value for name, value in kwargs.items() if value is not None}
        unknown = sorted(set(options) - set(TextKwargs.__annotations__))
        if unknown:
            raise TypeError(
                f"Unknown argument(s) {unknown}; allowed beside the named: {sorted(TextKwargs.__annotations__)}."
            )
        images = None if images is None else _flatten(images)
        data: dict[str, Any] = {}
        if text is not None:
            texts = _check_texts(text)
            options = {"padding": padding, "padding_side": padding_side, **options}
            data.update(self._tokenize(texts, **options))
            if images is not None:
                found = [one.count(self.image_token) for one in texts]
                if sum(found) != len(images):
                    raise ValueError(
                        f"The text holds {sum(found)} image token(s) {self.image_token!r} ({found} per prompt), but "
                        f"{len(images)} image(s) were given. Put one into the text for each image."
                    )
        if images is not None:
            data.update({f"compress_{name}": value for name, value in self.process_images(images).items()})
        return BatchFeature({name: value for name, value in data.items() if name != "token_type_ids"})

    def process_images(self, images: Any) -> BatchFeature:
        """`[image][its prompt]`, a row per picture, left-padded: what `compress` and `embed` take.

        Args:
            images: a picture or a list of pictures; see [`load_image`].

        Raises:
            TypeError, ValueError: for an empty list, or a picture that cannot be used.
        """
        pictures = [load_image(image, copy=False) for image in _flatten(images)]
        prompt = self.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.image_prompt}]}],
            add_generation_prompt=True,
        )

        def run(group: Sequence[Image.Image]) -> BatchFeature:
            with _tokenizing:
                batch = self.backbone_processor(
                    images=[[picture] for picture in group],
                    text=[prompt] * len(group),
                    padding=True,
                    padding_side="left",
                    return_tensors="pt",
                    add_special_tokens=adds_special_tokens(self.tokenizer, [prompt]),
                )
            batch.pop("labels", None)  # PaliGemma's processor makes some
            return batch

        groups, pad_token_id = groups_of(pictures), self.tokenizer.pad_token_id
        if len(groups) > 1 and self._takes_groups is not False:
            self._takes_groups = self._takes_groups or is_by_picture(run, pad_token_id)
            batch = join_rows(map(run, groups), pad_token_id) if self._takes_groups else None
            if batch is not None:
                return batch
            self._takes_groups = False
        return run(pictures)

    def process_texts(self, texts: str | Sequence[str], *, truncation: bool = False) -> BatchFeature:
        """`[text][its prompt]`, a row per text, left-padded: what `embed` takes.

        Args:
            truncation: leave out the end of a text that is longer than the model reads, instead of raising.

        Raises:
            TypeError, ValueError: for an empty list, an empty text, or one that is longer than the model reads.
        """
        texts = _check_texts(texts)
        empty = [index for index, text in enumerate(texts) if not text.strip()]
        if empty:
            raise ValueError(f"Text {empty[0]} is empty. Give at least one word.")
        texts = [text.replace(self.image_token, " ").replace(self._merged_token, " ") for text in texts]
        prompts = [
            self.apply_chat_template(
                [{"role": "user", "content": [{"type": "text", "text": f"{text}\n{self.text_prompt}"}]}],
                add_generation_prompt=True,
            )
            for text in texts
        ]
        # What is too long is an error below, or made shorter: no matter for the tokenizer's warning.
        batch = self._tokenize(prompts, padding=True, padding_side="left", verbose=False)
        length, limit = batch["input_ids"].shape[1], self.tokenizer.model_max_length
        if length > limit and truncation:
            excess = (batch["attention_mask"].sum(1) - limit).tolist()
            return self.process_texts(list(map(self._shorten, texts, excess)), truncation=True)
        if length > limit:
            longest = int(batch["attention_mask"].sum(1).argmax())
            raise ValueError(
                f"Text {longest} has {length} tokens with its prompt; the model reads {limit}. Shorten it."
            )
        return BatchFeature({name: batch[name] for name in ("input_ids", "attention_mask")})

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As `ProcessorMixin.apply_chat_template`, by default with the text alone as the result (`tokenize=False`)."""
        return super().apply_chat_template(conversation, *args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        return self.tokenizer.decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Write the backbone's processor, and the class and prompts of this one into its `processor_config.json`."""
        with draft_folder(save_directory) as draft:
            self.backbone_processor.save_pretrained(draft)
            path = draft / PROCESSOR_NAME
            settings = json.loads(path.read_text()) if path.exists() else {}
            settings.update(
                backbone_processor_class=type(self.backbone_processor).__name__,
                image_processor_class=type(self.image_processor).__name__,
                processor_class=type(self).__name__,
                image_prompt=self.image_prompt,
                text_prompt=self.text_prompt,
                auto_map={"AutoProcessor": AUTO_MAP["AutoProcessor"]},
            )
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
            files = [os.path.join(save_directory, file.relative_to(draft)) for file in draft.rglob("*")]
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            super().push_to_hub(repo_id, **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Fwd2BotProcessor":
        """Load what `save_pretrained` wrote; `kwargs` go to the backbone's processor and to the Hub download."""
        path = os.fspath(pretrained_model_name_or_path)
        check_name(path)
        hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        settings = json.loads(Path(cached_file(path, PROCESSOR_NAME, **hub)).read_text())
        backbone_class = settings.get("backbone_processor_class")
        if backbone_class is None:
            raise ValueError(
                f"{path}/{PROCESSOR_NAME} names no backbone_processor_class: it is not a Fwd2Bot processor. Wrap "
                "another one with Fwd2BotProcessor(backbone_processor)."
            )
        processor_class = getattr(transformers, backbone_class, None)
        if not (isinstance(processor_class, type) and issubclass(processor_class, ProcessorMixin)):
            raise ValueError(
                f"{path}/{PROCESSOR_NAME} names {backbone_class!r}, which is no processor of transformers."
            )
        backbone_processor = processor_class.from_pretrained(path, **kwargs)
        _restore_image_processor(backbone_processor, settings.get("image_processor_class"), path, hub)
        return cls(backbone_processor, image_prompt=settings["image_prompt"], text_prompt=settings["text_prompt"])

    def _shorten(self, text: str, excess: int) -> str:
        """The text without its last `excess` tokens; without prompt, so that one more may be too many beside it."""
        if excess <= 0:
            return text
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "return_tensors": None}
        [offsets] = self._tokenize([text], verbose=False, **options)["offset_mapping"]
        if excess >= len(offsets):
            raise ValueError(
                f"The tokenizer's model_max_length={self.tokenizer.model_max_length} leaves no room for a text beside "
                "its prompt. Raise it."
            )
        return text[: offsets[-excess][0]]

    def _tokenize(self, prompts: Sequence[str], **options: Any) -> Any:
        prompts = [prompt.replace(self.image_token, self._merged_token) for prompt in prompts]
        with _tokenizing:
            return self.tokenizer(
                prompts,
                **{
                    "return_tensors": "pt",
                    "add_special_tokens": adds_special_tokens(self.tokenizer, prompts),
                    **options,
                },
            )


def _restore_image_processor(backbone_processor: Any, saved: str | None, path: str, hub: dict[str, Any]) -> None:
    """Use the image processor that was saved.

    transformers takes its torchvision version wherever torchvision is installed, and that one's pixels differ from
    Pillow's by up to a grey level: one checkpoint would make other summaries on another machine.
    """
    loaded = type(backbone_processor.image_processor).__name__
    if saved in (None, loaded):
        return
    try:
        backbone_processor.image_processor = getattr(transformers, saved).from_pretrained(path, **hub)
    except (AttributeError, ImportError) as error:
        logger.warning(
            f"Pictures are prepared by {loaded}, but this checkpoint was made with {saved}, which is not available "
            f"here ({str(error).strip().splitlines()[0]}). Summaries may differ a little from those made elsewhere."
        )


def _check_texts(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, Sequence):
        raise TypeError(f"Text must be a str or a list of them, got {type(texts).__name__}.")
    texts = list(texts)
    if not texts:
        raise ValueError("No text was given: the list is empty.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Text {index} must be a str, got {type(text).__name__}.")
    return texts


def _flatten(images: Any) -> list[Any]:
    """A picture, a list of pictures or a list of lists -> a list of pictures."""
    if not isinstance(images, (list, tuple)):
        return [images]
    flat = [picture for image in images for picture in (image if isinstance(image, (list, tuple)) else [image])]
    if not flat:
        raise ValueError("No image was given: the list is empty.")
    return flat
