"""Training: what moves, by which gradient, and under transformers' Trainer (laws 5 and 6), and packed rows."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from fwd2bot import Fwd2BotForConditionalGeneration

TEXTS = ["a dog", "two cats on a hill", "nothing"]


# Law 5: what trains


def frozen_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("origin", ["from_backbone", "from_pretrained"])
def test_three_steps_move_what_trains_and_nothing_else(processor, tmp_path, origin):
    model = Fwd2BotForConditionalGeneration.from_backbone(tiny.tiny_backbone(), num_summary_tokens=4, lora_rank=2)
    if origin == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path)
    model.train()
    before = frozen_state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = tiny.training_batch(processor, TEXTS)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, num_summary_tokens=4).loss.backward()
        optimizer.step()
    moved = {name for name, value in frozen_state(model).items() if not torch.equal(value, before[name])}
    layers = [
        f"layers.{layer}.{part}"
        for layer in range(2)
        for part in (
            *(f"self_attn.{name}_proj" for name in "qkvo"),
            *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        )
    ]
    adapters = {
        f"backbone.model.language_model.{layer}.lora_{matrix}.{stage}.weight"
        for layer in layers
        for matrix in "AB"
        for stage in ("compress", "generate")
    }
    assert moved == adapters | {
        "backbone.model.language_model.embed_tokens.summary_queries",
        "summary_projector.weight",
        "summary_projector.bias",
        "logit_scale",
    }
    assert model.mark_trainable().keys() == moved


def test_optimiser_step_changes_the_fingerprint_even_in_evaluation_mode(tiny_fwd2bot, processor, tmp_path):
    tiny_fwd2bot.save_pretrained(tmp_path)
    saved = tiny_fwd2bot.fingerprint
    tiny_fwd2bot.eval()(**tiny.training_batch(processor, TEXTS)).loss.backward()
    assert tiny_fwd2bot.fingerprint == saved
    torch.optim.SGD(tiny_fwd2bot.mark_trainable().values(), lr=0.1).step()
    assert tiny_fwd2bot.fingerprint != saved


# Law 6: same gradient


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, num_summary_tokens=4).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"checkpoint_kwargs": {"use_reentrant": True}}])
def test_gradient_checkpointing_gives_the_same_gradient(tiny_fwd2bot, processor, options):
    tiny_fwd2bot.train()
    batch = tiny.training_batch(processor, TEXTS)
    expected = gradients(tiny_fwd2bot, batch)
    assert all(value.abs().max() > 0 for value in expected.values())
    tiny.enable_checkpointing(tiny_fwd2bot, **options)
    assert getattr(tiny_fwd2bot, f"is_{tiny.CHECKPOINTING}")
    for name, value in gradients(tiny_fwd2bot, batch).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_gradient_checkpointing_takes_no_gradients_in_the_vision_tower(tiny_fwd2bot, processor):
    tiny_fwd2bot.train()
    tiny.enable_checkpointing(tiny_fwd2bot)
    need = {"vision": set(), "words": set()}
    tower, words = tiny_fwd2bot.backbone.model.vision_tower, tiny_fwd2bot.get_input_embeddings()
    hooks = [
        tower.register_forward_hook(lambda _, inputs, output: need["vision"].add(output[0].requires_grad)),
        words.register_forward_hook(lambda _, inputs, output: need["words"].add(output.requires_grad)),
    ]
    gradients(tiny_fwd2bot, tiny.training_batch(processor, TEXTS))
    assert need == {"vision": {False}, "words": {True}}
    for hook in hooks:
        hook.remove()
    tiny_fwd2bot.disable_input_require_grads()
    tiny_fwd2bot.requires_grad_(False)
    assert not tiny_fwd2bot.get_input_embeddings()(torch.tensor([[5]])).requires_grad


def test_gradient_checkpointing_without_its_stage_is_not_the_same(tiny_fwd2bot, processor):
    """The test above can fail: the backbone's own checkpointing recomputes under no stage."""
    tiny_fwd2bot.train()
    batch = tiny.training_batch(processor, TEXTS)
    expected = gradients(tiny_fwd2bot, batch)
    tiny.enable_checkpointing(tiny_fwd2bot.backbone)
    try:
        found = gradients(tiny_fwd2bot, batch)
    except (torch.utils.checkpoint.CheckpointError, AttributeError):
        return  # torch saw that the recomputation saved other tensors
    assert not all(torch.allclose(value, expected[name], atol=1e-6, rtol=1e-5) for name, value in found.items())


