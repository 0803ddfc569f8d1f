"""Figures of a Fwd2Bot by what it is for, during training: questions answered from summaries, captions that find."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from .answering import slices
from .gathering import rank, world_size
from .metrics import recall_at_k
from .sharding import is_sharded

KS = (1, 5, 10)


@dataclass
class Answered:
    """A question of a validation sample, what was to be answered, and what was."""

    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        return normalised(self.answer) == normalised(self.expected)


@dataclass
class Seen:
    """What a model made of some samples.

    Args:
        image_embeds: `(N, e)`, image_groups: `(N,)` hashes of the content, images: the pictures themselves.
        captions: with the embeddings `(M, e)` and the hash of the own picture of each, `(M,)`.
    """

    answered: list[Answered] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    image_embeds: list[torch.Tensor] = field(default_factory=list)
    image_groups: list[int] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    caption_embeds: list[torch.Tensor] = field(default_factory=list)
    caption_groups: list[int] = field(default_factory=list)

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(M, N)` similarity of each caption to each different picture, and whether it is that picture's own."""
        groups = list(dict.fromkeys(self.image_groups))
        images = torch.stack([self.image_embeds[self.image_groups.index(group)] for group in groups])
        own = torch.tensor(self.caption_groups)[:, None] == torch.tensor(groups)
        with torch.autocast("cpu", enabled=False):  # that of a run in bfloat16 would round what is compared
            return torch.stack(self.caption_embeds) @ images.T, own


def normalised(text: str) -> str:
    """An answer as it is compared: case, surrounding white space and final punctuation do not count."""
    return text.strip().lower().rstrip(string.punctuation).strip()


def figure_names(samples: Sequence[dict[str, Any]]) -> list[str]:
    """The figures that `Validation` gives for these samples."""
    pictures = {group for sample in samples for group in sample["image_groups"]}
    names = ["accuracy"] if any(question_of(sample) for sample in samples) else []
    if any(sample["captions"] and sample["images"] for sample in samples):
        names += [f"recall@{k}" for k in KS if k <= len(pictures)]
    return names


def question_of(sample: dict[str, Any], captions: bool = False) -> tuple[list[dict[str, Any]], str] | None:
    """The messages up to a sample's last answer, and that answer; None where nothing is asked about pictures.

    A caption is no answer, but with `captions`: of the many that are true of a picture hardly any model gives this one
    word by word.
    """
    messages = [] if sample.get("from_caption") and not captions else sample["messages"] or []
    last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if not last or not sample["images"]:
        return None
    return messages[:last], "".join(part["text"] for part in messages[last]["content"] if part["type"] == "text")


class Validation:
    """Answers and retrieval from summaries, on samples of the validation sources.

    Args:
        samples: as `SourceMixture` gives them.
        num_summary_tokens: length k; None is the configured one.
        max_new_tokens: of an answer.
        batch_size: samples at once.
    """

    def __init__(
        self,
        processor: Fwd2BotProcessor,
        samples: Sequence[dict[str, Any]],
        batch_size: int,
        num_summary_tokens: int | None = None,
        max_new_tokens: int = 32,
    ):
        self.processor, self.samples, self.batch_size = processor, samples, batch_size
        self.num_summary_tokens, self.max_new_tokens = num_summary_tokens, max_new_tokens

    def __call__(self, model: Fwd2BotForConditionalGeneration) -> dict[str, float]:
        """`accuracy`, the share of right answers, and `recall@k` of the captions; each process does its share."""
        divided = world_size() > 1 and not is_sharded(model)  # of which all processes must run the same passes
        own = self.look(model, self.samples[rank() :: world_size()] if divided else self.samples)
        own.images = []
        every = [own]
        if divided:
            every = [None] * world_size()
            dist.all_gather_object(every, own)
        seen = Seen(**{name: [one for each in every for one in getattr(each, name)] for name in vars(own)})
        figures = {}
        if seen.answered:
            figures["accuracy"] = sum(one.right for one in seen.answered) / len(seen.answered)
        if seen.captions:
            scores, own_picture = seen.scores()
            ks = [k for k in KS if k <= scores.shape[1]]
            figures |= recall_at_k(scores, own_picture, ks)
        return figures

    @torch.no_grad()
    def look(
        self, model: Fwd2BotForConditionalGeneration, samples: Sequence[dict[str, Any]], describe: bool = False
    ) -> Seen:
        """What the model makes of samples, in evaluation mode; its mode is restored.

        Args:
            describe: whether it is asked for captions, too, as it learns them.
        """
        was_training = model.training
        model.eval()
        try:
            seen = Seen()
            for part in slices(len(samples), self.batch_size):
                self._look(model, samples[part], seen, describe)
            return seen
        finally:
            model.train(was_training)

    def _look(
        self, model: Fwd2BotForConditionalGeneration, samples: Sequence[dict[str, Any]], seen: Seen, describe: bool
    ) -> None:
        images = [image for sample in samples for image in sample["images"]]
        captions = [(caption, sample) for sample in samples for caption in sample["captions"] if sample["images"]]
        if captions:
            texts = self._to(model, self.processor.process_texts([caption for caption, _ in captions]))
            embeds = model.embed(**texts, num_summary_tokens=self.num_summary_tokens)
            seen.captions += [caption for caption, _ in captions]
            seen.caption_embeds += list(embeds.cpu())
            seen.caption_groups += [sample["image_groups"][0] for _, sample in captions]
        if not images:
            return
        inputs = self._to(model, self.processor.process_images(images))
        summary = model.compress(**inputs, num_summary_tokens=self.num_summary_tokens)
        seen.images += images
        seen.image_embeds += list(model.embed(summary=summary).cpu())
        seen.image_groups += [group for sample in samples for group in sample["image_groups"]]
        rows, asked, first = [], [], 0
        for sample in samples:
            question = question_of(sample, describe)
            if question is not None:
                rows += range(first, first + len(sample["images"]))
                asked.append(question)
            first += len(sample["images"])
        if asked:
            prompts = [self.processor.apply_chat_template(told, add_generation_prompt=True) for told, _ in asked]
            inputs = self._to(model, self.processor(text=prompts))
            ids = model.generate_from_summary(
                summary[rows], **inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers = self.processor.batch_decode(new, skip_special_tokens=True)
            seen.answered += [
                Answered(prompt, expected, answer.strip())
                for prompt, (_, expected), answer in zip(prompts, asked, answers, strict=True)
            ]

    @staticmethod
    def _to(model: Fwd2BotForConditionalGeneration, inputs: Any) -> dict[str, Any]:
        return {name: value.to(model.device) for name, value in inputs.items()}
