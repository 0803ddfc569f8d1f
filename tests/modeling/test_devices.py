"""Models spread over devices: parts on the disk or the CPU, backbones with accelerate's hooks, several GPUs."""

import inspect

import pytest
import tiny
import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from fwd2bot import Fwd2BotForConditionalGeneration

GREEDY = {"max_new_tokens": 5, "do_sample": False}
QUESTIONS = ["What?", "Where is it?", "Why?"]
LANGUAGE = "backbone.model.language_model"
BY_HAND = {
    "backbone.model.vision_tower": "disk",
    "backbone.model.multi_modal_projector": "cpu",
    f"{LANGUAGE}.embed_tokens": "disk",
    f"{LANGUAGE}.layers.0": "cpu",
    f"{LANGUAGE}.layers.1": "disk",
    f"{LANGUAGE}.norm": "cpu",
    f"{LANGUAGE}.rotary_emb": "cpu",
    "backbone.lm_head": "disk",
    "summary_projector": "disk",
    "logit_scale": "cpu",
}

# Not ours to mend: accelerate warns of a parameter of the model itself, for which it has no hook and needs none.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match:UserWarning")


def bytes_of(model) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())


def assert_same_outputs(model, expected, processor, device="cpu"):
    """compress, embed of pictures, texts and summaries, answers from summaries and from pictures, on words alone."""
    images = processor.process_images(tiny.pictures(3)).to(device)
    prompts = processor(text=tiny.prompts(processor, QUESTIONS)).to(device)
    both = processor(images=tiny.pictures(3), text=tiny.prompts(processor, QUESTIONS)).to(device)
    summary = expected.compress(**images.to("cpu"))

    def outputs(model, place):
        texts = processor.process_texts(["a dog", "two cats"]).to(place)
        return [
            model.compress(**images.to(place)).tokens,
            model.embed(**images.to(place)),
            model.embed(**texts),
            model.embed(summary=summary),
            model.generate_from_summary(summary, **prompts.to(place), **GREEDY),
            model.generate(**both.to(place), **GREEDY),
            model.generate(**processor(text=["What is a dog?"]).to(place), **GREEDY),
        ]

    for found, wanted in zip(outputs(model, device), outputs(expected, "cpu"), strict=True):
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5 if device == "cpu" else 1e-4)


# Loading with a device map


@pytest.mark.parametrize(
    "device_map",
    ["auto", "cpu", {"": "cpu"}, {"": "disk"}, BY_HAND],
    ids=["auto", "cpu", "all_cpu", "all_disk", "by_hand"],
)
def test_device_map_changes_no_output(saved, processor, tmp_path, device_map):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    offloaded = any(parameter.is_meta for parameter in loaded.parameters())
    assert offloaded == (isinstance(device_map, dict) and "disk" in device_map.values())
    assert loaded.device == torch.device("cpu")
    assert_same_outputs(loaded, model, processor)


def test_auto_device_map_that_runs_out_of_memory_uses_the_disk(saved, processor, tmp_path):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(0.7 * bytes_of(model))}, offload_folder=tmp_path
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert_same_outputs(loaded, model, processor)


def test_offloaded_model_saves_what_it_loaded(saved, processor, tmp_path):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        folder, device_map=BY_HAND, offload_folder=tmp_path / "offload"
    )
    with pytest.warns(UserWarning, match="Attempting to save a model with offloaded modules"):
        loaded.save_pretrained(tmp_path / "again")
    again = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.fingerprint == model.fingerprint
    assert_same_outputs(again, model, processor)


@pytest.mark.parametrize("stage", ["compress", "generate", "text"])
def test_a_part_of_the_model_is_offloaded_too(saved, processor, tmp_path, stage):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        folder, stage=stage, device_map={"": "disk"}, offload_folder=tmp_path
    )
    images, prompts = processor.process_images(tiny.pictures(3)), processor(text=tiny.prompts(processor, QUESTIONS))
    summary = model.compress(**images)
    if stage == "compress":
        assert torch.equal(loaded.compress(**images).tokens, summary.tokens)
    else:
        answers = loaded.generate_from_summary(summary, **prompts, **GREEDY)
        assert torch.equal(answers, model.generate_from_summary(summary, **prompts, **GREEDY))


# What may be split


@pytest.mark.parametrize("device_map", [{"": "disk"}, BY_HAND], ids=["all", "a part"])
def test_adapters_of_an_offloaded_model_are_not_saved_alone(saved, tmp_path, device_map):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        saved[0], device_map=device_map, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="without offloading"):
        loaded.save_pretrained(tmp_path / "adapters", adapter_only=True)
    assert not (tmp_path / "adapters").exists()


def test_offloaded_model_is_not_merged(saved, processor, tmp_path):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(
        saved[0], device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ValueError, match="quantised or elsewhere.*without offloading"):
        loaded.merge_and_export("compress", tmp_path / "merged", processor)
    assert not (tmp_path / "merged").exists()


