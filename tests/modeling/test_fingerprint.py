"""The fingerprint of a model, and the summaries that carry it: what keeps it, what changes it, what it refuses."""

import copy
import pickle

import pytest
import tiny
import torch
from accelerate import disk_offload
from accelerate.hooks import remove_hook_from_module

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotSummary
from fwd2bot.fingerprint_fwd2bot import weights_fingerprint

GREEDY = {"max_new_tokens": 6, "do_sample": False}
WEIGHTS = "model.safetensors"


def test_summary_carries_what_made_it(saved, processor):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0])
    metadata = loaded.compress(**processor.process_images(tiny.pictures(1))).metadata
    assert metadata["model"] == saved[0].name  # where the folder lies is nobody's business
    assert metadata["fingerprint"] == loaded.config.fingerprint
    assert len(metadata["fingerprint"]) == 16
    assert metadata["prompt"] == processor.image_prompt
    assert metadata["dtype"] == "float32"


def test_other_weights_have_another_fingerprint(saved, processor, tmp_path):
    folder, model = saved
    other = tiny.tiny_fwd2bot(seed=1)
    other.save_pretrained(tmp_path)
    assert other.config.fingerprint != model.config.fingerprint
    summary = model.compress(**processor.process_images(tiny.pictures(1)))
    with pytest.raises(ValueError, match="made by another model: its fingerprint"):
        other.embed(summary=summary)
    assert torch.equal(
        Fwd2BotForConditionalGeneration.from_pretrained(folder).embed(summary=summary), model.embed(summary=summary)
    )


def test_layer_in_place_of_a_trained_one_gives_another_fingerprint(saved):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0])
    before = loaded.fingerprint
    adapter = loaded.get_decoder().layers[0].self_attn.q_proj.lora_A
    adapter["compress"] = torch.nn.Linear(
        adapter["compress"].in_features, adapter["compress"].out_features, bias=False
    )
    assert loaded.fingerprint != before


def test_loading_other_weights_gives_their_fingerprint(saved):
    loaded, other = Fwd2BotForConditionalGeneration.from_pretrained(saved[0]), tiny.tiny_fwd2bot(seed=1)
    loaded.load_state_dict(other.state_dict())
    assert loaded.fingerprint == other.fingerprint != saved[1].fingerprint


def test_assigning_other_weights_gives_their_fingerprint(saved):
    loaded, other = Fwd2BotForConditionalGeneration.from_pretrained(saved[0]), tiny.tiny_fwd2bot(seed=1)
    again = copy.deepcopy(loaded)  # tensors that were written to as often as those they take the place of
    with torch.no_grad():
        for name, value in other.named_parameters():
            again.get_parameter(name).data = value.clone()
    assert loaded.fingerprint == saved[1].fingerprint
    loaded.load_state_dict(dict(again.named_parameters()), assign=True)
    assert loaded.fingerprint == other.fingerprint != saved[1].fingerprint


@pytest.mark.parametrize("options", [{"stage": "compress"}, {"dtype": torch.bfloat16}], ids=["merged", "bfloat16"])
def test_weights_put_in_place_anew_keep_their_fingerprint_until_their_values_change(saved, processor, options):
    folder, model = saved
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, **options)
    summary = loaded.compress(**processor.process_images(tiny.pictures(1)))
    before = copy.deepcopy(loaded.state_dict())
    loaded.load_state_dict(before)  # written
    assert loaded.fingerprint == model.fingerprint
    loaded.load_state_dict(copy.deepcopy(before), assign=True)  # other tensors, as accelerate's hooks may bring them
    assert loaded.fingerprint == model.fingerprint
    assert len(loaded.embed(summary=summary)) == 1
    with torch.no_grad():
        loaded.summary_projector.bias.add_(1)
    assert loaded.fingerprint != model.fingerprint
    loaded.load_state_dict(before)
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize("options", [{}, {"stage": "generate"}], ids=["apart", "merged"])
@pytest.mark.parametrize("cast", [lambda model: model.half(), lambda model: model.to(torch.bfloat16).float()])
def test_fingerprint_survives_a_cast_and_tensors_put_in_place_after_it(saved, options, cast):
    loaded = cast(Fwd2BotForConditionalGeneration.from_pretrained(saved[0], **options))
    loaded.load_state_dict(copy.deepcopy(loaded.state_dict()), assign=True)
    assert loaded.fingerprint == saved[1].fingerprint
    with torch.no_grad():
        loaded.summary_projector.bias.add_(1)
    assert loaded.fingerprint != saved[1].fingerprint


def test_change_before_a_cast_is_seen_after_it(saved):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0])
    with torch.no_grad():
        loaded.summary_projector.bias.add_(1)
    assert loaded.half().fingerprint != saved[1].fingerprint


def test_fingerprint_survives_that_weights_were_offloaded_and_came_back(saved, tmp_path):
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], dtype=torch.bfloat16)
    disk_offload(loaded, tmp_path, execution_device=torch.device("cpu"))
    assert loaded.summary_projector.weight.is_meta and loaded.fingerprint == saved[1].fingerprint
    remove_hook_from_module(loaded, recurse=True)
    assert not loaded.summary_projector.weight.is_meta and loaded.fingerprint == saved[1].fingerprint


def test_unsaved_model_refuses_the_summary_of_another(processor):
    summary = tiny.tiny_fwd2bot(seed=1).compress(**processor.process_images(tiny.pictures(1)))
    with pytest.raises(ValueError, match="made by another model: its fingerprint"):
        tiny.tiny_fwd2bot().embed(summary=summary)


def test_summary_file_serves_another_process_of_the_same_model(saved, processor, tmp_path):
    folder, model = saved
    summary = model.compress(**processor.process_images(tiny.pictures(2)))
    summary.save_file(tmp_path / "summary.safetensors")
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, stage="generate")
    inputs = processor(text=tiny.prompts(processor, ["What?", "Why?"]))
    read = Fwd2BotSummary.load_file(tmp_path / "summary.safetensors")
    expected = model.generate_from_summary(summary, **inputs, **GREEDY)
    assert torch.equal(loaded.generate_from_summary(read, **inputs, **GREEDY), expected)


@pytest.mark.parametrize("asked_before", [True, False])
def test_copies_of_a_half_precision_model_keep_its_fingerprint_until_they_change(saved, asked_before):
    model = Fwd2BotForConditionalGeneration.from_pretrained(saved[0], dtype=torch.bfloat16)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        if asked_before:
            assert again.fingerprint == model.fingerprint == saved[1].fingerprint
        with torch.no_grad():
            again.summary_projector.bias.add_(1)
        assert again.fingerprint != model.fingerprint


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # accelerate: logit_scale is no module
def test_offloaded_model_compresses_and_knows_its_fingerprint(saved, processor, tmp_path):
    folder, model = saved
    parts = {"backbone": "disk", "summary_projector": "cpu", "logit_scale": "cpu"}
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(folder, device_map=parts, offload_folder=tmp_path)
    images = processor.process_images(tiny.pictures(2))
    summary = loaded.compress(**images)
    assert torch.equal(summary.tokens, model.compress(**images).tokens)
    assert summary.metadata["fingerprint"] == model.fingerprint


def test_weights_that_are_elsewhere_have_no_fingerprint():
    for elsewhere in (torch.empty(2, device="meta"), torch.empty(0)):
        with pytest.raises(ValueError, match="'w' are not in this process"):
            weights_fingerprint({"w": elsewhere})
