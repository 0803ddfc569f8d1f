"""The last layer at the positions that are read: the same results, from fewer of its rows."""

import copy
import pickle
import threading
from abc import ABC

import pytest
import tiny
import torch
from torch import nn

from fwd2bot.last_positions_fwd2bot import LastPositions, install_last_positions, only_last_positions
from fwd2bot.mixed_in_fwd2bot import RUNNING, mix_in

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    """Do not change it."""
    return tiny.tiny_fwd2bot()


@pytest.fixture
def seen(model):
    """Positions that each feed-forward part computed, layer by layer."""
    counts = []
    handles = [
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, output: counts.append(output.shape[1]))
        for layer in model.get_decoder().layers
    ]
    yield counts
    for handle in handles:
        handle.remove()


def test_summary_equals_that_of_the_whole_layer(model, images):
    with torch.enable_grad():  # with gradients the layer is computed whole
        expected = model._compress_pass(3, **images)
    torch.testing.assert_close(model.compress(**images, num_summary_tokens=3).tokens, expected, **CLOSE)


def test_compress_pass_computes_the_last_layer_at_the_queries_alone(model, images, seen):
    model.compress(**images, num_summary_tokens=3)
    length = images["input_ids"].shape[1] + 3
    assert seen == [length, 3]


def test_training_computes_the_whole_layer(model, images, seen):
    model._compress_pass(3, **images)
    length = images["input_ids"].shape[1] + 3
    assert seen == [length, length]


def test_prefill_computes_the_last_layer_at_the_last_position_alone(model, processor, images, seen):
    summary = model.compress(**images)
    seen.clear()
    prompts = processor(text=tiny.prompts(processor, ["What?", "Why is it?", "Who?"]))
    model.generate_from_summary(summary, **prompts, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    length = prompts["input_ids"].shape[1] - 1 + summary.num_summary_tokens
    assert seen == [length, 1, 1, 1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_first_logits_equal_those_of_the_whole_layer(processor, attention):
    model = tiny.tiny_fwd2bot()
    model.set_attn_implementation(attention)
    words = processor(text=["What is it?", "a"])
    with torch.no_grad():
        whole = model(**words).logits[:, -1:]
        torch.testing.assert_close(model(**words, logits_to_keep=1).logits, whole, **CLOSE)


def test_hidden_states_that_are_asked_for_are_whole(model, processor):
    words = processor(text=["What is it?"])
    with torch.no_grad():
        expected = model(**words, output_hidden_states=True).hidden_states[-1]
        found = model(**words, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    assert torch.equal(found, expected)


def test_attentions_that_are_asked_for_are_whole(processor):
    model = tiny.tiny_fwd2bot()
    model.set_attn_implementation("eager")
    words = processor(text=["What is it?"])
    with torch.no_grad():
        expected = model(**words, output_attentions=True).attentions[-1]
        model.backbone.config.output_attentions = model.get_decoder().config.output_attentions = True
        found = model(**words, logits_to_keep=1).attentions[-1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("part", ["backbone", "text", "decoder"])
def test_hidden_states_that_a_config_asks_for_are_whole(processor, part):
    model = tiny.tiny_fwd2bot()
    words = processor(text=["What is it?"])
    with torch.no_grad():
        expected = model(**words, output_hidden_states=True).hidden_states[-1]
    config = {
        "backbone": model.backbone.config,
        "text": model.config.get_text_config(),
        "decoder": model.get_decoder().config,
    }[part]
    config.output_hidden_states = True
    with torch.no_grad():
        output = model(**words, logits_to_keep=1)
    assert output.hidden_states is None or torch.equal(output.hidden_states[-1], expected)


def test_training_mode_computes_all_positions_without_gradients_too(processor, images):
    model = tiny.tiny_fwd2bot().train()
    counts = []
    model.get_decoder().layers[-1].mlp.register_forward_hook(
        lambda module, inputs, output: counts.append(output.shape)
    )
    with torch.no_grad():
        model._compress_pass(3, **images)
    assert counts[0][1] == images["input_ids"].shape[1] + 3


def test_other_threads_compute_all_positions(model, processor, seen):
    words = processor(text=["What is it?"])

    def run():
        with torch.no_grad():
            model(**words)

    with torch.no_grad(), only_last_positions(1):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen == [words["input_ids"].shape[1]] * 2


def test_part_that_returns_more_than_its_output_keeps_the_rest():
    class Experts(nn.Module):
        def forward(self, x):
            return x + 1, "where they went"

    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Module()])
    decoder.layers[0].mlp = Experts()
    decoder.eval()
    install_last_positions(decoder)
    with torch.no_grad(), only_last_positions(1):
        output, rest = decoder.layers[0].mlp(torch.ones(1, 3, 2))
    assert output.tolist() == [[[0, 0], [0, 0], [2, 2]]]
    assert rest == "where they went"


def test_part_that_lays_its_rows_one_below_the_other_keeps_them_so():
    class Flat(nn.Module):
        def forward(self, x):
            return x.flatten(0, 1) + 1

    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Module()])
    decoder.layers[0].mlp = Flat()
    decoder.eval()
    install_last_positions(decoder)
    with torch.no_grad(), only_last_positions(1):
        output = decoder.layers[0].mlp(torch.arange(6.0).view(2, 3, 1))
    assert output.flatten().tolist() == [0, 0, 3, 0, 0, 6]
    assert output.shape == (6, 1)


