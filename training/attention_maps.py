"""Where in a picture each summary token looked while the picture was compressed.

Needs torch and Pillow only, none of the packages of the extra `train`.
"""

import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from PIL import Image

from fwd2bot.backbone_fwd2bot import merged_token_id
from fwd2bot.configuration_fwd2bot import check_num_summary_tokens

FAMILIES = ("llava",)  # of backbones whose image tokens are the patches of one square picture, row by row


@dataclass(frozen=True)
class AttentionMaps:
    """Where the summary queries of one picture looked.

    Args:
        maps: `(k, rows, columns)` float32; of what a query gives to the picture, the share of each patch. Each map
            sums to 1.
        picture_share: `(k,)` float32 in 0..1, of all that a query gives, the share of the picture; the rest goes to
            the prompt and to the queries before it.
        box: (left, top, right, bottom), in pixels of the picture, of the part that the patches cover.
    """

    maps: torch.Tensor
    picture_share: torch.Tensor
    box: tuple[float, float, float, float]


@torch.no_grad()
def attention_maps(
    model: Any,
    processor: Any,
    picture: Image.Image,
    *,
    num_summary_tokens: int | None = None,
    layers: list[int] | None = None,
) -> AttentionMaps:
    """The attention of each summary query to the patches of a picture in the compress pass, a mean over heads.

    The pass runs once more with eager attention, which alone returns its weights, in a copy of the modules that shares
    the weights: the model itself stays as it is, and other threads may use it meanwhile.

    Args:
        model, processor: a Fwd2Bot on a LLaVA whose image tokens are a square grid, and its processor.
        picture: RGB, as `processor.load_image` returns it.
        num_summary_tokens: length k. Default: the largest that the model has.
        layers: the layers of the language model to take the mean over. Default: all.

    Raises:
        ValueError: for a backbone of which it is not known where its image tokens lie in the picture, a length out of
            range, or a layer that there is none of.
    """
    k = check_num_summary_tokens(num_summary_tokens, model.config)
    model._require_stage("compress")
    inputs = processor.process_images([picture])
    is_image = inputs["input_ids"][0] == merged_token_id(processor.backbone_processor)  # (L,)
    side = _grid_side(model.config.backbone_config, int(is_image.sum()))
    box = _covered_box(processor.image_processor, picture.size)
    number = model.config.get_text_config().num_hidden_layers
    chosen = list(range(number)) if layers is None else list(layers)
    if not chosen or any(not -number <= layer < number for layer in chosen):
        raise ValueError(f"layers={layers!r}: the language model has the layers 0 to {number - 1}. Choose among them.")

    output = _eager_twin(model)._read_with_queries(k, **inputs.to(model.device, model.dtype), output_attentions=True)
    weights = torch.stack([output.attentions[layer][0, :, -k:] for layer in chosen])  # (layers, heads, k, L + k)
    weights = weights.float().mean((0, 1)).cpu()  # (k, L + k)
    patches = weights[:, :-k][:, is_image]  # (k, side * side); one row of the batch has no padding
    picture_share = patches.sum(1)  # (k,)
    maps = (patches / picture_share.clamp(min=1e-12)[:, None]).reshape(k, side, side)
    return AttentionMaps(maps, picture_share, box)


def _grid_side(backbone_config: Any, count: int) -> int:
    """Patches in a row and in a column, where the `count` image tokens are those of a square."""
    family = backbone_config.model_type
    remedy = f"It is known of {', '.join(FAMILIES)} with a vision tower of square pictures."
    if family not in FAMILIES:
        raise ValueError(
            f"Where the image tokens of a backbone of the family {family!r} lie in the picture is not known. {remedy}"
        )
    vision = backbone_config.vision_config
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    side = size // patch if isinstance(size, int) and isinstance(patch, int) else None
    if vision.model_type == "pixtral" or side is None or side * side != count:
        raise ValueError(
            f"The {count} image tokens of this {family!r} with the vision tower {vision.model_type!r} are no square "
            f"of patches ({size} pixels, patches of {patch}), so where they lie in the picture is not known. {remedy}"
        )
    return side


def _covered_box(image_processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture of `size` (width, height) that the image processor shows to the vision tower."""
    width, height = size
    if getattr(image_processor, "do_pad", None):
        raise ValueError(
            f"{type(image_processor).__name__} pads the picture, so where its patches lie in it is not known."
        )
    if not getattr(image_processor, "do_center_crop", None):
        return 0.0, 0.0, float(width), float(height)
    shortest, crop = image_processor.size.get("shortest_edge"), image_processor.crop_size
    if shortest is None:  # squeezed to a fixed size, then cropped
        scale_x, scale_y = image_processor.size["width"] / width, image_processor.size["height"] / height
    else:
        scale_x = scale_y = shortest / min(width, height)
    half_x, half_y = crop["width"] / scale_x / 2, crop["height"] / scale_y / 2
    return width / 2 - half_x, height / 2 - half_y, width / 2 + half_x, height / 2 + half_y


def _eager_twin(model: Any) -> Any:
    """The modules once more around the same tensors, with eager attention in the language model."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    twin.get_decoder().set_attn_implementation("eager")
    return twin
