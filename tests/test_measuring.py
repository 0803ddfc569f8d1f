"""What the benchmarks of speed measure with: opponents that are the bare models, memory, and figures by hand."""

import argparse
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "measuring.py"


@pytest.fixture(scope="module")
def measuring():
    return runpy.run_path(str(SCRIPT))


def test_bare_backbone_is_the_one_that_was_wrapped(measuring, shared_fwd2bot, tiny_processor):
    images = tiny_processor.process_images(tiny.pictures(2))
    with torch.no_grad():
        found = measuring["bare_backbone"](shared_fwd2bot)(**images).logits
        assert torch.equal(found, tiny.tiny_backbone()(**images).logits)


def test_bare_language_model_is_that_of_the_backbone(measuring, shared_fwd2bot, tiny_processor):
    words = tiny_processor(text=["What is it?"])
    with torch.no_grad():
        found = measuring["bare_language_model"](shared_fwd2bot)(**words).logits
        assert torch.equal(found, tiny.tiny_backbone()(**words).logits)


def test_floor_of_answering_runs_the_loop_of_the_backbone(measuring, shared_fwd2bot, tiny_processor):
    """The same tokens from the same kind of cache, and logits of as many positions."""
    words = tiny_processor(text=["What is it?", "Why?"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    floor = measuring["bare_language_model"](shared_fwd2bot)
    shapes = []
    floor.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.logits.shape[:2])))
    found = floor.generate(**words, **options)
    expected = shared_fwd2bot.generate_uncompressed(**words, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert type(found.past_key_values) is type(expected.past_key_values)
    assert floor.dtype == shared_fwd2bot.dtype
    assert shapes == [(2, 1)] * 4


def test_stages_are_loaded_as_their_processes_load_them(measuring, shared_fwd2bot):
    alone, whole = measuring["stages_of"](shared_fwd2bot, "compress", None)
    assert (alone.stage, alone.adapters_merged) == ("compress", True)
    assert (whole.stage, whole.adapters_merged) == (None, False)


def test_stages_upon_a_copy_of_the_backbone_are_the_same(measuring, shared_fwd2bot, tiny_processor, tmp_path):
    """As they are made on an accelerator."""
    shared_fwd2bot.save_pretrained(tmp_path, adapter_only=True)
    compress = measuring["upon_backbone"](tmp_path, "compress", shared_fwd2bot)
    text = measuring["upon_backbone"](tmp_path, "text", shared_fwd2bot)
    assert (compress.stage, compress.adapters_merged) == ("compress", True)
    assert (text.stage, text.adapters_merged) == ("text", False)
    [loaded] = measuring["stages_of"](shared_fwd2bot, "compress")
    inputs = tiny_processor.process_texts(["What is it?"])
    assert torch.equal(compress.embed(**inputs), loaded.embed(**inputs))


def test_model_of_a_size_is_made_in_the_dtype_that_was_asked_for(measuring):
    one = {"num_hidden_layers": 1}
    model, _, side = measuring["load"]("small", 4, dtype=torch.bfloat16, vision=one, text=one)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32  # as from_pretrained leaves it
    up = [value for name, value in model.named_parameters() if ".lora_B." in name]
    assert up and all(value.any() for value in up)
    assert (side, model.config.num_summary_tokens) == (224, 4)


def test_peak_of_memory_counts_what_is_alive_at_once(measuring):
    def run():
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        third = torch.zeros(500)
        return second.sum() + third.sum()

    assert 12_000 <= measuring["peak_memory"](run) < 13_000


def test_runs_take_turns_and_are_warmed_up(measuring):
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    seconds = measuring["interleaved"](runs, 3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_over_repetitions(measuring):
    assert measuring["ratio"]({"one": [2.0, 9.0, 3.0], "other": [1.0, 3.0, 3.0]}, "one", "other") == 2.0


@pytest.mark.parametrize(
    "function, values",
    [("draw", {"a": ([1, 8], [2.0, 3.0])}), ("draw_parts", {"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}})],
)
def test_figures_are_drawn_where_that_is_asked_for(measuring, tmp_path, function, values):
    args = argparse.Namespace(size="tiny", dtype="float32", device="cpu", plot=None)
    units = ("pictures", "ms") if function == "draw" else ("s",)
    measuring[function](args, values, *units)
    args.plot = tmp_path / "figure.png"
    measuring[function](args, values, *units)
    with Image.open(args.plot) as figure:
        assert figure.format == "PNG"
        assert len(figure.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize("power", [0, 1, 2])
def test_exponent_of_growth(measuring, power):
    sizes = [1, 4, 16]
    assert measuring["exponent"](sizes, [5 * size**power for size in sizes]) == pytest.approx(power)
