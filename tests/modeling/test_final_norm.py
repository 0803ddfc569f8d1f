"""`summary_norm=False`: summaries are projected from before the language model's final norm; nothing else changes."""

import pickle

import pytest
import tiny
import torch

from fwd2bot import Fwd2BotConfig, Fwd2BotForConditionalGeneration
from fwd2bot.final_norm_fwd2bot import install_final_norm
from fwd2bot.mixed_in_fwd2bot import RUNNING, during

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


def test_answers_go_through_the_norm(processor, images, prompts):
    usual, before = tiny.tiny_fwd2bot(), tiny.tiny_fwd2bot(summary_norm=False)
    for one in (usual, before):
        torch.nn.init.uniform_(one.get_decoder().norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    tokens = usual.compress(**images).tokens
    inputs = processor(text=prompts)

    def logits(one):
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        return one.generate_from_summary(tokens, **inputs, **options).logits[0]

    torch.testing.assert_close(logits(before), logits(usual), **CLOSE)
    with during(without_norm=True):
        assert not torch.allclose(logits(before), logits(usual), atol=0.1)


@pytest.mark.parametrize("when", ["before", "after"])
def test_norm_with_a_forward_of_its_own_is_left_out_too(model, images, when):
    """As kernels of transformers and others put one there."""
    backbone = tiny.tiny_backbone()

    def replace(norm):
        usual = type(norm).forward
        norm.forward = lambda states: usual(norm, states)

    if when == "before":
        replace(backbone.get_decoder().norm)
    options = {"num_summary_tokens": 4, "lora_rank": 4, "summary_norm": False}
    changed = Fwd2BotForConditionalGeneration.from_backbone(backbone, **options).eval()
    if when == "after":
        replace(changed.get_decoder().norm)
    changed.load_state_dict(model.state_dict())
    torch.testing.assert_close(changed.compress(**images).tokens, model.compress(**images).tokens, **CLOSE)


def test_losses_train_what_makes_the_summary(processor, prompts):
    model = tiny.tiny_fwd2bot(summary_norm=False)
    model.mark_trainable()
    batch = processor(text=prompts, images=tiny.pictures(3))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    still = [name for name, p in model.trained_parameters().items() if p.grad is None or not p.grad.any()]
    assert still == ["logit_scale"]  # of the contrastive loss


@pytest.mark.parametrize("stage", [None, "compress"])
def test_checkpoints_keep_it(model, processor, images, tmp_path, stage):
    expected = model.compress(**images).tokens
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapters", adapter_only=True)
    model.merge_and_export("compress", tmp_path / "merged", processor)
    for folder, options in (("full", {}), ("adapters", {"backbone": tiny.tiny_backbone()}), ("merged", {})):
        loaded = from_pretrained(tmp_path / folder, stage=stage, **options)
        assert loaded.config.summary_norm is False
        torch.testing.assert_close(loaded.compress(**images).tokens, expected, **CLOSE)
        again = pickle.loads(pickle.dumps(loaded))
        torch.testing.assert_close(again.compress(**images).tokens, expected, **CLOSE)


@pytest.mark.parametrize("trained", [True, False])
def test_it_cannot_be_chosen_in_loading(tmp_path, trained):
    model = tiny.tiny_fwd2bot(summary_norm=trained)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "adapters", adapter_only=True)
    message = f"summary_norm={not trained} cannot be chosen in loading: .* trained with {trained}"
    for folder, options in (("full", {}), ("adapters", {"backbone": tiny.tiny_backbone()})):
        with pytest.raises(ValueError, match=message):
            from_pretrained(tmp_path / folder, summary_norm=not trained, **options)
    config = Fwd2BotConfig.from_pretrained(tmp_path / "full")
    config.summary_norm = not trained
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "full", config=config)


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
