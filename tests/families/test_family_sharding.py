"""What processes of FSDP2 divide of every family: the layers of its language model and of its vision tower."""

import re

import pytest

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.sharding import divided_parameters, vision_layers

from .tiny_families import FAMILIES, build

LAYER = re.compile(r"\.(layers?|blocks)\.\d+\.")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_frozen_weight_of_a_layer_is_left_whole(name):
    model = Fwd2BotForConditionalGeneration.from_backbone(build(name)[0], num_summary_tokens=2, lora_rank=2)
    divided = {id(value) for parameters in divided_parameters(model).values() for value in parameters}
    whole = [key for key, value in model.named_parameters() if not value.requires_grad and id(value) not in divided]
    assert not [key for key in whole if LAYER.search(key)]
    assert vision_layers(model)
    assert len(divided) == sum(map(len, divided_parameters(model).values()))  # each in one module
    assert not divided & {id(value) for value in model.trained_parameters().values()}
