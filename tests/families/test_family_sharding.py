"""What processes divide of every family: the layers of its language model and of its vision tower."""

import re
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.training import zero3
from fwd2bot.training.sharding import (
    FSDP2,
    ZERO3,
    Sharding,
    divide_by_fsdp2,
    divided_parameters,
    is_sharded,
    vision_layers,
)

from .tiny_families import FAMILIES, build, conversation, pictures

# Not ours to mend: transformers' GLM-4V processor hands a tensor to numpy 2; torch renames what DeepSpeed calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor:FutureWarning"),
]
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


@pytest.fixture
def alone(monkeypatch):
    """The only process of a group, which divides weights into one part and gathers them from it all the same."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("torch.nn.functional.linear", torch.nn.functional.linear)  # DeepSpeed replaces it
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: Fwd2BotForConditionalGeneration, processor: Fwd2BotProcessor) -> dict[str, torch.Tensor]:
    chats = [conversation("What is in the picture?"), conversation("Where?")]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(images=pictures()[:2], text=prompts)
    texts = {f"text_{name}": value for name, value in processor.process_texts(["the picture", "What?"]).items()}
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"], **texts, num_summary_tokens=2).loss.backward()
    return {name: value.grad.clone() for name, value in model.trained_parameters().items()}


# One environment for each is enough.
ELSEWHERE = {
    method: pytest.mark.skipif(find_spec(package) is None, reason=f"runs where {package} is, in make {target}")
    for method, package, target in (
        (FSDP2, "torchvision", "test-families"),
        (ZERO3, "deepspeed", "test-deepspeed"),
    )
}


@pytest.mark.parametrize("method", [pytest.param(method, marks=mark) for method, mark in ELSEWHERE.items()])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_divided_model_has_the_gradients_of_the_whole_one(name, method, alone):
    backbone, processor = build(name)
    torch.manual_seed(0)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2, lora_rank=2).train()
    processor = Fwd2BotProcessor(processor)
    model.mark_trainable()
    expected, divided = gradients(model, processor), divided_parameters(model, Sharding(method))
    if method == FSDP2:
        divide_by_fsdp2(model, divided, torch.device("cpu"), True)
    else:
        zero3.divide(model, list(divided), torch.device("cpu"))
    assert is_sharded(model)
    for name, value in gradients(model, processor).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
