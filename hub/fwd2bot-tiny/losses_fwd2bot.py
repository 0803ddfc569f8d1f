"""The losses of Fwd2Bot, as pure functions: autoregressive, and contrastive as InfoNCE or with sigmoids."""

import torch
import torch.nn.functional as F

INITIAL_LOGIT_BIAS = -10.0  # SigLIP's: at the start almost every pair is a negative, and is taken for one


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
    _check_owners(image_embeds, text_embeds, text_image, text_image_mask)
    owned = (text_image >= 0).nonzero().squeeze(1)  # (P,) texts that describe an image
    owner = text_image[owned]  # (P,)
    logits = _logits(image_embeds, text_embeds, logit_scale)  # (N, M)
    _, negative = _pairs(len(image_embeds), text_image, text_image_mask)

    positive = logits[owner, owned]  # (P,)
    against_images = logits[:, owned].masked_fill(~negative[:, owned], -torch.inf)  # (N, P)
    against_texts = logits[owner].masked_fill(~negative[owner], -torch.inf)  # (P, M)
    text_to_image = torch.logsumexp(torch.cat([positive[None], against_images]), 0) - positive  # (P,)
    image_to_text = torch.logsumexp(torch.cat([positive[:, None], against_texts], 1), 1) - positive  # (P,)
    return (text_to_image.mean() + image_to_text.mean()) / 2


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    text_image: torch.Tensor,
    text_image_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each pair of image and text by itself: does the text describe the image? Summed, per pair that belongs together.

    With one text per image that is the mean over images, as in the paper. A hard negative is a text that describes
    none of the images.

    Args:
        image_embeds, text_embeds, logit_scale, text_image, text_image_mask: as for `contrastive_loss`.
        logit_bias: scalar, added to every logit; starts at `INITIAL_LOGIT_BIAS`.

    Returns:
        The scalar loss.

    Raises:
        ValueError: as `contrastive_loss`.

    Source: SigLIP, arXiv 2303.15343.
    """
    _check_owners(image_embeds, text_embeds, text_image, text_image_mask)
    logits = _logits(image_embeds, text_embeds, logit_scale) + logit_bias.float()  # (N, M)
    own, negative = _pairs(len(image_embeds), text_image, text_image_mask)
    signed = torch.where(own, logits, -logits)
    return -F.logsigmoid(signed)[own | negative].sum() / own.sum()


def different_content(text_image: torch.Tensor, text_group: torch.Tensor, image_group: torch.Tensor) -> torch.Tensor:
    """`(N, M)` bool: false where text m says the same as a text of image n or of an image that equals n.

    So it is false, too, where text m itself describes n or an image that equals n.

    What `text_image_mask` must exclude where equal captions or pictures meet in one batch, on whatever process.

    Args:
        text_image: `(M,)` row of the image of each text, -1 for a hard negative.
        text_group: `(M,)`, image_group: `(N,)`, equal where the content is: 64 bit hashes, say.
    """
    owned = (text_image >= 0).nonzero().squeeze(1)  # (P,)
    contents, content = torch.unique(text_group, return_inverse=True)  # (U,), (M,)
    pictures, picture = torch.unique(image_group, return_inverse=True)  # (V,), (N,)
    says = torch.zeros(len(pictures), len(contents), dtype=torch.bool, device=text_image.device)  # (V, U)
    says[picture[text_image[owned]], content[owned]] = True
    return ~says[picture][:, content]


def _check_owners(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, text_image: torch.Tensor, mask: torch.Tensor | None
) -> None:
    num_images, num_texts = len(image_embeds), len(text_embeds)
    rows = text_image.aminmax() if text_image.numel() else (-1, -1)
    if text_image.shape != (num_texts,) or not -1 <= int(rows[0]) <= int(rows[1]) < num_images:
        raise ValueError(
            f"text_image must give each of the {num_texts} texts a row in 0..{num_images - 1} or -1, got "
            f"{text_image.tolist()}."
        )
    if mask is not None and mask.shape != (num_images, num_texts):
        raise ValueError(f"text_image_mask must have shape {(num_images, num_texts)}, got {tuple(mask.shape)}.")
    if not (text_image >= 0).any():
        raise ValueError("text_image names no image: at least one text of the batch must describe one.")


def _logits(image_embeds: torch.Tensor, text_embeds: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    with torch.autocast(image_embeds.device.type, enabled=False):  # bfloat16 is too coarse at a scale of 100
        return logit_scale.float() * image_embeds.float() @ text_embeds.float().T  # (N, M)


def _pairs(num_images: int, text_image: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`(N, M)` bool each: the text describes the image; the text is a negative of the image."""
    own = torch.arange(num_images, device=text_image.device)[:, None] == text_image  # (N, M)
    return own, ~own if mask is None else ~own & mask
