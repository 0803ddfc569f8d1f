"""Construction, `forward` with the laws that hold for them (1 and 10)."""

import copy
import hashlib
import pickle
import re

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from fwd2bot import Fwd2BotConfig, Fwd2BotForConditionalGeneration
from fwd2bot.losses_fwd2bot import contrastive_loss
from fwd2bot.summary_fwd2bot import pool_summary

TEXTS = ["a dog", "two cats on a hill", "nothing"]


# Construction


def test_from_backbone_changes_no_file_of_the_backbone(tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path)
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()}
    model = Fwd2BotForConditionalGeneration.from_backbone(tmp_path, num_summary_tokens=2, lora_rank=2)
    assert model.config.backbone_name_or_path == str(tmp_path)
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.iterdir()} == before


def test_from_backbone_changes_no_weight_of_the_backbone():
    original = tiny.tiny_backbone().state_dict()
    wrapped = {
        name.removeprefix("backbone.").replace(".base_layer", ""): value
        for name, value in tiny.tiny_fwd2bot().state_dict().items()
    }
    assert all(torch.equal(value, wrapped[name]) for name, value in original.items())


def test_backbone_in_bfloat16_equals_the_original_with_adapters_off(processor, tmp_path):
    tiny.tiny_backbone().save_pretrained(tmp_path)
    original, backbone = (
        LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16) for _ in range(2)
    )
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    images = processor.process_images(tiny.pictures(2)).to(torch.bfloat16)
    assert torch.equal(model.backbone(**images).logits, original(**images).logits)


def test_untrained_adapters_leave_the_answer_alone(processor):
    backbone, model = tiny.tiny_backbone(), Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone())
    ids = processor(text="<s>Hello")["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, backbone(input_ids=ids).logits)


def test_from_backbone_refuses_a_model_that_reads_no_images():
    config = tiny.tiny_backbone().config.text_config
    with pytest.raises(TypeError, match="LlamaForCausalLM is no vision-language model"):
        Fwd2BotForConditionalGeneration.from_backbone(LlamaForCausalLM(config))


def test_from_backbone_refuses_a_backbone_that_is_wrapped_already():
    backbone = tiny.tiny_backbone()
    Fwd2BotForConditionalGeneration.from_backbone(backbone)
    with pytest.raises(ValueError, match="carries LoRA adapters already"):
        Fwd2BotForConditionalGeneration.from_backbone(backbone)


def test_from_backbone_refuses_a_backbone_with_weights_missing(tmp_path):
    backbone = tiny.tiny_backbone()
    state = {name: value for name, value in backbone.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    backbone.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"missing \(1\).*layers.1.mlp.up_proj"):
        Fwd2BotForConditionalGeneration.from_backbone(tmp_path)


def test_from_backbone_refuses_unknown_settings():
    with pytest.raises(ValueError, match="'summary_tokens'"):
        Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), summary_tokens=3)


def test_wrapping_warns_of_nothing(recwarn):
    tiny.tiny_fwd2bot()
    assert [str(warning.message) for warning in recwarn] == []


def test_model_without_backbone_config_is_refused():
    with pytest.raises(ValueError, match="no backbone_config and no adapters.*from_backbone"):
        Fwd2BotForConditionalGeneration(Fwd2BotConfig())


def test_unknown_stage_is_refused():
    config = tiny.tiny_fwd2bot().config
    with pytest.raises(ValueError, match="stage='vision' is unknown; choose None"):
        Fwd2BotForConditionalGeneration(config, stage="vision")