def test_part_of_more_dimensions_is_padded_along_the_positions():
    class Heads(nn.Module):
        def forward(self, x):
            return x.unflatten(-1, (2, 1))

    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Module()])
    decoder.layers[0].mlp = Heads()
    decoder.eval()
    install_last_positions(decoder)
    with torch.no_grad(), only_last_positions(1):
        output = decoder.layers[0].mlp(torch.ones(1, 3, 2))
    assert output.shape == (1, 3, 2, 1)
    assert output[0, :, 0, 0].tolist() == [0, 0, 1]


def test_decoder_of_another_make_is_left_alone():
    decoder = nn.Sequential(nn.Linear(2, 2))
    install_last_positions(decoder)
    with torch.no_grad(), only_last_positions(1):
        assert decoder(torch.ones(1, 3, 2)).shape == (1, 3, 2)


class Counted(nn.Linear):
    """A module that says itself what a copy of it holds."""

    def __getstate__(self):
        return {**self.__dict__, "copies": getattr(self, "copies", 0) + 1}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copy_of_a_changed_module_is_what_the_module_says(duplicate):
    module = Counted(2, 2)
    mix_in(LastPositions, module)
    twin = duplicate(duplicate(module))
    assert type(twin) is type(module)
    assert twin.copies == 2
    assert torch.equal(twin.weight, module.weight)


def test_nested_passes_and_errors_leave_what_ran_before():
    with torch.no_grad(), only_last_positions(2):
        with pytest.raises(ZeroDivisionError), only_last_positions(1):
            assert RUNNING.last == 1
            raise ZeroDivisionError
        assert RUNNING.last == 2
        with torch.enable_grad(), only_last_positions(1):
            assert RUNNING.last is None
        assert RUNNING.last == 2
    assert RUNNING.last is None


class Abstract(ABC, nn.Linear):
    """Laid out otherwise in memory than a subclass with a mixin in front."""


def test_part_that_cannot_change_class_stays_as_it_is():
    decoder = nn.Module()
    decoder.layers = nn.ModuleList([nn.Module()])
    decoder.layers[0].mlp = Abstract(2, 2)
    install_last_positions(decoder)
    rows = torch.ones(1, 3, 2)
    with torch.no_grad(), only_last_positions(1):
        assert decoder.layers[0].mlp(rows)[:, 0].any()
