"""A process of one stage has its adapter in the weights, and computes what the model with adapters apart does."""

import pickle

import pytest
import tiny
import torch
from transformers import AutoModel, AutoModelForImageTextToText, TorchAoConfig
from transformers.utils import is_torchao_available

from fwd2bot import Fwd2BotForConditionalGeneration

GREEDY = {"max_new_tokens": 8, "do_sample": False}
CLOSE = {"rtol": 0, "atol": 1e-5}  # of the laws
from_pretrained = Fwd2BotForConditionalGeneration.from_pretrained


def adapter_names(model):
    return [name for name, _ in model.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize("auto_class", [Fwd2BotForConditionalGeneration, AutoModel, AutoModelForImageTextToText])
@pytest.mark.parametrize("stage", ["compress", "generate"])
def test_one_stage_is_merged_by_default(saved, auto_class, stage):
    loaded = auto_class.from_pretrained(saved[0], stage=stage)
    assert loaded.adapters_merged
    assert adapter_names(loaded) == []
    assert not any("base_layer" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("options", [{}, {"stage": "text"}, {"stage": "compress", "merge_adapters": False}])
def test_both_stages_or_a_switch_keep_adapters_apart(saved, options):
    loaded = from_pretrained(saved[0], **options)
    assert not loaded.adapters_merged
    assert adapter_names(loaded)


def test_merged_compress_stage_gives_the_same_summaries_and_embeddings(saved, processor):
    folder, model = saved
    images, texts = processor.process_images(tiny.pictures(3)), processor.process_texts(["a", "a longer text"])
    loaded = from_pretrained(folder, stage="compress")
    torch.testing.assert_close(loaded.compress(**images).tokens, model.compress(**images).tokens, **CLOSE)
    torch.testing.assert_close(loaded.embed(**texts), model.embed(**texts), **CLOSE)
    assert loaded.compress(**images).metadata["fingerprint"] == model.fingerprint


def test_merged_generate_stage_gives_the_same_answers(saved, processor):
    folder, model = saved
    summary = model.compress(**processor.process_images(tiny.pictures(2)))
    inputs = processor(text=tiny.prompts(processor, ["What is it?", "Why?"]))
    loaded = from_pretrained(folder, stage="generate")
    expected = model.generate_from_summary(summary, **inputs, **GREEDY)
    assert torch.equal(loaded.generate_from_summary(summary, **inputs, **GREEDY), expected)
    logits = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    for mine, theirs in zip(
        loaded.generate_from_summary(summary, **inputs, **logits).logits,
        model.generate_from_summary(summary, **inputs, **logits).logits,
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, **CLOSE)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 3}}])
@pytest.mark.parametrize("stage", ["compress", "generate"])
def test_every_kind_of_lora_is_merged(lora, stage, tmp_path, processor):
    adapters = {name: {"r": 2, **lora} for name in ("compress", "generate")}
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), adapters=adapters).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, stage=stage)
    assert adapter_names(loaded) == []
    if stage == "compress":
        texts = processor.process_texts(["a dog"])
        torch.testing.assert_close(loaded.compress(**texts).tokens, model.compress(**texts).tokens, **CLOSE)
    else:
        words = processor(text=["a dog"])
        with torch.no_grad():
            torch.testing.assert_close(loaded(**words).logits, model(**words).logits, **CLOSE)


def test_bfloat16_is_merged_to_its_own_rounding(saved, processor):
    folder, model = saved
    texts = processor.process_texts(["a dog", "two cats"])
    expected = model.compress(**texts).tokens
    errors = []
    for merge in (None, False):
        loaded = from_pretrained(folder, stage="compress", dtype=torch.bfloat16, merge_adapters=merge)
        errors.append((loaded.compress(**texts).tokens.float() - expected).norm() / expected.norm())
    assert errors[0] < 2 * errors[1]  # merged is not further from float32 than bfloat16 is anyway, but for chance


def test_merging_leaves_the_file_as_it_was(saved, processor):
    folder = saved[0]
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    loaded = from_pretrained(folder, stage="compress")
    loaded.compress(**processor.process_images(tiny.pictures(1)))
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == before


def test_merged_model_travels_to_other_processes(saved, processor):
    loaded = from_pretrained(saved[0], stage="compress")
    images = processor.process_images(tiny.pictures(1))
    twin = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(twin.compress(**images).tokens, loaded.compress(**images).tokens)
    assert twin.fingerprint == loaded.fingerprint == saved[1].fingerprint