@pytest.mark.parametrize("tied", [False, True])
def test_queries_are_no_words_that_can_be_generated(tied):
    backbone = tiny.tiny_backbone(tie_word_embeddings=tied)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, len(tiny.tiny_tokenizer()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copied_model_gives_the_same_and_stands_alone(tiny_fwd2bot, processor, duplicate):
    images = processor.process_images(tiny.pictures(2))
    expected = tiny_fwd2bot.compress(**images).tokens
    twin = duplicate(tiny_fwd2bot)  # of a model that has run, with the hooks that transformers gave it
    torch.testing.assert_close(duplicate(twin).compress(**images).tokens, expected)
    assert torch.equal(tiny_fwd2bot.compress(**images).tokens, expected)
    with torch.no_grad():
        for parameter in tiny_fwd2bot.parameters():
            parameter.zero_()
    assert torch.equal(twin.compress(**images).tokens, expected)
    assert twin.mark_trainable().keys() == tiny_fwd2bot.mark_trainable().keys()


# forward


def test_forward_of_a_generation_step_is_the_backbone_under_its_adapter(tiny_fwd2bot, processor):
    inputs = processor(text=["<s>USER: Hello", "<s>Hi"])
    output = tiny_fwd2bot(**inputs, labels=inputs["input_ids"])
    assert output.summary is None
    assert output.loss is output.autoregressive_loss
    assert output.logits.shape == (*inputs["input_ids"].shape, 260)


def test_forward_returns_a_tuple_where_it_is_asked_for_one(tiny_fwd2bot, processor):
    for inputs in (tiny.training_batch(processor), processor(text=["What?"])):
        expected = tiny_fwd2bot(**inputs).to_tuple()
        found = tiny_fwd2bot(**inputs, return_dict=False)
        assert isinstance(found, tuple) and len(found) == len(expected) > 1
        assert torch.equal(found[0], expected[0])


def test_autoregressive_loss_is_the_cross_entropy_of_answers_behind_the_summary(tiny_fwd2bot, processor):
    batch = tiny.training_batch(processor, count=1)
    output = tiny_fwd2bot(**batch, num_summary_tokens=2)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    [place] = (ids == processor.image_token_id).nonzero().flatten().tolist()
    embedding = tiny_fwd2bot.get_input_embeddings()
    by_hand = torch.cat([embedding(ids[:place]), output.summary.tokens[0], embedding(ids[place + 1 :])])
    logits = tiny_fwd2bot(inputs_embeds=by_hand[None]).logits[0]
    answer = labels[labels != -100]
    expected = F.cross_entropy(logits[-len(answer) - 1 : -1], answer)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits[0], logits, atol=1e-5, rtol=0)


def test_loss_is_the_weighted_sum_of_both(processor):
    model = tiny.tiny_fwd2bot(autoregressive_loss_weight=0.5, contrastive_loss_weight=3.0)
    output = model(**tiny.training_batch(processor, TEXTS))
    torch.testing.assert_close(output.loss, 0.5 * output.autoregressive_loss + 3 * output.contrastive_loss)


def test_contrastive_loss_is_that_of_both_embeddings(tiny_fwd2bot, processor):
    batch = tiny.training_batch(processor, TEXTS)
    output = tiny_fwd2bot(**batch, num_summary_tokens=2)
    images = tiny_fwd2bot.embed(**processor.process_images(tiny.pictures(3)), num_summary_tokens=2)
    texts = tiny_fwd2bot.embed(**processor.process_texts(TEXTS), num_summary_tokens=2)
    torch.testing.assert_close(output.image_embeds, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, texts, atol=1e-5, rtol=0)
    expected = contrastive_loss(images, texts, torch.tensor(1 / 0.07), torch.arange(3))
    torch.testing.assert_close(output.contrastive_loss, expected, atol=1e-4, rtol=0)


def test_contrastive_loss_is_averaged_over_the_lengths_in_training(processor):
    model = tiny.tiny_fwd2bot(summary_lengths=[2, 4]).train()
    torch.manual_seed(0)  # draws 4 for at least one picture
    output = model(**tiny.training_batch(processor, TEXTS))
    assert output.summary.num_summary_tokens == 4
    images = model._compress_pass(4, **processor.process_images(tiny.pictures(3)))
    texts = model._compress_pass(4, **processor.process_texts(TEXTS))
    scale, own = torch.tensor(1 / 0.07), torch.arange(3)
    losses = [contrastive_loss(pool_summary(images, k), pool_summary(texts, k), scale, own) for k in (2, 4)]
    torch.testing.assert_close(output.contrastive_loss, torch.stack(losses).mean(), atol=1e-4, rtol=0)


def test_captions_and_hard_negatives_of_given_owners(tiny_fwd2bot, processor):
    batch = tiny.training_batch(processor, texts=["a", "b", "c", "not a"])
    batch |= {"text_image": torch.tensor([1, 0, 2, -1]), "text_image_mask": torch.ones(3, 4, dtype=torch.bool)}
    output = tiny_fwd2bot(**batch)
    scale = tiny_fwd2bot.logit_scale.exp()
    expected = contrastive_loss(output.image_embeds, output.text_embeds, scale, batch["text_image"])
    torch.testing.assert_close(output.contrastive_loss, expected)


