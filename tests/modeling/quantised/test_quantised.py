"""Backbones in 8 and 4 bit: the backbone alone is quantised, the laws hold on it, and all that trains stays float."""

import warnings

import pytest
import tiny
import torch
from peft.tuners.lora import LoraLayer
from quantised_backbones import (
    GREEDY,
    LORA_LAYERS,
    QUESTIONS,
    WARNINGS,
    assert_near_full_precision,
    quantised,
    quantization,
    wrap,
)
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CompileConfig,
)
from transformers.trainer_utils import validate_quantization_for_training

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import linear_layer_names

pytestmark = WARNINGS


def in_float(weight: torch.Tensor) -> torch.Tensor:
    """The values of a weight, quantised or not."""
    weight = weight.detach()
    return weight.dequantize() if type(weight).__module__.startswith(("torchao", "optimum")) else weight.clone()


# What is quantised


def test_lora_is_pefts_own_on_every_linear_layer(method, model):
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert {layer.root_class.__name__ for layer in layers} == {LORA_LAYERS[method]}
    assert len(layers) == 2 * 7  # q, k, v, o, gate, up, down of two layers


def test_layers_under_the_lora_are_quantised(model, full):
    layers = [layer.base_layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert all(type(layer.weight) is not nn.Parameter for layer in layers)
    for name in ("summary_projector", "backbone.lm_head"):
        assert type(model.get_submodule(name)) is nn.Linear
        assert type(model.get_submodule(name).weight) is nn.Parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_trains_has_the_dtype_of_the_words(method, folder, dtype):
    model = wrap(quantised(folder, method, dtype))
    assert {parameter.dtype for parameter in model.trained_parameters().values()} == {dtype}
    assert model.get_input_embeddings().weight.dtype == dtype


def test_targets_are_found_in_layers_that_are_no_torch_linear():
    class PackedLinear(nn.Module):  # as those of HQQ, GPTQ and AWQ
        def __init__(self):
            super().__init__()
            self.in_features = self.out_features = 4

    model = nn.ModuleDict({"up_proj": PackedLinear(), "down_proj": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    assert linear_layer_names(model) == ["down_proj", "up_proj"]


def test_wrapping_leaves_no_mark_on_the_language_model(method, folder):
    backbone = quantised(folder, method)
    before = set(vars(backbone.get_decoder()))
    wrap(backbone)
    assert set(vars(backbone.get_decoder())) == before


# Laws


def test_backbone_is_untouched(method, model, folder, processor):
    inputs = processor.process_images(tiny.pictures(2))
    with torch.no_grad():
        assert torch.equal(model.backbone(**inputs).logits, quantised(folder, method)(**inputs).logits)


def test_summary_is_near_that_of_the_full_precision(method, model, full, images):
    assert_near_full_precision(method, model.compress(**images).tokens, full[1].compress(**images).tokens)


def test_prefix_of_long_summary_equals_short_summary(method, model, images):
    longest = model.compress(**images).tokens
    near = tolerance(longest)
    if method == "bitsandbytes-8bit":  # activations are rounded: a sum in another order may cross a step
        near["atol"] = 0.02 * longest.abs().max().item()
    for k in (1, 2):
        torch.testing.assert_close(model.compress(**images, num_summary_tokens=k).tokens, longest[:, :k], **near)


def test_summary_does_not_depend_on_the_batch(model, processor, images):
    together = model.compress(**images).tokens
    for index, picture in enumerate(tiny.pictures(3)):
        alone = model.compress(**processor.process_images(picture)).tokens
        torch.testing.assert_close(alone, together[index : index + 1], **tolerance(together))


def tolerance(tokens):
    return {"rtol": 0, "atol": 1e-5 * tokens.abs().max().item()}


def test_one_path_to_embeddings_and_answers(model, processor, images, prompts):
    summary = model.compress(**images)
    assert torch.equal(model.embed(**images), model.embed(summary=summary))
    inputs = processor(images=tiny.pictures(3), text=tiny.prompts(processor, QUESTIONS))
    answers = model.generate(**inputs, **GREEDY)
    assert torch.equal(answers, model.generate_from_summary(summary, **prompts, **GREEDY))


def test_after_three_steps_all_that_trains_has_moved_and_nothing_else(method, folder, processor):
    model = wrap(quantised(folder, method)).train()
    trained = model.mark_trainable()
    before = {name: in_float(value) for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**tiny.training_batch(processor, ["a dog", "cats", "no"]), num_summary_tokens=4).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moved = {name for name, value in model.named_parameters() if not torch.equal(in_float(value), before[name])}
    assert moved == set(trained)
    assert losses[2] < losses[0]


def test_gradient_checkpointing_changes_no_gradient(method, folder, processor):
    gradients = []
    for checkpointing in (False, True):
        model = wrap(quantised(folder, method)).train()
        if checkpointing:
            tiny.enable_checkpointing(model, {"use_reentrant": False})
        model(**tiny.training_batch(processor, ["a", "b", "c"]), num_summary_tokens=4).loss.backward()
        gradients.append([value.grad for value in model.mark_trainable().values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


def test_bfloat16_computes_on_a_quantised_backbone(method, folder, images, prompts):
    model = wrap(quantised(folder, method, torch.bfloat16))
    summary = model.compress(**images)
    assert summary.tokens.dtype == torch.bfloat16
    assert model.generate_from_summary(summary, **prompts, **GREEDY).shape == (3, prompts["input_ids"].shape[1] + 5)


def test_gradients_are_the_same_after_an_answer_or_refused(method, folder, processor, images):
    """bitsandbytes repacks 4 bit weights on some CPUs when it first runs without gradients, and then has none."""
    gradients = []
    for compressed_before in (False, True):
        model = wrap(quantised(folder, method))
        if compressed_before:
            model.compress(**images)
        model.train()
        weight = model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight
        batch = tiny.training_batch(processor, ["a", "b", "c"])
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            with pytest.raises(ValueError, match="has run without gradients, and bitsandbytes has repacked"):
                model(**batch, num_summary_tokens=4)
            return
        model(**batch, num_summary_tokens=4).loss.backward()
        gradients.append([value.grad for value in model.mark_trainable().values()])
    for fresh, used in zip(*gradients, strict=True):
        torch.testing.assert_close(used, fresh, rtol=1e-4, atol=1e-6)


# Elsewhere


def test_trainer_takes_it(method, model, full):
    """transformers' Trainer refuses a model that says of itself, and not of a part, that it is quantised."""
    validate_quantization_for_training(model)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=quantization(method))
    validate_quantization_for_training(loaded)
    assert loaded.backbone.is_quantized and model.backbone.is_quantized


def test_generation_is_compiled_where_the_library_can(method, model, processor, images, prompts):
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    summary = model.compress(**images)
    expected = model.generate_from_summary(summary, **prompts, **GREEDY)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = model.generate_from_summary(
            summary, **prompts, **GREEDY, cache_implementation="static", compile_config=config
        )
    torch.compiler.reset()
    assert torch.equal(found, expected)
    compiled = bool(torch._dynamo.utils.counters["stats"])
    assert compiled == model.backbone.hf_quantizer.is_compileable


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["bitsandbytes-8bit", "bitsandbytes-4bit", "torchao"])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_quantised_backbone_on_a_gpu_compresses_answers_and_trains(method, folder, processor):
    backbone = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=quantization(method), dtype=torch.bfloat16, device_map={"": 0}
    )
    model = wrap(backbone)
    images = processor.process_images(tiny.pictures(3)).to("cuda")
    prompts = processor(text=tiny.prompts(processor, QUESTIONS)).to("cuda")
    summary = model.compress(**images)
    assert summary.tokens.device.type == "cuda"
    assert model.generate_from_summary(summary, **prompts, **GREEDY).shape == (3, prompts["input_ids"].shape[1] + 5)
    batch = {name: value.to("cuda") for name, value in tiny.training_batch(processor, ["a", "b", "c"]).items()}
    model.train()(**batch, num_summary_tokens=4).loss.backward()
    assert all(torch.isfinite(value.grad).all() for value in model.mark_trainable().values())
