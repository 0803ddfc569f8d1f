"""What `from_backbone` takes and what it refuses, with a remedy."""

from pathlib import Path

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig
from transformers import AutoModelForCausalLM

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.packing_fwd2bot import check_packable


def wrap(backbone=None, **options):
    backbone = tiny.tiny_backbone() if backbone is None else backbone
    return Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2, **options)


def adapted_layers(model, stage):
    names = [name for name, _ in model.named_parameters() if f".lora_A.{stage}." in name]
    return {name.split(".lora_A.")[0].rsplit(".", 1)[1] for name in names}


def test_lora_config_of_one_stage_leaves_the_default_to_the_other(tmp_path):
    lora = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "v_proj"])
    model = wrap(adapters={"compress": lora}, lora_rank=2)
    assert adapted_layers(model, "compress") == {"q_proj", "v_proj"}
    assert {"down_proj", "k_proj"} < adapted_layers(model, "generate")
    assert model.config.adapters["compress"]["r"] == 3 and model.config.adapters["generate"]["r"] == 2
    model.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.adapters == model.config.adapters


def test_lora_config_without_targets_gets_every_linear_layer_of_the_language_model():
    model = wrap(adapters={"generate": LoraConfig(r=2)})
    assert adapted_layers(model, "generate") == adapted_layers(model, "compress")


@pytest.mark.parametrize(
    "adapters, message",
    [
        ({"both": {}}, r"stage\(s\) \['both'\].*compress.*generate"),
        ({"compress": LoraConfig(bias="all")}, "bias='all', which changes weights or layers of the backbone"),
        (
            {"generate": {"modules_to_save": ["lm_head"]}},
            "modules_to_save=.*which changes weights or layers",
        ),
        ({"compress": LoraConfig(init_lora_weights="pissa")}, "init_lora_weights='pissa'.*or 'gaussian'"),
        ({"compress": {"layer_replication": [(0, 2)]}}, "layer_replication=.*Leave it out"),
        ({"compress": {"lora_bias": True}}, "lora_bias=True"),
        ({"compress": {"target_modules": ["embed_tokens"]}}, "word embedding among its target_modules"),
        ({"compress": {"target_modules": ["lm_head"]}}, "relative.*layers.0.self_attn.q_proj"),
        ({"compress": {"layers_to_transform": [1]}}, "layers_to_transform=.*regular expression"),
        ({"generate": {"rank": 4}}, r"unknown key\(s\) \['rank'\]"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(adapters, message):
    with pytest.raises(ValueError, match=message):
        wrap(adapters=adapters)


def test_text_model_is_refused():
    text = AutoModelForCausalLM.from_config(tiny.tiny_backbone().config.text_config)
    with pytest.raises(TypeError, match="LlamaForCausalLM is no vision-language model"):
        wrap(text)


def test_image_token_beyond_the_embedding_is_refused():
    """The id would be that of a summary query."""
    backbone = tiny.tiny_backbone()
    words = backbone.get_input_embeddings().num_embeddings
    backbone.config.image_token_id = words
    with pytest.raises(ValueError, match=rf"image_token_id={words}, which is no row .*\(0 to {words - 1}\)"):
        wrap(backbone)


def test_processor_of_the_backbone_is_accepted(tiny_processor):
    assert wrap(processor=tiny_processor.backbone_processor).config.num_summary_tokens == 2


def test_processor_of_another_model_is_refused(tiny_processor):
    backbone = tiny.tiny_backbone()
    backbone.config.image_token_id -= 1
    with pytest.raises(ValueError, match="another model's: its image token has the id"):
        wrap(backbone, processor=tiny_processor.backbone_processor)
    small = tiny.tiny_backbone()
    small.resize_token_embeddings(len(tiny_processor.tokenizer) - 1)
    small.config.image_token_id = 5
    with pytest.raises(ValueError, match="another model's: its tokenizer has"):
        wrap(small, processor=tiny_processor.backbone_processor)


class TextConfig:
    def __init__(self, layer_types=None, sliding_window=None, attention="sdpa"):
        self.layer_types, self.sliding_window, self._attn_implementation = layer_types, sliding_window, attention


@pytest.mark.parametrize(
    "config, message",
    [
        (TextConfig(["full_attention", "sliding_attention"], 8), "sliding window of 8 tokens"),
        (TextConfig(["full_attention", "linear_attention"]), "linear_attention"),
        (TextConfig(attention="flash_attention_2"), "'flash_attention_2' does not take. Load the model with 'sdpa'"),
    ],
)
def test_packed_rows_that_would_see_each_other_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_packable(config, 9)


@pytest.mark.parametrize(
    "config", [TextConfig(), TextConfig(["full_attention"], 8), TextConfig(["sliding_attention"], 9)]
)
def test_packed_rows_that_stay_apart_are_accepted(config):
    assert check_packable(config, 9) is None


def test_weights_of_the_backbone_keep_their_dtype_and_new_ones_take_it():
    model = wrap(tiny.tiny_backbone().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("adapters", [LoraConfig(), {"compress": IA3Config()}])
def test_adapters_of_another_type_are_refused(adapters):
    with pytest.raises(TypeError, match="adapters.* must (map|be)"):
        Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), adapters=adapters)


@pytest.mark.parametrize("option", ["dtype", "attn_implementation", "device_map", "trust_remote_code"])
def test_options_of_loading_belong_to_the_backbone(option):
    with pytest.raises(ValueError, match=rf"no \['{option}'\].*load it with them, then hand it over"):
        Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), **{option: "cpu"})