def test_layers_are_never_split_nor_queries_from_the_embedding(shared_fwd2bot):
    """At every size of the first device, a decoder layer with its adapters and the embedding lie on one device."""
    model = shared_fwd2bot
    total = bytes_of(model)
    whole = [f"{LANGUAGE}.layers.0", f"{LANGUAGE}.layers.1", f"{LANGUAGE}.embed_tokens"]
    splits = set()
    for share in range(1, 20):
        places = infer_auto_device_map(
            model,
            max_memory={"cpu": total * share // 20, "disk": 10 * total},
            no_split_module_classes=list(model._no_split_modules),
        )
        splits.add(tuple(sorted(places)))
        for part in whole:
            names = [name for name, _ in model.named_parameters() if name.startswith(f"{part}.")]
            assert len({place_of(name, places) for name in names}) == 1, (part, places)
    assert len(splits) > 3
    assert "LlamaDecoderLayer" in model._no_split_modules


def place_of(name: str, places: dict) -> str:
    """Where a device map puts a parameter: at its longest matching prefix."""
    return places[max((part for part in places if f"{name}.".startswith(f"{part}.") or not part), key=len)]


# Backbones that lie on devices already


@pytest.mark.parametrize("taken_away", [False, True])
def test_backbone_with_hooks_can_be_wrapped(saved, processor, taken_away):
    """accelerate replaces `forward` of each part, for good; the queries must be found all the same."""
    hooked, plain = tiny.tiny_backbone(), tiny.tiny_backbone()
    dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    assert hasattr(hooked.get_input_embeddings(), "_hf_hook")
    if taken_away:
        remove_hook_from_submodules(hooked)
        assert "forward" in vars(hooked.get_input_embeddings())
    models = []
    for backbone in (hooked, plain):
        torch.manual_seed(0)
        models.append(Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4))
    assert_same_outputs(*models, processor)


def test_offloaded_backbone_is_refused_by_name(tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path / "backbone")
    backbone = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "backbone", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(
        ValueError, match="Parts of this LlavaForConditionalGeneration are offloaded .* Load it without"
    ):
        Fwd2BotForConditionalGeneration.from_backbone(backbone)


# Several devices


needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_one
def test_gpu_with_parts_on_the_cpu_gives_the_same(saved, processor):
    parts = {**{name: 0 for name in BY_HAND}, f"{LANGUAGE}.layers.1": "cpu", "summary_projector": "cpu"}
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], device_map=parts)
    assert loaded.device.type == "cuda"
    assert_same_outputs(loaded, saved[1], processor, device="cuda")


@pytest.mark.gpu
@needs_two
def test_model_on_two_gpus_gives_the_same(saved, processor):
    parts = {**{name: 0 for name in BY_HAND}, f"{LANGUAGE}.layers.1": 1, f"{LANGUAGE}.norm": 1, "summary_projector": 1}
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], device_map=parts)
    assert_same_outputs(loaded, saved[1], processor, device="cuda")


@pytest.mark.gpu
@needs_two
def test_backbone_on_two_gpus_can_be_wrapped_and_trained(processor, tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path)
    parts = {name.removeprefix("backbone."): 0 for name in BY_HAND if name.startswith("backbone.")}
    parts |= {"model.language_model.layers.1": 1, "model.language_model.norm": 1}
    backbone = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=parts)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4).train()
    batch = {name: value.to("cuda:0") for name, value in tiny.training_batch(processor, ["a", "b", "c"]).items()}
    model(**batch, num_summary_tokens=4).loss.backward()
    assert model.summary_projector.weight.device == torch.device("cuda:1")
    assert model.get_input_embeddings().summary_queries.device == torch.device("cuda:0")
    assert all(value.grad is not None for value in model.mark_trainable().values())


def hooked(model):
    return add_hook_to_module(model, ModelHook())


def dispatched(model):
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["summary_projector"])).get_base_model()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
@pytest.mark.parametrize("change", [hooked, dispatched, adapted])
def test_model_in_another_form_takes_and_answers_the_same(shared_fwd2bot, processor, change):
    """`Trainer` keeps the columns that the signature of `forward` names, and `generate()` the arguments."""
    model, plain = change(tiny.tiny_fwd2bot()), shared_fwd2bot
    names = list(inspect.signature(plain.forward).parameters)
    assert names[0] == "input_ids" and names[-1] == "kwargs"
    assert list(inspect.signature(model.forward).parameters) == names
    summary = plain.compress(**processor.process_images(tiny.pictures(2)))
    inputs = processor(text=tiny.prompts(processor, ["What is it?", "Why?"]))
    answers, expected = (
        one.generate_from_summary(summary.tokens, **inputs, max_new_tokens=3, do_sample=False)
        for one in (model, plain)
    )
    assert torch.equal(answers, expected)


def test_generate_is_told_what_the_signature_of_forward_says(shared_fwd2bot):
    names = inspect.signature(shared_fwd2bot.forward).parameters
    assert shared_fwd2bot._supports_logits_to_keep() == ("logits_to_keep" in names)
    assert shared_fwd2bot._supports_mm_encoder_outputs() == ("mm_encoder_outputs" in names)
