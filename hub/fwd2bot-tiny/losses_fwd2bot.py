"""The two losses of Fwd2Bot, as pure functions."""

import torch
import torch.nn.functional as F


def autoregressive_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Next-token cross-entropy of the answers, which reaches the compress pass through the summary.

    Args:
        logits: `(N, L, V)`.
        labels: `(N, L)`, -100 where nothing is to be learnt.
        num_items_in_batch: number of labels to divide by (gradient accumulation); default: those of this batch.

    Source: Fwd2Bot, arXiv 2503.21757, the loss after the second forward pass.
    """
    targets = labels[:, 1:].flatten()  # (N * (L-1),)
    learnt = targets != -100
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1)[learnt].float(), targets[learnt], reduction="sum")
    count = learnt.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / count


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    text_image: torch.Tensor,
    text_image_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE between images and any number of texts of each, with hard negatives.

    For every text m of an image n: text m against all images, and image n against text m and all texts that are not
    its own. Hard negatives enter the second only: they are texts of no image.

    Args:
        image_embeds: `(N, e)`, unit norm. text_embeds: `(M, e)`, unit norm.
        logit_scale: scalar, 1 / temperature.
        text_image: `(M,)` row of the image that each text describes, -1 for a hard negative.
        text_image_mask: `(N, M)` bool, false where text m is no valid negative of image n (it is true of it, too).

    Returns:
        The scalar mean of both directions.

    Raises:
        ValueError: when `text_image` or `text_image_mask` does not fit the embeddings, or no text describes an image.

    Source: CLIP (arXiv 2103.00020); after the compress pass in Fwd2Bot, arXiv 2503.21757; hard negative texts as in
    NegCLIP (arXiv 2210.01936).
    """
    num_images, num_texts = len(image_embeds), len(text_embeds)
    if text_image.shape != (num_texts,) or int(text_image.max()) >= num_images:
        raise ValueError(
            f"text_image must give each of the {num_texts} texts a row in 0..{num_images - 1} or -1, got "
            f"{text_image.tolist()}."
        )
    if text_image_mask is not None and text_image_mask.shape != (num_images, num_texts):
        raise ValueError(
            f"text_image_mask must have shape {(num_images, num_texts)}, got {tuple(text_image_mask.shape)}."
        )
    owned = (text_image >= 0).nonzero().squeeze(1)  # (P,) texts that describe an image
    if len(owned) == 0:
        raise ValueError("text_image names no image: at least one text of the batch must describe one.")
    owner = text_image[owned]  # (P,)
    with torch.autocast(image_embeds.device.type, enabled=False):  # bfloat16 is too coarse at a scale of 100
        logits = logit_scale.float() * image_embeds.float() @ text_embeds.float().T  # (N, M)

    rows = torch.arange(len(image_embeds), device=logits.device)
    own = rows[:, None] == text_image  # (N, M)
    negative = ~own if text_image_mask is None else ~own & text_image_mask

    positive = logits[owner, owned]  # (P,)
    against_images = logits[:, owned].masked_fill(~negative[:, owned], -torch.inf)  # (N, P)
    against_texts = logits[owner].masked_fill(~negative[owner], -torch.inf)  # (P, M)
    text_to_image = torch.logsumexp(torch.cat([positive[None], against_images]), 0) - positive  # (P,)
    image_to_text = torch.logsumexp(torch.cat([positive[:, None], against_texts], 1), 1) - positive  # (P,)
    return (text_to_image.mean() + image_to_text.mean()) / 2