def test_model_without_head_is_refused():
    with pytest.raises(TypeError, match="LlavaModel has no output head.*AutoModelForImageTextToText"):
        Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone().model)


def test_code_of_a_stranger_is_refused():
    backbone = tiny.tiny_backbone()
    backbone.config.__class__ = type("OwnConfig", (type(backbone.config),), {"model_type": "own"})
    with pytest.raises(TypeError, match="no model of type 'own'.*code of its own"):
        Fwd2BotForConditionalGeneration.from_backbone(backbone)


@pytest.mark.parametrize("processor", ["path/of/one", tiny.tiny_tokenizer()])
def test_processor_of_another_sort_is_refused(processor):
    with pytest.raises(TypeError, match="processor must have an image processor and a tokenizer"):
        Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), processor=processor)


MISSPELT = ("./nowhere", "/nowhere", "runs/nowhere/final", "nowhere", "no where/final")


@pytest.mark.parametrize("name", MISSPELT)
def test_folder_that_is_not_there_is_named(name):
    for load in (
        Fwd2BotForConditionalGeneration.from_backbone,
        Fwd2BotForConditionalGeneration.from_pretrained,
        Fwd2BotProcessor.from_pretrained,
    ):
        with pytest.raises(FileNotFoundError, match=f"There is no folder '{name}'.*form owner/name. Give the folder"):
            load(name)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("~/nowhere", rf"give '{Path.home()}/nowhere'\."),
        ("owner/name@v1", r"Give 'owner/name', and 'v1' as the revision\."),
        ("https://huggingface.co/owner/name", r"Give owner/name instead of an address\."),
        *((name, r"Give the folder of a .*, or the id of one\.") for name in ("./a@b", "tiny@main", "@x", "a/b@")),
        ("~no-such-user/x", r"Give the folder of a .*, or the id of one\."),
        ("/data/run@2/final", r"Give the folder of a .*, or the id of one\."),
    ],
)
def test_name_of_another_form_is_told_how_it_is_written(name, remedy):
    with pytest.raises(FileNotFoundError, match=remedy):
        Fwd2BotForConditionalGeneration.from_pretrained(name)


def test_what_may_be_an_id_of_the_hub_is_looked_for_there():
    with pytest.raises(OSError, match="offline|couldn't connect|Cannot find"):  # which the tests are
        Fwd2BotForConditionalGeneration.from_pretrained("owner/name-7b.v1_5")
