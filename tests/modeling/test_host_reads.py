"""How often the host waits for values of tensors: on an accelerator each time empties its queue of work."""

import sys

import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode

READS = {
    *("item", "tolist", "equal", "allclose", "nonzero", "argwhere", "cpu", "numpy", "unique", "masked_select"),
    *("repeat_interleave", "bincount", "__int__", "__bool__", "__float__", "__index__", "__contains__"),
}


class HostReads(TorchFunctionMode):
    """Counts the values that code of this package reads, by where; those of torch and transformers are their own."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        reads = function.__name__ in READS
        if function.__name__ == "equal":  # of other shapes it is known without their values
            reads = args[0].shape == args[1].shape
        if function.__name__ == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            reads = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in index)
        if function.__name__ == "where":
            reads = len(args) == 1
        if function.__name__ == "to":
            reads = "cpu" in [one for one in args[1:] if isinstance(one, str)]  # a device is that of the model here
        frame = sys._getframe(1)
        while frame.f_globals["__name__"].startswith("torch."):
            frame = frame.f_back
        if reads and frame.f_globals["__name__"].startswith("fwd2bot."):
            self.places.append(f"{frame.f_globals['__name__']}:{frame.f_lineno} {function.__name__}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model():
    model = tiny.tiny_fwd2bot()
    assert model.fingerprint  # of the weights, read once as long as they stay as they are
    return model


def places(function, *args, **kwargs) -> list[str]:
    with HostReads() as reads:
        function(*args, **kwargs)
    return reads.places


def test_compressing_reads_what_it_checks_once_and_nothing_after_the_pass(model, tiny_processor):
    images = tiny_processor.process_images(tiny.pictures(3))
    found = places(model.compress, **images)
    assert len(found) == 2, found  # the ids with their mask, and the pixels


def test_texts_are_read_once_more_for_image_tokens_and_for_nan(model, tiny_processor):
    texts = tiny_processor.process_texts(["a dog", "two cats"])
    found = places(model.embed, **texts)
    assert len(found) == 3, found


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("words", [1, 6])
def test_an_answer_reads_before_it_begins_and_not_in_its_steps(model, tiny_processor, k, words):
    summary = model.compress(**tiny_processor.process_images(tiny.pictures(3))).truncate(k)
    prompts = tiny_processor(text=tiny.prompts(tiny_processor, ["What?", "Where is it?", "Why?"]))
    options = {"max_new_tokens": words, "min_new_tokens": words, "do_sample": False}
    found = places(model.generate_from_summary, summary, **prompts, **options)
    # ids with mask, the summary, placeholders, lengths of the rows; at k=1 also whether the rows stay where they are
    assert len(found) == (5 if k == 1 else 4), found


def test_lengths_that_are_all_the_same_are_never_read(model, tiny_processor):
    summary = model.compress(**tiny_processor.process_images(tiny.pictures(3)))

    def use():
        summary[0], summary[1:], list(summary)
        type(summary).cat([summary, summary])
        summary.truncate(1)
        summary.tokens = summary.tokens
        return summary.num_summary_tokens, summary.min_summary_tokens

    assert places(use) == []


def test_other_lengths_are_those_that_were_given(model, tiny_processor):
    summary = model.compress(**tiny_processor.process_images(tiny.pictures(3)))
    k = summary.num_summary_tokens
    mixed = type(summary).cat([summary[[0, 1]], summary[[2]].truncate(1)])
    assert (mixed.min_summary_tokens, mixed.num_summary_tokens) == (1, k)
    assert mixed[[1, 2]].lengths.tolist() == [k, 1] and mixed[2].tokens.shape[1] == 1
    mixed.lengths[0] = 1  # a copy: the summary keeps its own
    given = torch.tensor([k, 2, 1])
    other = type(summary)(summary.tokens, given)
    given[:] = 1
    assert mixed.lengths.tolist() == [k, k, 1] and other.lengths.tolist() == [k, 2, 1]
