"""Adapter-only checkpoints: small, read by PEFT as well, and loaded upon the right backbone or not at all."""

import json
from fnmatch import fnmatch

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, LlamaForCausalLM

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import run_stage
from fwd2bot.configuration_fwd2bot import STAGES

GREEDY = {"max_new_tokens": 6, "do_sample": False}
FILES = {f"{stage}/adapter_{file}" for stage in STAGES for file in ("config.json", "model.safetensors")}
from_pretrained = Fwd2BotForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the adapters of a model, whose backbone lies in the folder beside it, and that model."""
    base = tmp_path_factory.mktemp("adapters")
    tiny.tiny_backbone().save_pretrained(base / "backbone")
    model = tiny.tiny_fwd2bot()
    model.config.backbone_name_or_path = str(base / "backbone")
    model.save_pretrained(base / "mine", adapter_only=True)
    return base / "mine", model


@pytest.fixture
def changed(saved, tmp_path):
    """`changed(file, change)` gives the saved folder after `change` of the weights in one file."""

    def make(name, change):
        folder, _ = saved
        for source in folder.rglob("*.*"):
            target = tmp_path / source.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(source.read_bytes())
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, tmp_path / name, metadata={"format": "pt"})
        return tmp_path

    return make


def outputs(model, processor):
    """Summary, embeddings of texts, answer."""
    prompts = tiny.prompts(processor, ["What is it?", "Why?"])
    return [
        model.compress(**processor.process_images(tiny.pictures(2))).tokens,
        model.embed(**processor.process_texts(["a dog", "two cats"])),
        model.generate(**processor(images=tiny.pictures(2), text=prompts), **GREEDY),
    ]


def assert_same_outputs(model, expected, processor):
    for found, wanted in zip(outputs(model, processor), outputs(expected, processor), strict=True):
        assert torch.equal(found, wanted)


def test_folder_holds_adapters_and_no_backbone(saved):
    folder, model = saved
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert FILES | {"fwd2bot.safetensors", "config.json", "modeling_fwd2bot.py"} <= files
    assert not any(name.startswith("model") and name.endswith(".safetensors") for name in files)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    trained = sum(value.numel() * value.element_size() for value in model.trained_parameters().values())
    assert trained <= weights < trained + 60_000  # names, shapes and the sample of the backbone


def test_backbone_that_the_config_names_is_loaded(saved, processor):
    folder, model = saved
    loaded = from_pretrained(folder)
    assert_same_outputs(loaded, model, processor)
    assert not loaded.training


def test_given_backbone_is_used(saved, processor):
    folder, model = saved
    backbone = tiny.tiny_backbone()
    loaded = from_pretrained(folder, backbone=backbone)
    assert loaded.backbone is backbone
    assert_same_outputs(loaded, model, processor)


def test_given_path_of_a_backbone_is_used(saved, processor, tmp_path):
    folder, model = saved
    tiny.tiny_backbone().save_pretrained(tmp_path)
    assert_same_outputs(from_pretrained(folder, backbone=tmp_path), model, processor)


def test_auto_class_loads_it(saved, processor):
    folder, model = saved
    loaded = AutoModel.from_pretrained(folder, backbone=tiny.tiny_backbone())
    assert_same_outputs(loaded, model, processor)


def test_it_trains_what_the_saved_one_did(saved):
    folder, model = saved
    loaded = from_pretrained(folder)
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1] == set(model.trained_parameters())


@pytest.mark.parametrize("stage", ["generate", "text"])
def test_stages_without_vision_answer_from_summaries(saved, processor, stage):
    folder, model = saved
    summary = model.compress(**processor.process_images(tiny.pictures(1)))
    inputs = processor(text=tiny.prompts(processor, ["What is it?"]))
    loaded = from_pretrained(folder, stage=stage)
    assert loaded.num_parameters() < model.num_parameters()
    assert torch.equal(
        loaded.generate_from_summary(summary, **inputs, **GREEDY),
        model.generate_from_summary(summary, **inputs, **GREEDY),
    )


def test_compress_stage_compresses(saved, processor):
    folder, model = saved
    images = processor.process_images(tiny.pictures(2))
    loaded = from_pretrained(folder, stage="compress")
    torch.testing.assert_close(loaded.compress(**images).tokens, model.compress(**images).tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["compress", "generate"])
def test_plain_peft_reads_an_adapter(saved, processor, stage):
    folder, model = saved
    inputs = processor.process_images(tiny.pictures(2))
    wrapped = PeftModel.from_pretrained(tiny.tiny_backbone(), folder, subfolder=stage)
    with torch.no_grad(), run_stage(stage):
        expected = model.backbone(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 2, "use_dora": True},
        {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 3}},
        {"r": 2, "target_modules": r"layers\.1\..*(up|o)_proj", "exclude_modules": ["o_proj"]},
        {"r": 2, "rank_pattern": {"^layers.0.mlp.up_proj": 5}, "alpha_pattern": {"^layers.1.self_attn.v_proj": 64}},
    ],
    ids=["dora", "patterns", "one layer", "names from the start"],
)
def test_lora_of_another_kind_comes_back(lora, processor, tmp_path):
    adapters = {"compress": lora, "generate": LoraConfig(r=3)}
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), adapters=adapters)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path, adapter_only=True)
    assert_same_outputs(from_pretrained(tmp_path, backbone=tiny.tiny_backbone()), model.eval(), processor)
    wrapped = PeftModel.from_pretrained(tiny.tiny_backbone(), tmp_path, subfolder="compress")
    inputs = processor.process_images(tiny.pictures(1))
    with torch.no_grad(), run_stage("compress"):
        expected = model.backbone(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**inputs).logits, expected, rtol=0, atol=1e-5)


# One fingerprint


def test_fingerprint_is_that_of_the_full_checkpoint(saved, tmp_path):
    folder, model = saved
    model.save_pretrained(tmp_path)
    names = {json.loads((place / "config.json").read_text())["fingerprint"] for place in (folder, tmp_path)}
    assert names == {model.fingerprint} == {from_pretrained(folder).fingerprint}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtype_is_the_same_model(saved, dtype):
    folder, model = saved
    loaded = from_pretrained(folder, dtype=dtype)
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    assert loaded.fingerprint == model.fingerprint


def test_backbone_is_known_across_half_precisions(processor, tmp_path):
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone().half())
    model.save_pretrained(tmp_path, adapter_only=True)
    loaded = from_pretrained(tmp_path, backbone=tiny.tiny_backbone().bfloat16())
    assert loaded.fingerprint == model.fingerprint


# Refusals


def test_backbone_with_other_weights_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="not trained on this backbone.*has other values.*backbone="):
        from_pretrained(folder, backbone=tiny.tiny_backbone(seed=1))


def test_backbone_with_one_changed_weight_is_refused(saved):
    folder, _ = saved
    backbone = tiny.tiny_backbone()
    with torch.no_grad():
        backbone.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="on .*backbone: model.language_model.layers.1.mlp.up_proj.weight has other"):
        from_pretrained(folder, backbone=backbone)


def test_backbone_of_another_shape_is_refused_with_both_shapes(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"has the shape \(32, 64\), not \(32, 48\)"):
        from_pretrained(folder, backbone=tiny.tiny_backbone(intermediate_size=64))


def test_backbone_with_another_vocabulary_is_refused(saved):
    folder, _ = saved
    backbone = tiny.tiny_backbone()
    backbone.resize_token_embeddings(300)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \(300, 32\), not \(260, 32\)"):
        from_pretrained(folder, backbone=backbone)


def test_backbone_with_fewer_layers_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="there is no model.language_model.layers.1."):
        from_pretrained(folder, backbone=tiny.tiny_backbone(num_hidden_layers=1))


def test_backbone_that_is_gone_is_named_with_the_remedy(tmp_path):
    model = tiny.tiny_fwd2bot()
    model.config.backbone_name_or_path, model.config.backbone_revision = "someone/llava-7b", "abc123"
    model.save_pretrained(tmp_path, adapter_only=True)
    with pytest.raises(OSError, match="(?s)someone/llava-7b at revision abc123.*backbone="):
        from_pretrained(tmp_path)


def test_unnamed_backbone_is_asked_for(tmp_path):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path, adapter_only=True)
    with pytest.raises(ValueError, match="does not say of which backbone. Hand it over"):
        from_pretrained(tmp_path)


def test_options_for_a_loaded_backbone_are_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="'dtype'.* would load a backbone, but a loaded one was given"):
        from_pretrained(folder, backbone=tiny.tiny_backbone(), dtype=torch.bfloat16)


def test_full_checkpoint_takes_no_backbone(tmp_path):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a full checkpoint"):
        from_pretrained(tmp_path, backbone=tiny.tiny_backbone())


@pytest.mark.parametrize("stage", ["compress", "generate"])
def test_missing_adapter_weight_is_listed(changed, stage):
    def change(weights):
        del weights[next(name for name in weights if "layers.1.mlp.up_proj.lora_A" in name)]

    with pytest.raises(ValueError, match=r"missing \(1\): layers.1.mlp.up_proj.lora_A.weight"):
        from_pretrained(changed(f"{stage}/adapter_model.safetensors", change))


def test_adapter_weight_of_another_shape_is_listed(changed):
    def change(weights):
        name = next(name for name in weights if "layers.0.self_attn.q_proj.lora_A" in name)
        weights[name] = torch.zeros(7, 32)

    with pytest.raises(ValueError, match=r"mismatched \(1\): .*q_proj.lora_A.weight \(7, 32\) for \(4, 32\)"):
        from_pretrained(changed("compress/adapter_model.safetensors", change))


def test_backbone_that_computes_something_else_with_the_same_weights_is_refused(saved):
    folder, _ = saved
    backbone = tiny.tiny_backbone()
    backbone.config.vision_feature_layer = -2
    with pytest.raises(ValueError, match="its config has vision_feature_layer=-2, not -1"):
        from_pretrained(folder, backbone=backbone)


def test_failed_load_leaves_the_given_backbone_as_it_was(changed, saved, processor):
    folder, model = saved
    backbone = tiny.tiny_backbone()
    broken = changed("generate/adapter_model.safetensors", lambda weights: None)
    (broken / "generate" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="generate/adapter_model.safetensors is damaged.*anew"):
        from_pretrained(broken, backbone=backbone)
    assert_same_outputs(from_pretrained(folder, backbone=backbone), model, processor)


def test_file_without_its_record_is_refused_by_name(changed):
    folder = changed("fwd2bot.safetensors", lambda weights: None)  # which loses the metadata
    with pytest.raises(ValueError, match="fwd2bot.safetensors lacks 'backbone_shapes'. Save or download"):
        from_pretrained(folder)


def test_adapter_that_was_trained_on_is_another_model(changed, saved, processor, caplog):
    _, model = saved

    def train(weights):
        for value in weights.values():
            value.mul_(1.5)

    loaded = from_pretrained(changed("compress/adapter_model.safetensors", train))
    assert "adapters of ['compress']" in caplog.text and "were changed since they were saved" in caplog.text
    assert loaded.fingerprint != model.fingerprint
    with pytest.raises(ValueError, match="made by another model"):
        loaded.embed(summary=model.compress(**processor.process_images(tiny.pictures(1))))


@pytest.mark.parametrize("backbone", [123, "a text-only model"])
def test_backbone_of_another_sort_is_refused(saved, backbone, tmp_path):
    if backbone == "a text-only model":
        LlamaForCausalLM(tiny.tiny_backbone().config.text_config).save_pretrained(tmp_path)
        backbone = tmp_path
    with pytest.raises(TypeError, match="no vision-language model.*AutoModelForImageTextToText"):
        from_pretrained(saved[0], backbone=backbone)


@pytest.mark.parametrize("load", [from_pretrained, AutoModel.from_pretrained])
def test_number_of_queries_is_not_chosen_in_loading(saved, load):
    with pytest.raises(ValueError, match="num_summary_tokens=8 cannot be chosen.*trained with 4 summary queries"):
        load(saved[0], num_summary_tokens=8)


def test_config_may_be_overridden_in_loading(saved):
    assert from_pretrained(saved[0], image_prompt="Hi").config.image_prompt == "Hi"


@pytest.mark.parametrize("load", [from_pretrained, AutoModel.from_pretrained])
def test_attention_is_an_option_of_loading(saved, load):
    loaded = load(saved[0], attn_implementation="eager")
    assert loaded.backbone.config.text_config._attn_implementation == "eager"


# Names on the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(commits)` makes a local cache of `someone/backbone`, whose `main` is the last of these commits."""

    def make(commits):
        repo = tmp_path / "cache" / "models--someone--backbone"
        for seed, commit in enumerate(commits):
            tiny.tiny_backbone(seed).save_pretrained(repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commits[-1])
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    return make