def test_number_of_captions_other_than_images_wants_owners(tiny_fwd2bot, processor):
    with pytest.raises(ValueError, match=r"4 text\(s\) came with 3 image\(s\). Give one for each, or"):
        tiny_fwd2bot(**tiny.training_batch(processor, texts=["a", "b", "c", "d"]))


def test_lengths_are_drawn_per_picture_in_training_and_cover_the_configured(processor):
    model = tiny.tiny_fwd2bot(summary_lengths=[1, 3]).train()
    torch.manual_seed(0)
    batch = tiny.training_batch(processor)
    drawn = [model(**batch).summary.lengths.tolist() for _ in range(6)]
    assert {length for lengths in drawn for length in lengths} == {1, 3}
    assert any(len(set(lengths)) == 2 for lengths in drawn)


def test_length_is_the_given_or_the_largest_in_evaluation(tiny_fwd2bot, processor):
    batch = tiny.training_batch(processor, TEXTS)
    assert tiny_fwd2bot(**batch).summary.lengths.tolist() == [4, 4, 4]
    assert tiny_fwd2bot.train()(**batch, num_summary_tokens=3).summary.lengths.tolist() == [3, 3, 3]


def test_drawn_lengths_equal_given_lengths(processor):
    """A batch of mixed lengths gives each row what it gets alone."""
    model = tiny.tiny_fwd2bot(summary_lengths=[1, 3]).train()
    batch = tiny.training_batch(processor)
    torch.manual_seed(0)
    mixed = model(**batch)
    assert sorted(set(mixed.summary.lengths.tolist())) == [1, 3]
    for index, length in enumerate(mixed.summary.lengths.tolist()):
        rows = {key: value[index : index + 1] for key, value in batch.items()}
        alone = model(**rows, num_summary_tokens=length)
        answer = alone.logits[0, -3:]
        torch.testing.assert_close(mixed.logits[index, -3:], answer, atol=1e-5, rtol=0)


def test_forward_prints_both_counts_before_any_compute(tiny_fwd2bot, processor, monkeypatch):
    monkeypatch.setattr(type(tiny_fwd2bot), "_compress_pass", None)  # calling it would be a TypeError
    batch = tiny.training_batch(processor, TEXTS)
    batch |= {name: value[:2] for name, value in batch.items() if name.startswith("compress_")}
    with pytest.raises(ValueError, match="3 image placeholder.*but 2 image"):
        tiny_fwd2bot(**batch)


def test_forward_refuses_unknown_arguments(tiny_fwd2bot, processor):
    with pytest.raises(TypeError, match="text_image_maks"):
        tiny_fwd2bot(**tiny.training_batch(processor, TEXTS), text_image_maks=None)


def test_forward_refuses_captions_without_images(tiny_fwd2bot, processor):
    texts = {f"text_{key}": value for key, value in processor.process_texts(TEXTS).items()}
    with pytest.raises(ValueError, match="need images"):
        tiny_fwd2bot(**texts)


@pytest.mark.parametrize("name", ["labels", "segment_ids"])
@pytest.mark.parametrize("part", [slice(0, 1), (slice(None), slice(1, None))], ids=["one row", "shorter rows"])
def test_forward_refuses_labels_and_segments_of_another_shape(tiny_fwd2bot, processor, monkeypatch, name, part):
    monkeypatch.setattr(tiny_fwd2bot, "_compress_pass", None)  # one row of labels would be learnt by all
    batch = tiny.training_batch(processor)
    values = torch.zeros_like(batch["input_ids"])[part]
    shapes = rf"{name} must have the shape of input_ids, \(3, \d+\), got {re.escape(str(tuple(values.shape)))}"
    with pytest.raises(ValueError, match=shapes):
        tiny_fwd2bot(**{**batch, name: values})


def test_forward_refuses_owners_without_captions_and_nothing_at_all(tiny_fwd2bot, processor):
    with pytest.raises(ValueError, match="give text_input_ids as well"):
        tiny_fwd2bot(**tiny.training_batch(processor), text_image=torch.arange(3))
    with pytest.raises(ValueError, match="nothing to read"):
        tiny_fwd2bot()


def test_temperature_is_clamped_and_can_move_back(processor):
    model = tiny.tiny_fwd2bot(min_temperature=0.05)
    with torch.no_grad():
        model.logit_scale.fill_(100.0)
    output = model(**tiny.training_batch(processor, TEXTS))
    assert model.logit_scale.exp().item() == pytest.approx(20)
    output.loss.backward()
    assert model.logit_scale.grad.abs() > 0
