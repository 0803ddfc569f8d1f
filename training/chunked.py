"""A step over a batch in chunks: the gradient of the whole batch at the memory of one chunk.

The contrastive loss compares every image with every text, so its batch cannot be cut as that of the autoregressive
loss can. But its gradient reaches the weights through the embeddings alone (gradient caching, GradCache, arXiv
2101.06983): embed all chunks without gradients, take the loss over the embeddings of all chunks and all processes,
keep its gradient with respect to them; then run each chunk once more, with gradients, and send back that of its own
embeddings together with its autoregressive loss. With one chunk its graph is kept instead, and nothing runs twice.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.losses_fwd2bot import different_content

from .data import IGNORED
from .fwd2bot_model import trains_summaries
from .gathering import gather_counts, gather_rows, rank, world_size
from .sharding import is_sharded

# Of a batch that is not cut: what belongs to the contrastive side, and not to forward().
TEXT_SIDE = ("text_image", "text_image_mask", "text_group", "image_group", "text_kind")


@dataclass
class Batch:
    """What a collator made of some samples.

    Args:
        chunks: arguments of `forward` for N images in all, each with the conversations about its own images, if any.
        text_chunks: `input_ids` and `attention_mask` of `process_texts`, M texts in all.
        text_image: `(M,)` the row of the image of each text, over all chunks; -1 for a hard negative.
        text_image_mask: `(N, M)` bool, false where a text is no valid negative of an image.
        text_group, image_group: `(M,)`, `(N,)` hashes of the content, equal on all processes where the content is.
        text_kind: for the log.
    """

    chunks: list[dict[str, torch.Tensor]]
    text_chunks: list[dict[str, torch.Tensor]]
    text_image: torch.Tensor | None = None
    text_image_mask: torch.Tensor | None = None
    text_group: torch.Tensor | None = None
    image_group: torch.Tensor | None = None
    text_kind: str | None = None

    @property
    def images(self) -> list[int]:
        """The number of images of each chunk."""
        return [len(chunk.get("compress_input_ids", ())) for chunk in self.chunks]

    @property
    def texts(self) -> list[int]:
        """The number of texts of each text chunk."""
        return [len(chunk["input_ids"]) for chunk in self.text_chunks]


def as_batch(inputs: Mapping[str, Any]) -> Batch:
    """The batch of a collator, cut (`chunks`) or not (the arguments of `forward`), which makes it one chunk."""
    side = {name: inputs[name] for name in TEXT_SIDE if name in inputs}
    if "chunks" in inputs:
        return Batch(list(inputs["chunks"]), list(inputs["text_chunks"]), **side)
    rest = {name: value for name, value in inputs.items() if name not in TEXT_SIDE}
    texts = {name.removeprefix("text_"): rest.pop(name) for name in list(rest) if name.startswith("text_")}
    if texts and "text_image" not in side:
        side["text_image"] = torch.arange(len(texts["input_ids"]), device=texts["input_ids"].device)
    return Batch([rest], [texts] if texts else [], **side)


def count_labels(inputs: Mapping[str, Any]) -> int | torch.Tensor:
    """The number of labels that a batch learns; the first of a row has nothing before it."""
    return sum((chunk["labels"][:, 1:] != IGNORED).sum() for chunk in as_batch(inputs).chunks if "labels" in chunk)


@dataclass
class Losses:
    """Of one batch.

    Args:
        autoregressive: this process's part of the mean over the labels of the whole step.
        contrastive: over the batch of all processes; None without texts.
        total: weighted; its mean over the processes is the loss of the batch of all.
        lengths: `(N,)` of this process's images.
    """

    autoregressive: torch.Tensor
    contrastive: torch.Tensor | None
    total: torch.Tensor
    lengths: torch.Tensor


@dataclass
class _Part:
    """One forward pass of the model: a chunk of images, or of texts, which the model compresses as it does images."""

    inputs: dict[str, Any]
    lengths: torch.Tensor | None  # (n,)
    is_text: bool
    rng: tuple | None = None  # the random numbers that its first pass began with
    embeds: torch.Tensor | None = None  # (K, n, e)
    autoregressive: torch.Tensor | None = None
    gradient: torch.Tensor | None = None  # (K, n, e), of the contrastive loss
    # Where weights are sharded, every process runs the same passes, if need be on nothing.
    in_step: bool = False
    idle: dict[str, torch.Tensor] | None = None  # arguments of `forward`, in place of images that are not there
    talks_too: bool = False  # a generate pass on nothing, since another process has one at this place
    nothing: torch.Tensor | int = 0

    def forward(self, model: Fwd2BotForConditionalGeneration, num_items: Any, embed_only: bool = False) -> None:
        given = {k: v for k, v in self.inputs.items() if k.startswith("compress_") or not embed_only}
        has_images = "compress_input_ids" in self.inputs
        if has_images:
            given["num_summary_tokens"] = self.lengths
        else:  # words alone, in no placeholder
            given.pop("placeholder_image", None)
        nothing = _idle_pass(model, self.idle) if self.in_step and not has_images else 0
        if given:
            output = model(**given, num_items_in_batch=num_items)
            self.embeds, self.autoregressive = output.image_embeds_by_length, output.autoregressive_loss
        if self.in_step and self.embeds is not None:
            nothing = nothing + 0 * self.embeds.sum()
        if self.talks_too and not embed_only:
            nothing = nothing + _idle_pass(model, None)
        self.nothing = nothing

    def remember_rng(self) -> None:
        self.rng = torch.get_rng_state(), *get_device_states(*self.inputs.values())

    def replay_rng(self) -> None:
        torch.set_rng_state(self.rng[0])
        set_device_states(*self.rng[1:])


def _idle_pass(model: Fwd2BotForConditionalGeneration, compress: dict[str, torch.Tensor] | None) -> torch.Tensor:
    """A compress pass, or a generate pass over two tokens, for the collective operations in it: zero, with a graph."""
    if compress is None:
        return 0 * model(**_two_tokens(model)).logits.sum()
    return 0 * model(**compress, num_summary_tokens=1).image_embeds.sum()


def _two_tokens(model: Fwd2BotForConditionalGeneration, prefix: str = "") -> dict[str, torch.Tensor]:
    ids = torch.full((1, 2), model._pad_token_id, device=model.device)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": torch.ones_like(ids)}


class ChunkedStep:
    """The losses of a batch, and their gradients.

    Args:
        model: in training mode it gets a drawn length for each image, else the configured one for all.
            What trains of it is marked before; see `mark_trained`.
        gather: whether the contrastive loss is over the batches of all processes, or over that of each by itself.
        any_image: `process_images` of some image. A process of a sharded model compresses it where another has
            images and this one has none.

    Raises:
        ValueError: for a sharded model without gathering.
    """

    def __init__(
        self,
        model: Fwd2BotForConditionalGeneration,
        gather: bool = True,
        any_image: Mapping[str, torch.Tensor] | None = None,
    ):
        self.model, self.gather, self.sharded = model, gather, is_sharded(model)
        self.any_image = {f"compress_{name}": value for name, value in (any_image or {}).items()}
        if self.sharded and not gather:
            raise ValueError(
                "contrastive.gather is false, but processes that divide the backbone run the same passes, so that "
                "they share one contrastive batch. Leave contrastive.gather out"
            )
        if self.sharded and trains_summaries(model):
            # A generate pass has a backward pass through all layers, also one without a summary where queries are
            # frozen: else it would gather fewer weights than that of another process.
            model.enable_input_require_grads()

    def __call__(
        self,
        batch: Batch,
        num_items_in_batch: torch.Tensor | int,
        seed: str = "",
        share: float = 1.0,
        backward: Callable[[torch.Tensor], None] | None = None,
        contrastive_loss_weight: float | None = None,
    ) -> Losses:
        """Losses of a batch; with `backward`, gradients are added to the parameters' own.

        The mean of these over the processes is the gradient of the loss of the batch of all.

        Args:
            num_items_in_batch: labels in all batches of the optimiser step, on all processes.
            seed: what the lengths are drawn from, image by image over the batch of all processes.
            share: of this batch in its optimiser step, by which the contrastive loss counts.
            backward: takes a scalar and runs its backward pass.
            contrastive_loss_weight: instead of the config's.
        """
        weight = contrastive_loss_weight
        if weight is None:
            weight = self.model.config.contrastive_loss_weight
        owned = 0 if batch.text_image is None else int((batch.text_image >= 0).sum())
        grouped = batch.text_group is not None and batch.image_group is not None
        sizes = [sum(batch.images), sum(batch.texts), owned, int(grouped or not batch.texts)]
        counts = gather_counts(sizes, self.model.device)  # (W, 4)
        met = counts if self.gather else counts[[rank()]]  # of the processes whose images and texts meet
        lengths = self._draw_lengths(seed, counts[:, 0], batch.image_group) if self.model.training else None
        parts = self._parts(batch, lengths, with_texts=bool(met[:, 2].sum()))
        if self.sharded:
            parts = self._in_step(parts)
        once = backward is None or sum(part.is_text for part in parts) <= 1 >= sum(not p.is_text for p in parts)
        contrastive, scalars = None, None
        if met[:, 2].sum():
            for part in parts:
                part.remember_rng()
                with torch.set_grad_enabled(once and backward is not None):
                    part.forward(self.model, num_items_in_batch, embed_only=not once)
            contrastive, scalars = self._contrast(parts, batch, met, weight * share)
        config, learnt = self.model.config, torch.zeros((), device=self.model.device)
        for part in parts:
            if part.rng is None or not once:
                if part.rng is not None:
                    part.replay_rng()
                with torch.set_grad_enabled(backward is not None):
                    part.forward(self.model, num_items_in_batch)
            if part.autoregressive is not None:
                learnt += part.autoregressive.detach()
            if backward is not None:
                self._backward(part, backward)
        if scalars is not None and scalars.requires_grad and backward is not None:
            backward(scalars)
        learnt = learnt * world_size()
        total = config.autoregressive_loss_weight * learnt
        if contrastive is not None:
            total = total + weight * share * contrastive
        return Losses(learnt, contrastive, total, torch.zeros(0) if lengths is None else lengths)

    def _draw_lengths(self, seed: str, images: torch.Tensor, image_group: torch.Tensor | None) -> torch.Tensor:
        """`(N,)` of this process's images, as one process would draw them for the images of all.

        By their content where it is known, since a collator orders the samples of one process only; else by their
        places in the batch of all processes.
        """
        choices = self.model.config.summary_lengths
        if image_group is not None:
            drawn = [random.Random(f"{seed}/{group}").choice(choices) for group in image_group.tolist()]
        else:
            first = int(images[: rank()].sum())
            drawn = random.Random(seed).choices(choices, k=int(images.sum()))[first : first + int(images[rank()])]
        return torch.tensor(drawn, dtype=torch.long)

    def _parts(self, batch: Batch, lengths: torch.Tensor | None, with_texts: bool) -> list[_Part]:
        """Texts first: so the random numbers go on, after the step, where the last chunk of images leaves them."""
        parts = []
        for chunk in batch.text_chunks if with_texts else ():
            own = None
            if lengths is not None:  # whatever they are, the embeddings are at all of summary_lengths
                own = torch.full((len(chunk["input_ids"]),), self.model.config.summary_lengths[0])
            parts.append(_Part({f"compress_{name}": value for name, value in chunk.items()}, own, is_text=True))
        of_chunks = [None] * len(batch.chunks) if lengths is None else lengths.split(batch.images)
        for chunk, own in zip(batch.chunks, of_chunks, strict=True):
            if "input_ids" in chunk or with_texts:
                parts.append(_Part(chunk, own, is_text=False))
        return parts

    def _in_step(self, parts: list[_Part]) -> list[_Part]:
        """As many parts as any process has, of each kind, with a generate pass where any process has one."""
        device = self.model.device
        texts, images = ([part for part in parts if part.is_text == is_text] for is_text in (True, False))
        most = gather_counts([len(texts), len(images)], device).amax(0).tolist()
        for kind, count in zip((texts, images), most, strict=True):
            kind += [_Part({}, None, is_text=kind is texts) for _ in range(count - len(kind))]
        talks = ["input_ids" in part.inputs for part in images]
        somewhere = gather_counts([int(one) for one in talks], device).amax(0).tolist() if images else []
        for part, own, other in zip(images, talks, somewhere, strict=True):
            part.talks_too = bool(other) and not own
        for part in (*texts, *images):
            part.in_step = True
            part.idle = _two_tokens(self.model, "compress_") if part.is_text else self.any_image
        return [*texts, *images]

    def _contrast(
        self, parts: list[_Part], batch: Batch, met: torch.Tensor, weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The contrastive loss; its gradient goes to the parts, and to the scalar that is returned beside it."""
        images, texts = (self._meeting(parts, is_text, met[:, int(is_text)]) for is_text in (False, True))
        text_image, mask = self._meeting_texts(batch, met, images[0].device)
        inputs = [torch.cat(rows).transpose(0, 1) for rows in (images, texts)]  # (K, N, e), (K, M, e)
        learnt = [getattr(self.model, name, None) for name in ("logit_scale", "logit_bias")]
        learnt = [value for value in learnt if value is not None and value.requires_grad]
        weight = weight / len(inputs[0])
        losses, of_images, of_texts, of_learnt = [], [], [], [torch.zeros_like(value) for value in learnt]
        for pair in zip(*inputs, strict=True):  # length by length: memory for one matrix of N x M
            images, texts = (rows[None].detach().requires_grad_() for rows in pair)
            with torch.enable_grad():
                loss = self.model.contrastive_loss(images, texts, text_image, mask)
                to_images, to_texts, *to_learnt = torch.autograd.grad(weight * loss, [images, texts, *learnt])
            losses.append(loss.detach())
            of_images.append(to_images)
            of_texts.append(to_texts)
            of_learnt = [total + gradient for total, gradient in zip(of_learnt, to_learnt, strict=True)]
        place, scale = (rank(), world_size()) if self.gather else (0, 1)
        for is_text, kept in zip((False, True), (of_images, of_texts), strict=True):
            own = torch.cat(kept).split(met[:, int(is_text)].tolist(), 1)[place]  # (K, n, e)
            chosen = [part for part in parts if part.is_text == is_text and part.embeds is not None]
            for part, gradient in zip(chosen, own.split([p.embeds.shape[1] for p in chosen], 1), strict=True):
                part.gradient = gradient * scale
        scalars = sum(value * gradient for value, gradient in zip(learnt, of_learnt, strict=True))
        return torch.stack(losses).mean(), torch.as_tensor(scalars)

    def _meeting(self, parts: list[_Part], is_text: bool, counts: torch.Tensor) -> list[torch.Tensor]:
        """`(n_w, K, e)` embeddings of each process that meets, of images or of texts."""
        own = [part.embeds.detach() for part in parts if part.is_text == is_text and part.embeds is not None]
        if own:
            rows = torch.cat(own, 1).transpose(0, 1).contiguous()
        else:
            lengths = len(self.model.config.summary_lengths) if self.model.training else 1
            width = self.model.config.get_text_config().hidden_size
            rows = torch.zeros(0, lengths, width, device=self.model.device)
        return gather_rows(rows, counts) if self.gather else [rows]

    def _meeting_texts(
        self, batch: Batch, met: torch.Tensor, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`text_image` and `text_image_mask` over the images and texts of all processes that meet."""
        images, texts = met[:, 0], met[:, 1]
        place = rank() if self.gather else 0
        first = torch.cat([torch.zeros(1, dtype=torch.long), images.cumsum(0)[:-1]]).to(device)
        own_images, own_texts = int(images[place]), int(texts[place])

        def given(value: torch.Tensor | None, default: torch.Tensor) -> torch.Tensor:
            return (default if value is None else value).to(device)

        def meet(rows: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
            return gather_rows(rows.contiguous(), counts) if self.gather else [rows]

        owner = given(batch.text_image, torch.zeros(0, dtype=torch.long))
        owners = meet(torch.where(owner >= 0, owner + first[place], -1), texts)
        text_image = torch.cat(owners)
        mask = given(batch.text_image_mask, torch.ones(own_images, own_texts, dtype=torch.bool))
        if own_images == 0 or own_texts == 0:
            mask = mask.new_ones(own_images, own_texts)
        if self.gather and world_size() > 1:
            wide = mask.new_ones(own_images, int(texts.max()))
            wide[:, :own_texts] = mask
            blocks = [rows[:, :count] for rows, count in zip(meet(wide, images), texts.tolist(), strict=True)]
            mask = mask.new_ones(int(images.sum()), int(texts.sum()))
            row = column = 0
            for block in blocks:
                mask[row : row + block.shape[0], column : column + block.shape[1]] = block
                row, column = row + block.shape[0], column + block.shape[1]
        if met[:, 3].all():  # every process with texts has their hashes
            text_group = torch.cat(meet(given(batch.text_group, torch.zeros(0, dtype=torch.long)), texts))
            alone = -1 - first[place].cpu() - torch.arange(own_images)  # like no other
            image_group = torch.cat(meet(given(batch.image_group, alone), images))
            mask = mask & different_content(text_image, text_group, image_group)
        described = torch.zeros(len(mask), 1, dtype=torch.bool, device=device)
        described[text_image[text_image >= 0]] = True  # an image without a text is there for its conversation alone
        return text_image, mask & described

    def _backward(self, part: _Part, backward: Callable[[torch.Tensor], None]) -> None:
        loss = torch.zeros((), device=self.model.device) + part.nothing
        if part.gradient is not None:
            loss = loss + (part.embeds * part.gradient).sum()
        if part.autoregressive is not None:
            loss = loss + self.model.config.autoregressive_loss_weight * world_size() * part.autoregressive
        if loss.requires_grad:
            backward(loss)
        part.embeds = part.autoregressive = part.nothing = None  # and with them the graph
