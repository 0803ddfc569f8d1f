"""Every family in bfloat16, quantised on the CPU and with parts on the disk: what tests/modeling does for one."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, TorchAoConfig

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from .tiny_families import FAMILIES, build, conversation, pictures

pytestmark = [
    # Not ours to mend: transformers' GLM-4V processor hands a tensor to numpy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # accelerate warns of a parameter of the model itself, for which it has no hook and needs none.
    pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning"),
]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def saved(request, tmp_path_factory):
    """Where a backbone lies, and its processor."""
    backbone, processor = build(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    backbone.save_pretrained(folder)
    return folder, Fwd2BotProcessor(processor)


def wrap(backbone):
    torch.manual_seed(0)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4, lora_rank=2).eval()
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        model.summary_projector.weight.mul_(5)
    return model


def assert_laws(model, processor, prompts):
    """Prefix, batch invariance and one path, to 1e-5 or, if that is more, 8 roundings of a summary's largest value."""
    images = processor.process_images(pictures())
    summary = model.compress(**images)
    rounding = torch.finfo(summary.tokens.dtype).eps * summary.tokens.abs().max().item()
    close = {"rtol": 0, "atol": max(1e-5, 8 * rounding)}
    torch.testing.assert_close(model.compress(**images, num_summary_tokens=2).tokens, summary.tokens[:, :2], **close)
    for index, picture in enumerate(pictures()):
        alone = model.compress(**processor.process_images(picture)).tokens
        torch.testing.assert_close(alone, summary.tokens[index : index + 1], **close)
    inputs = processor(images=pictures()[:2], text=prompts)
    from_summary = model.generate_from_summary(summary[:2], **processor(text=prompts), **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), from_summary)


@pytest.fixture
def prompts(saved):
    return [
        saved[1].apply_chat_template(conversation(text), add_generation_prompt=True) for text in ("What?", "Where?")
    ]


def test_laws_hold_in_bfloat16(saved, prompts):
    model = wrap(AutoModelForImageTextToText.from_pretrained(saved[0], dtype=torch.bfloat16))
    assert model.compress(**saved[1].process_images(pictures()[:1])).tokens.dtype == torch.bfloat16
    assert_laws(model, saved[1], prompts)


def test_laws_hold_on_int8_weights(saved, prompts):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    quantized = AutoModelForImageTextToText.from_pretrained(
        saved[0], quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert_laws(wrap(quantized), saved[1], prompts)


def test_parts_on_the_disk_change_no_output(saved, prompts, tmp_path):
    model = wrap(AutoModelForImageTextToText.from_pretrained(saved[0], dtype=torch.float32))
    model.save_pretrained(tmp_path / "full")
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    offloaded = Fwd2BotForConditionalGeneration.from_pretrained(
        tmp_path / "full",
        device_map="auto",
        max_memory={"cpu": int(0.7 * size)},
        offload_folder=tmp_path / "offload",
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    images = saved[1].process_images(pictures())
    summary = model.compress(**images)
    assert torch.equal(offloaded.compress(**images).tokens, summary.tokens)
    inputs = saved[1](text=prompts)
    answers = model.generate_from_summary(summary[:2], **inputs, **GREEDY)
    assert torch.equal(offloaded.generate_from_summary(summary[:2], **inputs, **GREEDY), answers)
