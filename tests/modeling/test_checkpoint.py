"""Saving and loading in one process: strict, in every stage and dtype, with all that belongs into the folder."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.folder_fwd2bot import MODEL_FILES, PIPELINE_FILES

GREEDY = {"max_new_tokens": 6, "do_sample": False}
WEIGHTS = "model.safetensors"


@pytest.fixture
def damaged(saved, tmp_path):
    """`damaged(change)` gives the saved folder after `change(weights)`."""

    def make(change):
        for source in saved[0].iterdir():
            if source.name != WEIGHTS:
                (tmp_path / source.name).write_bytes(source.read_bytes())
        weights = load_file(saved[0] / WEIGHTS)
        change(weights)
        save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
        return tmp_path

    return make


def outputs(model, processor) -> list[torch.Tensor]:
    """Summary, embeddings of images and texts, answer, uncompressed answer."""
    images = processor.process_images(tiny.pictures(2))
    prompts = tiny.prompts(processor, ["What is it?", "Why?"])
    uncompressed = processor.backbone_processor(
        images=tiny.pictures(2), text=prompts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    return [
        model.compress(**images).tokens,
        model.embed(**images),
        model.embed(**processor.process_texts(["a dog", "two cats"])),
        model.generate(**processor(images=tiny.pictures(2), text=prompts), **GREEDY),
        model.generate_uncompressed(**uncompressed.to(model.dtype), **GREEDY),
    ]


def assert_same_outputs(model, expected, processor):
    for found, wanted in zip(outputs(model, processor), outputs(expected, processor), strict=True):
        assert torch.equal(found, wanted)


def test_loaded_model_gives_the_same(saved, processor):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder)
    assert_same_outputs(loaded, model, processor)
    assert loaded.config.fingerprint == model.config.fingerprint
    assert not loaded.training


def test_loaded_model_trains_what_the_saved_one_did(saved):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder)
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1]
    assert len(trainable[0]) == 2 * 2 * 2 * 7 + 4


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_auto_classes_load_it(saved, processor, auto_class):
    folder, model = saved
    assert isinstance(AutoConfig.from_pretrained(folder), type(model.config))
    loaded = auto_class.from_pretrained(folder)
    assert isinstance(loaded, Fwd2BotForConditionalGeneration)
    assert_same_outputs(loaded, model, AutoProcessor.from_pretrained(folder))


def test_saving_what_was_loaded_writes_the_same_weights_and_fingerprint(saved, tmp_path):
    folder, _ = saved
    Fwd2BotForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path)
    first, second = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    def without_dtype(values):  # which transformers notes down in the parts, too, once a model was loaded
        return {name: value for name, value in values.items() if name != "dtype"}

    configs = [(place / "config.json").read_text() for place in (folder, tmp_path)]
    configs = [json.loads(config, object_hook=without_dtype) for config in configs]
    assert configs[0] == configs[1]


def test_model_with_tied_word_embeddings_comes_back(tmp_path):
    backbone = tiny.tiny_backbone(tie_word_embeddings=True)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2)
    model.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_sharded_checkpoint_comes_back(saved, processor, tmp_path):
    _, model = saved
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_outputs(Fwd2BotForConditionalGeneration.from_pretrained(tmp_path), model, processor)


def test_generation_settings_come_back_for_both_paths(tmp_path, processor):
    model = tiny.tiny_fwd2bot()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.max_new_tokens == 3
    [prompt] = tiny.prompts(processor, ["What?"])
    inputs = processor(images=tiny.pictures(1), text=prompt)
    assert loaded.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    inputs = processor.backbone_processor(
        images=tiny.pictures(1), text=prompt, return_tensors="pt", add_special_tokens=False
    )
    assert loaded.generate_uncompressed(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3


# The folder


def test_folder_holds_the_code_that_its_config_names(saved):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    modules = {value.split(".")[0] for value in config["auto_map"].values()}
    modules |= {task["impl"].split(".")[0] for task in config["custom_pipelines"].values()}
    assert {f"{module}.py" for module in modules} <= {path.name for path in folder.iterdir()}
    assert {*MODEL_FILES, *PIPELINE_FILES} <= {path.name for path in folder.iterdir()}


def test_saving_over_the_folder_one_was_loaded_from(processor, tmp_path):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path)
    model = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_outputs(Fwd2BotForConditionalGeneration.from_pretrained(tmp_path), model, processor)


# Strict


def test_missing_weight_is_an_error(damaged):
    folder = damaged(lambda weights: weights.pop("summary_projector.bias"))
    with pytest.raises(ValueError, match=r"do not fit their config: missing \(1\): summary_projector.bias"):
        Fwd2BotForConditionalGeneration.from_pretrained(folder)


def test_unexpected_weight_is_an_error(damaged):
    folder = damaged(lambda weights: weights.update({"extra.weight": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"unexpected \(1\): extra.weight"):
        Fwd2BotForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize("ignore", [False, True])
def test_weight_of_another_shape_is_an_error(damaged, ignore):
    folder = damaged(lambda weights: weights.update({"summary_projector.bias": torch.zeros(2)}))
    with pytest.raises((ValueError, RuntimeError), match="summary_projector.bias|mismatch"):
        Fwd2BotForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=ignore)


def test_auto_model_is_strict_as_well(damaged):
    folder = damaged(lambda weights: weights.pop("logit_scale"))
    with pytest.raises(ValueError, match="missing .*logit_scale"):
        AutoModel.from_pretrained(folder)


def test_loading_info_is_returned_when_asked_for(saved):
    model, info = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], output_loading_info=True)
    assert isinstance(model, Fwd2BotForConditionalGeneration)
    assert not info["missing_keys"]


# Stages


@pytest.mark.parametrize("auto_class", [Fwd2BotForConditionalGeneration, AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("stage", ["compress", "generate", "text"])
def test_stage_has_the_parts_it_needs(saved, auto_class, stage):
    loaded = auto_class.from_pretrained(saved[0], stage=stage, merge_adapters=False)
    names = {name for name, _ in loaded.named_parameters()}
    assert loaded.stage == stage
    assert any(".compress." in name for name in names) == (stage != "generate")
    assert any(".generate." in name for name in names) == (stage != "compress")
    assert any("vision" in name or "multi_modal" in name for name in names) == (stage == "compress")


def test_compress_stage_compresses_and_embeds(saved, processor):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, stage="compress", merge_adapters=False)
    images, texts = processor.process_images(tiny.pictures(2)), processor.process_texts(["a", "bc"])
    assert torch.equal(loaded.compress(**images).tokens, model.compress(**images).tokens)
    assert torch.equal(loaded.embed(**texts), model.embed(**texts))


@pytest.mark.parametrize("stage", ["generate", "text"])
def test_stages_without_vision_answer_from_summaries(saved, processor, stage):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, stage=stage)
    summary = model.compress(**processor.process_images(tiny.pictures(1)))
    inputs = processor(text=tiny.prompts(processor, ["What?"]))
    expected = model.generate_from_summary(summary, **inputs, **GREEDY)
    assert torch.equal(loaded.generate_from_summary(summary, **inputs, **GREEDY), expected)
    assert torch.equal(loaded.embed(summary=summary), model.embed(summary=summary))


def test_text_stage_embeds_texts(saved, processor):
    folder, model = saved
    texts = processor.process_texts(["a dog", "two"])
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, stage="text")
    assert torch.equal(loaded.embed(**texts), model.embed(**texts))


def test_stages_refuse_what_they_lack_the_parts_for(saved, processor, tmp_path):
    folder, model = saved
    images = processor.process_images(tiny.pictures(1))
    summary, prompts = model.compress(**images), tiny.prompts(processor, ["What?"])
    models = {
        stage: Fwd2BotForConditionalGeneration.from_pretrained(folder, stage=stage)
        for stage in ("compress", "generate", "text")
    }
    with pytest.raises(ValueError, match="stage='generate' and cannot compress. Load it without `stage`"):
        models["generate"].compress(**images)
    with pytest.raises(ValueError, match="stage='generate' and cannot compress"):
        models["generate"].embed(**processor.process_texts("a"))
    with pytest.raises(ValueError, match="stage='text', without its vision tower, and cannot read 'pixel_values'"):
        models["text"].compress(**images)
    with pytest.raises(ValueError, match="stage='compress' and cannot generate. Load it without `stage`"):
        models["compress"].generate_from_summary(summary, **processor(text=prompts))
    with pytest.raises(ValueError, match="stage='compress' and cannot generate"):
        models["compress"].generate(**processor(images=tiny.pictures(1), text=prompts))
    with pytest.raises(ValueError, match="stage='text' and cannot run"):
        models["text"].generate_uncompressed(**images)
    for stage, loaded in models.items():
        with pytest.raises(ValueError, match=f"stage='{stage}' and cannot be saved"):
            loaded.save_pretrained(tmp_path / stage)
    assert list(tmp_path.iterdir()) == []


def test_unknown_stage_is_refused_while_loading(saved):
    with pytest.raises(ValueError, match="stage='texts' is unknown"):
        AutoModel.from_pretrained(saved[0], stage="texts")


# Options of from_pretrained


@pytest.mark.parametrize("auto_class", [Fwd2BotForConditionalGeneration, AutoModel])
def test_options_reach_the_backbone(saved, auto_class):
    loaded = auto_class.from_pretrained(
        saved[0], dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", stage="text"
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.backbone.get_decoder().config._attn_implementation == "eager"
    assert loaded.get_decoder().layers[0].self_attn.config._attn_implementation == "eager"
    assert loaded.stage == "text"


def test_eager_attention_gives_the_same(saved, processor):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    for found, expected in zip(outputs(loaded, processor), outputs(model, processor), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_device_map_auto_gives_the_same(saved, processor):
    folder, model = saved
    assert_same_outputs(Fwd2BotForConditionalGeneration.from_pretrained(folder, device_map="auto"), model, processor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_with_its_fingerprint(saved, processor, tmp_path, dtype):
    folder, model = saved
    half = Fwd2BotForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    half.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.config.fingerprint == model.config.fingerprint
    assert_same_outputs(loaded, half, processor)


def test_half_precision_summary_knows_its_dtype(processor):
    model = tiny.tiny_fwd2bot().to(torch.bfloat16)
    images = processor.process_images(tiny.pictures(1))
    summary = model.compress(**images)
    assert summary.tokens.dtype == torch.bfloat16
    assert summary.metadata["dtype"] == "bfloat16"
    assert model.embed(**images).dtype == torch.float32


@pytest.mark.parametrize("stage", ["compress", "generate", "text"])
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_every_kind_of_lora_loads_in_every_stage(stage, lora, tmp_path):
    adapters = {name: {"r": 2, **lora} for name in ("compress", "generate")}
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), adapters=adapters)
    model.save_pretrained(tmp_path)
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path, stage=stage, merge_adapters=False)
    kept = {"compress": {"compress"}, "generate": {"generate"}, "text": {"compress", "generate"}}[stage]
    assert {name.split(".lora_")[1].split(".")[1] for name, _ in loaded.named_parameters() if ".lora_" in name} == kept


def test_unknown_weight_of_a_stage_that_is_left_out_is_an_error(damaged):
    def add(weights):
        name = next(name for name in weights if ".lora_A.compress." in name)
        weights[name.replace(".weight", ".nonsense")] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"unexpected \(1\): .*nonsense"):
        Fwd2BotForConditionalGeneration.from_pretrained(damaged(add), stage="generate")
