"""`merge_and_export`: one stage in a folder of its own, by the same name, and the model as it was."""

import copy
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.adapters_fwd2bot import run_stage
from fwd2bot.merging_fwd2bot import merged_state


@pytest.fixture(scope="module")
def exported(tmp_path_factory, processor):
    """The model, and its exports by stage. Do not change them."""
    base, model = tmp_path_factory.mktemp("exports"), tiny.tiny_fwd2bot()
    for stage in ("compress", "generate"):
        model.merge_and_export(stage, base / stage, processor)
    return model, {stage: base / stage for stage in ("compress", "generate")}


def weight_names(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_merged_weights_are_base_and_adapter_together():
    model = tiny.tiny_fwd2bot()
    layer = model.get_decoder().layers[0].mlp.up_proj
    expected = layer.base_layer.weight + layer.lora_B["compress"].weight @ layer.lora_A["compress"].weight
    torch.testing.assert_close(merged_state(model.get_decoder(), "compress")["layers.0.mlp.up_proj.weight"], expected)


def test_model_stays_as_it_was(processor, tmp_path):
    model = tiny.tiny_fwd2bot().train()
    before = copy.deepcopy(model.state_dict())
    model.merge_and_export("compress", tmp_path / "c", processor)
    model.merge_and_export("generate", tmp_path / "g", processor)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.training and model.stage is None and model.config.merged_stage is None


def test_exports_keep_the_fingerprint(exported):
    model, folders = exported
    assert AutoModel.from_pretrained(folders["compress"]).fingerprint == model.fingerprint
    assert AutoModelForCausalLM.from_pretrained(folders["generate"]).config.fwd2bot["fingerprint"] == model.fingerprint


def test_summaries_of_the_compress_export_are_taken_by_the_model(exported, processor, tmp_path):
    model, folders = exported
    compressor = AutoModel.from_pretrained(folders["compress"])
    summary = compressor.compress(**processor.process_images(tiny.pictures(2)))
    summary.save_file(tmp_path / "summary.safetensors")
    expected = model.compress(**processor.process_images(tiny.pictures(2)))
    torch.testing.assert_close(model.load_summary(tmp_path / "summary.safetensors").tokens, expected.tokens)


def test_compress_export_embeds_texts_and_images(exported):
    model, folders = exported
    compressor = AutoModel.from_pretrained(folders["compress"])
    processor = AutoProcessor.from_pretrained(folders["compress"])
    for inputs in (processor.process_texts(["a dog", "two cats"]), processor.process_images(tiny.pictures(2))):
        torch.testing.assert_close(compressor.embed(**inputs), model.embed(**inputs))


def test_compress_export_has_neither_adapters_nor_head(exported):
    names = weight_names(exported[1]["compress"])
    assert any("vision" in name for name in names)
    assert not any("lora" in name or "lm_head" in name for name in names)


def test_compress_export_loads_without_the_package(exported, tmp_path):
    program = (
        "import sys\nsys.modules['fwd2bot'] = None\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(tuple(model.embed(**processor.process_texts(['a', 'b'])).shape), model.stage)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, exported[1]["compress"]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "(2, 32) compress"


@pytest.mark.parametrize("stage", ["generate", "text"])
def test_compress_export_is_refused_for_another_stage(exported, stage):
    with pytest.raises(ValueError, match=f"compress adapter is merged.*stage='{stage}'. Load the checkpoint"):
        AutoModel.from_pretrained(exported[1]["compress"], stage=stage)


def test_compress_export_cannot_answer(exported, processor):
    model, folders = exported
    compressor = AutoModel.from_pretrained(folders["compress"])
    summary = model.compress(**processor.process_images(tiny.pictures(1)))
    with pytest.raises(ValueError, match="cannot generate"):
        compressor.generate_from_summary(summary, **processor(text=tiny.prompts(processor, ["What?"])))


def test_generate_export_is_a_plain_folder_of_a_language_model(exported):
    _, folders = exported
    assert type(AutoModelForCausalLM.from_pretrained(folders["generate"])).__name__ == "LlamaForCausalLM"
    assert not any("vision" in name or "lora" in name or "quer" in name for name in weight_names(folders["generate"]))
    assert not list(folders["generate"].glob("*.py"))


def test_logits_of_the_generate_export_are_those_of_the_generate_pass(exported):
    model, folders = exported
    language_model = AutoModelForCausalLM.from_pretrained(folders["generate"])
    embeds = torch.randn(2, 9, 32)
    with torch.no_grad():
        found = language_model(inputs_embeds=embeds).logits
        torch.testing.assert_close(found, model(inputs_embeds=embeds).logits, rtol=1e-4, atol=1e-4)
        with run_stage(None):
            assert not torch.allclose(found, model.backbone(inputs_embeds=embeds).logits, atol=1e-2)


def test_generate_export_has_tokenizer_and_chat_template(exported, processor):
    tokenizer = AutoTokenizer.from_pretrained(exported[1]["generate"])
    chat = tiny.conversation("What?")
    expected = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(dtype, processor, tmp_path):
    model = tiny.tiny_fwd2bot().to(dtype)
    model.merge_and_export("generate", tmp_path / "g", processor)
    model.merge_and_export("compress", tmp_path / "c", processor)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "g").dtype == dtype
    assert AutoModel.from_pretrained(tmp_path / "c").dtype == dtype


def test_tied_word_embeddings_stay_tied(processor, tmp_path):
    backbone = tiny.tiny_backbone(tie_word_embeddings=True)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2)
    model.merge_and_export("generate", tmp_path / "g", processor)
    model.merge_and_export("compress", tmp_path / "c", processor)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path / "g")
    assert language_model.get_output_embeddings().weight is language_model.get_input_embeddings().weight
    images = processor.process_images(tiny.pictures(1))
    found = AutoModel.from_pretrained(tmp_path / "c").compress(**images)
    torch.testing.assert_close(found.tokens, model.eval().compress(**images).tokens)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}, {"lora_dropout": 0.5}])