OLD, NEW = "a" * 40, "b" * 40


@pytest.mark.parametrize("given", ["id", "model"])
def test_backbone_is_pinned_to_its_commit(hub, tmp_path, given):
    hub([OLD])
    backbone = AutoModelForImageTextToText.from_pretrained("someone/backbone") if given == "model" else None
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone or "someone/backbone", num_summary_tokens=2)
    assert (model.config.backbone_name_or_path, model.config.backbone_revision) == ("someone/backbone", OLD)
    model.save_pretrained(tmp_path / "mine", adapter_only=True)
    hub([OLD, NEW])  # main has moved on
    assert from_pretrained(tmp_path / "mine").fingerprint == model.fingerprint


def test_folder_of_a_backbone_is_noted_in_full(tmp_path, monkeypatch):
    tiny.tiny_backbone().save_pretrained(tmp_path / "bb")
    monkeypatch.chdir(tmp_path)
    model = Fwd2BotForConditionalGeneration.from_backbone("bb", num_summary_tokens=2)
    assert model.config.backbone_name_or_path == str(tmp_path / "bb")


# Saving


def test_model_that_does_not_know_its_backbone_says_so_when_it_is_saved(tmp_path, caplog):
    tiny.tiny_fwd2bot().save_pretrained(tmp_path, adapter_only=True)
    assert "does not know where its backbone came from" in caplog.text