class Rows(torch.utils.data.Dataset):
    """One training row, several times."""

    def __init__(self, processor, length):
        self.batch, self.length = tiny.training_batch(processor, TEXTS), length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {key: value[index % 3] for key, value in self.batch.items()}


class InOrder(Trainer):
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, processor, tmp_path, rows=3, **options) -> Trainer:
    options = {"max_steps": 1, "per_device_train_batch_size": 3, **options}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **options,
    )
    data = Rows(processor, rows)
    return InOrder(model, arguments, train_dataset=data, eval_dataset=data)


def test_trainer_with_gradient_checkpointing_takes_the_same_step(processor, tmp_path):
    trained = []
    for checkpointing in (False, True):
        model = tiny.tiny_fwd2bot(summary_lengths=[4])
        trainer(model, processor, tmp_path, **{tiny.CHECKPOINTING: checkpointing}).train()
        trained.append(model.trained_parameters())
    start = tiny.tiny_fwd2bot(summary_lengths=[4]).trained_parameters()
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-6, rtol=1e-5, msg=name)
    assert any(not torch.equal(value, start[name]) for name, value in trained[0].items())


def test_trainer_evaluates_and_gathers_tensors_only(tiny_fwd2bot, processor, tmp_path):
    run = trainer(tiny_fwd2bot, processor, tmp_path)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(
        tiny_fwd2bot.eval()(**tiny.training_batch(processor, TEXTS)).loss.item(), rel=1e-4
    )
    assert run.predict(run.eval_dataset).predictions is not None


def test_trainer_accumulation_averages_the_contrastive_loss(processor, tmp_path):
    """Two equal micro-batches make the step of one of them."""
    trained = []
    for accumulation in (1, 2):
        model = tiny.tiny_fwd2bot(summary_lengths=[4])
        trainer(model, processor, tmp_path, rows=6, gradient_accumulation_steps=accumulation).train()
        trained.append(model.trained_parameters())
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], atol=1e-5, rtol=1e-4, msg=name)


# Which image a placeholder shows


def test_images_in_several_placeholders_and_in_none_are_as_if_each_were_given_for_itself(tiny_fwd2bot, processor):
    asked = processor(text=tiny.prompts(processor, ["What?", "How many?", "Why?"]))
    images = processor.process_images(tiny.pictures(3))
    three = {f"compress_{name}": value for name, value in images.items()}
    found = tiny_fwd2bot(**asked, **three, placeholder_image=torch.tensor([2, 0, 2]), labels=asked["input_ids"])
    shown = {f"compress_{name}": value[[2, 0, 2]] for name, value in images.items()}
    expected = tiny_fwd2bot(**asked, **shown, labels=asked["input_ids"])
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    assert found.image_embeds.shape[0] == 3
    in_order = tiny_fwd2bot(**asked, **three, placeholder_image=torch.arange(3))
    assert torch.equal(in_order.logits, tiny_fwd2bot(**asked, **three).logits)


def test_conversation_of_words_alone_beside_images(tiny_fwd2bot, processor):
    asked = processor(text=[processor.apply_chat_template(tiny.conversation("Why?", 0), add_generation_prompt=True)])
    images = {f"compress_{name}": value for name, value in processor.process_images(tiny.pictures(2)).items()}
    found = tiny_fwd2bot(**asked, **images, placeholder_image=torch.zeros(0, dtype=torch.long))
    torch.testing.assert_close(found.logits, tiny_fwd2bot(**asked).logits, atol=1e-5, rtol=0)