def test_lora_of_another_kind_is_merged(lora, processor, tmp_path):
    backbone = tiny.tiny_backbone()
    adapters = {stage: {"r": 2, **lora} for stage in ("compress", "generate")}
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, adapters=adapters)
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    model.merge_and_export("compress", tmp_path, processor)
    images = processor.process_images(tiny.pictures(1))
    found = AutoModel.from_pretrained(tmp_path).compress(**images)
    torch.testing.assert_close(found.tokens, model.eval().compress(**images).tokens, rtol=0, atol=1e-5)


# Refusals


def test_unknown_stage_is_refused(exported, processor, tmp_path):
    with pytest.raises(ValueError, match="stage='answer' is unknown; choose one of"):
        exported[0].merge_and_export("answer", tmp_path, processor)


def test_folder_that_holds_something_is_refused(exported, processor, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty. Give a new folder"):
        exported[0].merge_and_export("generate", tmp_path, processor)
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_processor_of_the_backbone_alone_is_refused(exported, tmp_path):
    with pytest.raises(TypeError, match="must be the Fwd2BotProcessor.*got LlavaProcessor. Wrap it"):
        exported[0].merge_and_export("compress", tmp_path / "c", tiny.tiny_backbone_processor())


def test_compress_export_can_be_saved_again(exported, processor, tmp_path):
    compressor = AutoModel.from_pretrained(exported[1]["compress"])
    compressor.save_pretrained(tmp_path)
    images = processor.process_images(tiny.pictures(1))
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path).compress(**images).tokens, compressor.compress(**images).tokens
    )


def test_part_of_a_model_is_refused(exported, processor, tmp_path):
    compressor = AutoModel.from_pretrained(exported[1]["compress"])
    with pytest.raises(ValueError, match="compress adapter is merged.*cannot be exported"):
        compressor.merge_and_export("compress", tmp_path, processor)


def test_language_model_that_cannot_be_expressed_is_refused_by_name_and_leaves_nothing(processor, tmp_path):
    """A head with a bias, which a Llama's has not."""
    backbone = tiny.tiny_backbone()
    head = torch.nn.Linear(32, backbone.lm_head.out_features)
    backbone.set_output_embeddings(head)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2)
    with pytest.raises(ValueError, match="(?s)'llama' cannot express .*LlavaForConditionalGeneration.*lm_head.bias"):
        model.merge_and_export("generate", tmp_path / "g", processor)
    assert not (tmp_path / "g").exists()


def test_logits_that_differ_are_refused(processor, tmp_path):
    """A language model whose layers do something that its config does not tell."""
    model = tiny.tiny_fwd2bot()
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="its logits differ by .*stage='generate'"):
        model.merge_and_export("generate", tmp_path / "g", processor)
    assert not (tmp_path / "g").exists()
