"""`summary_norm=False`: summaries are projected from before the language model's final norm; nothing else changes."""

import pickle

import pytest
import tiny
import torch

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.final_norm_fwd2bot import install_final_norm
from fwd2bot.mixed_in_fwd2bot import RUNNING

GREEDY = {"max_new_tokens": 5, "do_sample": False}
CLOSE = {"rtol": 0, "atol": 1e-5}
from_pretrained = Fwd2BotForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_fwd2bot(summary_norm=False)


def before_the_norm(model, inputs, k):
    """The projected states at the queries as the final norm of the usual model receives them."""
    seen = []
    watch = model.get_decoder().norm.register_forward_pre_hook(lambda norm, given: seen.append(given[0]))
    model.compress(**inputs, num_summary_tokens=k)
    watch.remove()
    return model.summary_projector(seen[0][:, -k:]).detach()


@pytest.mark.parametrize("what", ["pictures", "texts"])
def test_summary_is_projected_from_before_the_norm(model, processor, images, what):
    usual = tiny.tiny_fwd2bot()
    inputs = images if what == "pictures" else processor.process_texts(["a", "a longer text"])
    tokens = model.compress(**inputs, num_summary_tokens=3).tokens
    torch.testing.assert_close(tokens, before_the_norm(usual, inputs, 3), **CLOSE)
    assert not torch.allclose(tokens, usual.compress(**inputs, num_summary_tokens=3).tokens, atol=1e-3)
    assert RUNNING.without_norm is False


def test_norm_makes_the_usual_summary_of_it(images):
    before, usual = tiny.tiny_fwd2bot(summary_norm=False), tiny.tiny_fwd2bot()
    for one in (before, usual):
        torch.nn.init.eye_(one.summary_projector.weight)
        torch.nn.init.uniform_(one.get_decoder().norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    tokens = before.compress(**images).tokens
    torch.testing.assert_close(before.get_decoder().norm(tokens), usual.compress(**images).tokens, **CLOSE)


def test_answers_go_through_the_norm(model, processor, images, prompts):
    usual = tiny.tiny_fwd2bot()
    tokens = usual.compress(**images).tokens
    inputs = processor(text=prompts)
    found, expected = (one.generate_from_summary(tokens, **inputs, **GREEDY) for one in (model, usual))
    assert torch.equal(found, expected)


def test_losses_train_what_makes_the_summary(processor, prompts):
    model = tiny.tiny_fwd2bot(summary_norm=False)
    model.mark_trainable()
    batch = processor(text=prompts, images=tiny.pictures(3))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    still = [name for name, p in model.trained_parameters().items() if p.grad is None or not p.grad.any()]
    assert still == ["logit_scale"]  # of the contrastive loss


@pytest.mark.parametrize("stage", [None, "compress"])
def test_checkpoints_keep_it(model, images, tmp_path, stage):
    expected = model.compress(**images).tokens
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, stage=stage)
    assert loaded.config.summary_norm is False
    torch.testing.assert_close(loaded.compress(**images).tokens, expected, **CLOSE)
    again = pickle.loads(pickle.dumps(loaded))
    torch.testing.assert_close(again.compress(**images).tokens, expected, **CLOSE)


def test_compiled_compress_pass_leaves_it_out_too(model, processor):
    texts = processor.process_texts(["a"])
    with torch.no_grad():
        expected = model._compress_pass(2, **texts)
        compiled = torch.compile(model._compress_pass, backend="eager")(2, **texts)
    torch.compiler.reset()
    torch.testing.assert_close(compiled, expected, **CLOSE)


def test_language_model_without_such_a_norm_is_named():
    with pytest.raises(
        ValueError, match="whose final norm is its `norm`; Linear has none. Leave summary_norm at True"
    ):
        install_final_norm(torch.nn.Linear(2, 2))
