"""Checkpoints and quantised backbones: one fingerprint, loaded quantised, adapters alone, never half of a weight."""

import copy
import json

import pytest
import tiny
import torch
from quantised_backbones import (
    GREEDY,
    WARNINGS,
    WIDE,
    assert_near_full_precision,
    quantised,
    quantization,
    wrap,
)
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    FPQuantConfig,
    QuantoConfig,
)

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.last_positions_fwd2bot import LastPositions

pytestmark = WARNINGS


def test_fingerprint_does_not_depend_on_the_quantisation(model, full):
    assert [*model.trained_parameters()] == [*full[1].trained_parameters()]
    with torch.no_grad():
        twin = copy.deepcopy(full[1])
        for mine, theirs in zip(twin.trained_parameters().values(), model.trained_parameters().values(), strict=True):
            mine.copy_(theirs)
    assert twin.fingerprint == model.fingerprint


def test_full_checkpoint_loads_quantised(method, full, images, prompts):
    folder, original = full
    model = Fwd2BotForConditionalGeneration.from_pretrained(folder, quantization_config=quantization(method))
    for name, parameter in model.trained_parameters().items():
        assert type(parameter) is nn.Parameter and torch.equal(parameter, original.get_parameter(name))
        assert parameter.requires_grad
    assert type(model.backbone.lm_head.weight) is nn.Parameter
    assert type(model.get_decoder().layers[0].self_attn.q_proj.base_layer.weight) is not nn.Parameter
    assert model.fingerprint == original.fingerprint
    expected = original.compress(**images)
    assert_near_full_precision(method, model.compress(**images).tokens, expected.tokens)
    model.generate_from_summary(expected, **prompts, **GREEDY)  # the summaries of one serve the other


def test_full_checkpoint_loaded_quantised_is_that_of_the_quantised_backbone(method, full, folder, images):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=quantization(method))
    wrapped = wrap(quantised(folder, method))
    with torch.no_grad():
        for name, parameter in wrapped.trained_parameters().items():
            parameter.copy_(loaded.get_parameter(name))
    torch.testing.assert_close(loaded.compress(**images).tokens, wrapped.compress(**images).tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["generate", "text"])
def test_part_of_a_full_checkpoint_loads_quantised(method, full, prompts, images, stage):
    config = quantization(method)
    whole = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=config)
    part = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=config, stage=stage)
    summary = full[1].compress(**images)
    answers = part.generate_from_summary(summary, **prompts, **GREEDY)
    assert torch.equal(answers, whole.generate_from_summary(summary, **prompts, **GREEDY))
    assert part.num_parameters() < whole.num_parameters()


def test_layers_without_an_adapter_load_quantised_too(method, folder, images, tmp_path):
    """transformers replaces what is `torch.nn.Linear` itself, in the last layer as well."""
    backbone = AutoModelForImageTextToText.from_pretrained(folder)
    lora = {"r": 4, "target_modules": ["up_proj"]}
    Fwd2BotForConditionalGeneration.from_backbone(
        backbone, adapters={"compress": lora, "generate": lora}, num_summary_tokens=4
    ).save_pretrained(tmp_path)
    model = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantization(method))
    last = model.get_decoder().layers[-1]
    parts = (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp)
    changed = [isinstance(part, LastPositions) for part in parts]
    assert changed == [method != "quanto"] * 2 + [True]  # whose layers cannot change class
    for layer in (last.self_attn.q_proj, last.self_attn.k_proj, last.self_attn.o_proj):
        assert type(layer.weight) is not nn.Parameter
    summary = model.compress(**images).tokens
    with torch.enable_grad():  # with gradients the layer is computed whole
        torch.testing.assert_close(summary, model._compress_pass(4, **images), rtol=0, atol=1e-4)


def test_user_may_leave_more_alone(full):
    pytest.importorskip("optimum.quanto")
    config = QuantoConfig(weights="int8", modules_to_not_convert=[r".*vision_tower"])
    model = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=config)
    tower = model.backbone.base_model.vision_tower
    assert all(type(value) is nn.Parameter for value in tower.parameters())
    assert type(model.get_decoder().layers[0].mlp.up_proj.base_layer.weight) is not nn.Parameter
    assert config.modules_to_not_convert == [r".*vision_tower"]


def test_quantization_may_be_given_as_a_dictionary(full):
    pytest.importorskip("optimum.quanto")
    config = {"quant_method": "quanto", "weights": "int8"}
    model = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=config)
    assert type(model.get_decoder().layers[0].mlp.up_proj.base_layer.weight) is not nn.Parameter
    assert type(model.summary_projector.weight) is nn.Parameter


def test_configuration_that_cannot_leave_modules_alone_is_refused(full):
    class Everything(FPQuantConfig):
        def __init__(self):
            self.quant_method = "everything"

    with pytest.raises(ValueError, match="A Everything cannot leave modules alone .* Load the backbone alone"):
        Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=Everything())


def test_saving_in_full_is_refused_by_name(model, full, tmp_path):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(full[0], quantization_config=copy_of(model))
    for one in (model, loaded):
        with pytest.raises(ValueError, match="The backbone is quantised.* adapter_only=True"):
            one.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def copy_of(model):
    return copy.deepcopy(model.backbone.config.quantization_config)


def test_config_does_not_say_how_the_backbone_was_quantised(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert "quantization_config" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


# Other kinds of checkpoint


def test_adapters_are_saved_from_and_loaded_upon_a_quantised_backbone(folder, full, processor, tmp_path, method):
    _, model = full
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        full[0], quantization_config=quantization(method), dtype=torch.float32
    )
    loaded.save_pretrained(tmp_path, adapter_only=True)
    plain = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, backbone=folder)
    images = processor.process_images(tiny.pictures(2))
    assert torch.equal(plain.compress(**images).tokens, model.compress(**images).tokens)
    again = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, backbone=quantised(folder, method))
    torch.testing.assert_close(again.compress(**images).tokens, loaded.compress(**images).tokens, rtol=0, atol=1e-5)
    assert plain.fingerprint == again.fingerprint == model.fingerprint


def test_quantisation_is_an_option_of_loading_adapters(folder, full, processor, tmp_path, method):
    full[1].save_pretrained(tmp_path, adapter_only=True)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        tmp_path, backbone=folder, quantization_config=quantization(method), dtype=torch.float32
    )
    images = processor.process_images(tiny.pictures(2))
    expected = (
        Fwd2BotForConditionalGeneration.from_pretrained(
            full[0], quantization_config=quantization(method), dtype=torch.float32
        )
        .compress(**images)
        .tokens
    )
    torch.testing.assert_close(loaded.compress(**images).tokens, expected, rtol=0, atol=1e-5)


def test_backbone_that_is_another_is_refused_although_it_is_quantised(full, tmp_path, method):
    full[1].save_pretrained(tmp_path / "adapters", adapter_only=True)
    tiny.tiny_backbone(seed=1, **WIDE).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="not trained on this backbone"):
        Fwd2BotForConditionalGeneration.from_pretrained(
            tmp_path / "adapters", backbone=quantised(tmp_path / "other", method)
        )


def test_merging_into_quantised_weights_is_refused(folder, processor, tmp_path, method):
    model = wrap(quantised(folder, method))
    with pytest.raises(ValueError, match="quantised, and no adapter can be merged.*Load the model unquantised"):
        model.merge_and_export("generate", tmp_path / "g", processor)
    assert not (tmp_path / "g").exists()