def test_merged_models_of_other_adapters_keep_other_fingerprints_when_changed_alike(tmp_path):
    merged = []
    for number in range(2):
        model = tiny.tiny_fwd2bot()
        if number:
            with torch.no_grad():
                next(value for name, value in model.named_parameters() if ".lora_B.generate" in name).add_(1)
        model.save_pretrained(tmp_path / str(number))
        merged.append(from_pretrained(tmp_path / str(number), stage="generate"))
    before = [model.fingerprint for model in merged]
    for model in merged:
        with torch.no_grad():
            model.summary_projector.bias.add_(1)
    after = [model.fingerprint for model in merged]
    assert len({*before, *after}) == 4


def test_sum_that_does_not_fit_the_dtype_of_the_weights_is_an_error(tmp_path):
    model = tiny.tiny_fwd2bot()
    layer = model.get_decoder().layers[1].mlp.up_proj
    with torch.no_grad():
        layer.lora_A["generate"].weight.fill_(200)
        layer.lora_B["generate"].weight.fill_(200)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj with their adapter reach .*float16.*bfloat16"):
        from_pretrained(tmp_path, stage="generate", dtype=torch.float16)
    assert from_pretrained(tmp_path, stage="generate", dtype=torch.bfloat16).adapters_merged
    assert adapter_names(from_pretrained(tmp_path, stage="generate", dtype=torch.float16, merge_adapters=False))


@pytest.mark.parametrize("stage", [None, "text"])
def test_merging_where_both_adapters_are_kept_is_refused(saved, stage):
    with pytest.raises(ValueError, match=f"merge_adapters=True came with stage={stage!r}.*'compress', 'generate'"):
        from_pretrained(saved[0], stage=stage, merge_adapters=True)


def test_saving_a_merged_stage_is_refused_by_name(saved, tmp_path):
    loaded = from_pretrained(saved[0], stage="compress")
    with pytest.raises(ValueError, match="stage='compress' and cannot be saved. Load it without `stage`"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_training_a_merged_stage_is_refused(saved, processor):
    loaded = from_pretrained(saved[0], stage="compress").train()
    images = {f"compress_{name}": value for name, value in processor.process_images(tiny.pictures(2)).items()}
    texts = {f"text_{name}": value for name, value in processor.process_texts(["a", "b"]).items()}
    with pytest.raises(ValueError, match="compress adapter is merged.*merge_adapters=False"):
        loaded(**images, **texts)


# Adapters alone


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a backbone, and of adapters that name it."""
    base, mine = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("mine")
    tiny.tiny_backbone().save_pretrained(base)
    model = tiny.tiny_fwd2bot()
    model.config.backbone_name_or_path = str(base)
    model.save_pretrained(mine, adapter_only=True)
    return base, mine


@pytest.mark.parametrize("named", [False, True])
def test_backbone_from_disk_is_merged_into(folders, processor, named):
    base, mine = folders
    texts = processor.process_texts(["a dog"])
    loaded = from_pretrained(mine, stage="compress", **({"backbone": str(base)} if named else {}))
    assert adapter_names(loaded) == []
    expected = tiny.tiny_fwd2bot().compress(**texts).tokens
    torch.testing.assert_close(loaded.compress(**texts).tokens, expected, **CLOSE)


def test_backbone_that_was_handed_over_keeps_its_weights(folders):
    backbone, bare = tiny.tiny_backbone(), tiny.tiny_backbone()
    loaded = from_pretrained(folders[1], stage="compress", backbone=backbone)
    assert adapter_names(loaded)
    kept = loaded.get_decoder().layers[0].self_attn.q_proj.base_layer.weight
    assert torch.equal(kept, bare.get_decoder().layers[0].self_attn.q_proj.weight)


def test_backbone_that_was_handed_over_is_merged_when_asked_for(folders):
    loaded = from_pretrained(folders[1], stage="compress", backbone=tiny.tiny_backbone(), merge_adapters=True)
    assert adapter_names(loaded) == []


@pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed")
class TestQuantised:
    @pytest.fixture
    def quantization(self):
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())

    def test_quantised_weights_keep_their_adapter(self, saved, quantization):
        assert adapter_names(from_pretrained(saved[0], stage="compress", quantization_config=quantization))

    def test_merging_into_quantised_weights_is_refused(self, saved, quantization):
        with pytest.raises(ValueError, match="cannot be merged: the weights of .*q_proj are quantised"):
            from_pretrained(saved[0], stage="compress", quantization_config=quantization, merge_adapters=True)


def test_offloaded_weights_keep_their_adapter(saved, tmp_path):
    loaded = from_pretrained(saved[0], stage="compress", device_map={"": "disk"}, offload_folder=str(tmp_path))
    assert adapter_names(loaded)
