"""`Fwd2BotConfig`: validated once, and the same after any round trip."""

import copy
import json

import pytest
import tiny
from transformers import AutoConfig, LlavaConfig, PreTrainedConfig

from fwd2bot import Fwd2BotConfig


@pytest.fixture(scope="module")
def config():
    return tiny.tiny_fwd2bot(num_summary_tokens=6, image_prompt="Sum it up.", min_temperature=0.02).config


@pytest.mark.parametrize(
    "number, lengths", [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_default_lengths_are_powers_of_two_and_the_largest(number, lengths):
    assert Fwd2BotConfig(num_summary_tokens=number).summary_lengths == lengths


def test_dict_round_trip(config):
    again = Fwd2BotConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert isinstance(again.backbone_config, LlavaConfig)
    assert again.backbone_config.text_config.hidden_size == 32


def test_json_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, Fwd2BotConfig)
    again.name_or_path = config.name_or_path
    assert json.loads(again.to_json_string(use_diff=False)) == json.loads(config.to_json_string(use_diff=False))


def test_text_config_is_that_of_the_backbones_language_model(config):
    assert config.get_text_config().model_type == "llama"
    assert config.get_text_config(decoder=True).num_hidden_layers == 2


def test_unknown_key_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"Unknown.*\['num_sumary_tokens'\].*Allowed:.*num_summary_tokens"):
        Fwd2BotConfig(num_sumary_tokens=3)


def test_unknown_key_in_a_file_is_an_error(config, tmp_path):
    values = {**config.to_dict(), "temprature": 1}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="temprature"):
        Fwd2BotConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"num_summary_tokens": 0}, "num_summary_tokens must be an integer of at least 1, got 0"),
        ({"num_summary_tokens": "4"}, "num_summary_tokens must be an integer of at least 1, got '4'"),
        ({"num_summary_tokens": True}, "got True"),
        ({"num_summary_tokens": 2.0}, "got 2.0"),
        ({"summary_lengths": []}, r"summary_lengths must be a non-empty list of integers in 1\.\.16.*got \[\]"),
        ({"summary_lengths": [32]}, r"got \[32\]"),
        ({"summary_lengths": ["1"]}, r"got \['1'\]"),
        ({"summary_lengths": 4}, "got 4"),
        (
            {"autoregressive_loss_weight": -1},
            "autoregressive_loss_weight must be a finite number of at least 0, got -1",
        ),
        ({"contrastive_loss_weight": float("nan")}, "contrastive_loss_weight.*got nan"),
        ({"contrastive_loss_weight": "1"}, "contrastive_loss_weight.*got '1'"),
        ({"initial_temperature": "warm"}, "initial_temperature.*got 'warm'"),
        ({"min_temperature": 0}, "0 < min_temperature <= initial_temperature, got min_temperature=0,"),
        ({"min_temperature": 0.5}, "initial_temperature=0.07"),
        ({"merged_stage": "generate"}, "merged_stage must be None or 'compress', got 'generate'"),
        ({"image_prompt": " "}, "image_prompt must be a non-empty text, got ' '"),
        ({"text_prompt": None}, "text_prompt must be a non-empty text, got None"),
        ({"adapters": {"compress": {}}}, r"stages \['compress', 'generate'\], got {'compress': {}}"),
        ({"adapters": [1]}, r"adapters must be a dict .*got \[1\]"),
        ({"adapters": {"compress": {"rank": 3}, "generate": {}}}, r"adapters\['compress'\].*\['rank'\].*'r'"),
        ({"backbone_config": {"hidden_size": 3}}, "backbone_config has no 'model_type'"),
        ({"backbone_config": {"model_type": "lava"}}, "lava"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=message):
        Fwd2BotConfig(**values)


def test_backbone_config_of_another_type_is_refused():
    with pytest.raises(TypeError, match="backbone_config must be a PreTrainedConfig or its dict, got 3"):
        Fwd2BotConfig(backbone_config=3)


def test_settings_of_generation_in_the_config_are_found(shared_fwd2bot):
    """`generate()` and `save_pretrained` refuse them."""
    config = copy.deepcopy(shared_fwd2bot.config)
    assert config._get_generation_parameters() == PreTrainedConfig._get_generation_parameters(config) == {}
    config.temperature = 0.5
    assert config._get_generation_parameters() == {"temperature": 0.5}