def test_one_kind_of_checkpoint_replaces_the_other(tmp_path, processor):
    model = tiny.tiny_fwd2bot()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, adapter_only=True)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_outputs(from_pretrained(tmp_path, backbone=tiny.tiny_backbone()), model, processor)
    model.save_pretrained(tmp_path)
    assert not any((tmp_path / name).exists() for name in ("compress", "generate", "fwd2bot.safetensors"))
    assert_same_outputs(from_pretrained(tmp_path), model, processor)


def test_loaded_adapters_can_be_saved_in_full(saved, processor, tmp_path):
    folder, model = saved
    from_pretrained(folder).save_pretrained(tmp_path)
    assert_same_outputs(from_pretrained(tmp_path), model, processor)


def test_generation_settings_come_back(tmp_path):
    model = tiny.tiny_fwd2bot()
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path, adapter_only=True)
    assert from_pretrained(tmp_path, backbone=tiny.tiny_backbone()).generation_config.max_new_tokens == 5


def test_push_uploads_the_adapters(monkeypatch, tmp_path):
    uploaded = {}

    class Repo:
        repo_id = "someone/mine"

    def upload(self, repo_id, folder_path, **kwargs):
        folder = type(tmp_path)(folder_path)
        uploaded["deleted"] = kwargs["delete_patterns"]
        uploaded[repo_id] = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *args, **kwargs: Repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    tiny.tiny_fwd2bot().save_pretrained(tmp_path, adapter_only=True, push_to_hub=True, repo_id="mine")
    assert FILES <= uploaded["someone/mine"]
    assert "model.safetensors" not in uploaded["someone/mine"]
    assert any(
        fnmatch(file, pattern) for file in ["model-00001-of-00002.safetensors"] for pattern in uploaded["deleted"]
    )


def test_unknown_option_of_a_push_is_refused():
    with pytest.raises(TypeError, match=r"no \['tags'\]; allowed"):
        tiny.tiny_fwd2bot().push_to_hub("someone/mine", adapter_only=True, tags="cats")