def test_length_may_be_given_image_by_image(tiny_fwd2bot, processor):
    batch = tiny.training_batch(processor, TEXTS)
    found = tiny_fwd2bot(**batch, num_summary_tokens=torch.tensor([1, 4, 2]))
    assert found.summary.lengths.tolist() == [1, 4, 2]
    by_length = [tiny_fwd2bot(**batch, num_summary_tokens=k) for k in tiny_fwd2bot.config.summary_lengths]
    embeds = torch.stack([output.image_embeds for output in by_length])
    torch.testing.assert_close(found.image_embeds_by_length, embeds, atol=1e-6, rtol=0)
    mean = torch.stack([output.contrastive_loss for output in by_length]).mean()
    torch.testing.assert_close(found.contrastive_loss, mean)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"placeholder_image": torch.tensor([0, 1])}, ValueError, r"shape \(3,\), .*3 placeholder.*got \(2,\)"),
        ({"placeholder_image": torch.tensor([0, 1, 3])}, ValueError, r"rows of the 3 image\(s\), 0\.\.2, got"),
        ({"placeholder_image": torch.tensor([0, 1, -1])}, ValueError, r"got \[0, 1, -1\]"),
        ({"placeholder_image": torch.tensor([0.0, 1, 2])}, TypeError, "integers, got torch.float32"),
        ({"placeholder_image": torch.arange(3), "input_ids": None}, ValueError, "give those as well"),
        ({"num_summary_tokens": torch.tensor([1, 2])}, ValueError, r"3 integers in 1\.\.4, one for each image"),
        ({"num_summary_tokens": torch.tensor([1, 2, 5])}, ValueError, r"got \[1, 2, 5\]"),
    ],
)
def test_placeholder_images_and_lengths_that_do_not_fit_are_errors(tiny_fwd2bot, processor, given, error, message):
    with pytest.raises(error, match=message):
        tiny_fwd2bot(**{**tiny.training_batch(processor), **given})


# Packing


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_row_equals_separate_conversations(tiny_fwd2bot, processor, attention):
    tiny_fwd2bot.set_attn_implementation(attention)
    [question] = tiny.prompts(processor, ["X"])
    prefix = question[: question.index("<image>") + len("<image>")]
    rests = ["\nWhat? ASSISTANT: a dog</s>", "\nHow many? ASSISTANT: 3</s>", "\nWhy? ASSISTANT: because of it</s>"]
    pictures = tiny.pictures(2)
    compress = {f"compress_{key}": value for key, value in processor.process_images(pictures).items()}
    rows, segments = [], []
    for chosen in (rests, rests[1:]):
        ids = [processor(text=prefix)["input_ids"][0]]
        ids += [
            processor.tokenizer(rest, return_tensors="pt", add_special_tokens=False).input_ids[0] for rest in chosen
        ]
        rows.append(torch.cat(ids))
        segments.append(torch.cat([torch.full_like(part, number) for number, part in enumerate(ids)]))
    width = max(map(len, rows))
    left = [width - len(row) for row in rows]
    ids = torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(rows, left, strict=True)])
    segment_ids = torch.stack([F.pad(row, (pad, 0)) for row, pad in zip(segments, left, strict=True)])
    mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), (width - len(row), 0)) for row in rows])
    packed = tiny_fwd2bot(
        input_ids=ids, attention_mask=mask, segment_ids=segment_ids, num_summary_tokens=3, labels=ids, **compress
    )
    for index, chosen in enumerate((rests, rests[1:])):
        position = width - len(rows[index]) + (segments[index] == 0).sum() + 2  # 3 summary tokens for 1 placeholder
        one = {f"compress_{key}": value for key, value in processor.process_images(pictures[index]).items()}
        for rest in chosen:
            alone = tiny_fwd2bot(**processor(text=prefix + rest), num_summary_tokens=3, **one).logits[0]
            length = len(rest.replace("</s>", "s"))
            found = packed.logits[index, position : position + length]
            torch.testing.assert_close(found, alone[-length:], atol=1e-5, rtol=0)
            position += length
