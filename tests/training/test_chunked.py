"""The step over a batch in chunks has the gradient of the whole batch (law 6), on one process."""

import random

import chunked_batches as made
import pytest
import tiny
import torch

from fwd2bot.generation_fwd2bot import take_prefixed
from fwd2bot.training.chunked import ChunkedStep, as_batch, count_labels

EXACT = {"atol": 1e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def processor(tiny_processor):
    return tiny_processor


def training_model(**options):
    return tiny.tiny_fwd2bot(**options).train()


def without_conversations(chunk: dict) -> dict:
    return {name: value for name, value in chunk.items() if name.startswith("compress_")}


def without_talk(collated: dict) -> dict:
    return collated | {"chunks": [without_conversations(chunk) for chunk in collated["chunks"]]}


def drawn_lengths(model, images: int, seed: str = "") -> torch.Tensor:
    return torch.tensor(random.Random(seed).choices(model.config.summary_lengths, k=images))


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def chunked(model, collated):
    labels = max(int(count_labels(collated)), 1)
    losses = ChunkedStep(model)(as_batch(collated), labels, backward=lambda loss: loss.backward())
    return losses, gradients(model)


def whole(model, collated, lengths=None):
    images = sum(len(chunk["compress_input_ids"]) for chunk in collated["chunks"])
    loss = made.joined(model, collated, drawn_lengths(model, images) if lengths is None else lengths)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize(("chunk", "text_chunk"), [(1, 1), (2, 3), (4, 7), (6, 7)])
def test_chunked_gradient_is_that_of_the_whole_batch(processor, chunk, text_chunk, loss):
    model = training_model(summary_lengths=[1, 2, 4], contrastive_loss=loss)
    collated = made.batch(processor, chunk=chunk, text_chunk=text_chunk)
    expected_loss, expected = whole(model, collated)
    losses, found = chunked(model, collated)
    torch.testing.assert_close(losses.total, expected_loss, **EXACT)
    assert_same(found, expected, **EXACT)
    assert all(value.abs().max() > 0 for value in found.values())
    assert found.keys() == model.trained_parameters().keys()


def test_chunks_of_any_size_give_the_gradient_of_one_plain_forward(processor):
    """Against `forward` itself, on all images and texts at once."""
    model = training_model(summary_lengths=[4])
    images = processor.process_images(tiny.pictures(4))
    texts = processor.process_texts(made.CAPTIONS[:4])
    flat = {f"compress_{name}": value for name, value in images.items()}
    flat |= {f"text_{name}": value for name, value in texts.items()}
    model(**flat, num_summary_tokens=4).loss.backward()
    expected = gradients(model)
    cut = {
        "chunks": [{f"compress_{name}": value[i : i + 1] for name, value in images.items()} for i in range(4)],
        "text_chunks": [{name: value[i : i + 2] for name, value in texts.items()} for i in (0, 2)],
        "text_image": torch.arange(4),
    }
    found = chunked(model, cut)[1]
    assert_same(found, expected, **EXACT)
    assert_same(chunked(model, flat)[1], expected, **EXACT)


def test_one_chunk_runs_the_model_once_for_images_and_once_for_texts(processor, monkeypatch):
    model = training_model()
    calls = []
    monkeypatch.setattr(model, "_compress_pass", _counted(model._compress_pass, calls))
    chunked(model, made.batch(processor, chunk=6, text_chunk=7))
    assert len(calls) == 2
    calls.clear()
    chunked(model, made.batch(processor, chunk=3, text_chunk=7))
    assert len(calls) == 6  # two chunks and the texts, each twice


def _counted(function, calls):
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def test_dropout_is_the_same_in_both_passes(processor):
    """What a replay must give: each chunk with the masks of its first pass."""
    lora = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.3}
    model = training_model(adapters={"compress": lora, "generate": lora})
    collated = without_talk(made.batch(processor))  # the generate pass draws masks of its own, in between
    torch.manual_seed(3)
    embeds = {"text": [], "image": []}
    for kind, inputs in [("text", c) for c in collated["text_chunks"]] + [("image", c) for c in collated["chunks"]]:
        given = inputs if kind == "image" else {f"compress_{name}": value for name, value in inputs.items()}
        ones = torch.ones(len(given["compress_input_ids"]), dtype=torch.long)
        embeds[kind].append(model(**given, num_summary_tokens=ones).image_embeds_by_length)
    sides = [torch.cat(embeds[kind], 1) for kind in ("image", "text")]
    model.contrastive_loss(*sides, collated["text_image"], collated["text_image_mask"]).backward()
    expected = gradients(model)
    torch.manual_seed(3)
    assert_same(chunked(model, collated)[1], expected, **EXACT)
    torch.manual_seed(4)
    other = chunked(model, collated)[1]
    assert any(not torch.allclose(other[name], expected[name], **EXACT) for name in expected)


def test_batches_of_one_step_add_up_to_the_gradient_of_their_mean(processor):
    model = training_model(summary_lengths=[2])
    parts = [made.batch(processor, images=4), made.batch(processor, images=2, chunk=1, texts=2)]
    labels = sum(count_labels(part) for part in parts)
    for part in parts:
        ChunkedStep(model)(as_batch(part), labels, share=0.5, backward=lambda loss: loss.backward())
    found = gradients(model)
    total = 0
    for part in parts:
        lengths = torch.full((sum(as_batch(part).images),), 2)
        autoregressive = made.joined(model, {"chunks": part["chunks"], "text_chunks": []}, lengths)
        contrastive = made.joined(model, part, lengths) - autoregressive
        total = total + autoregressive * count_labels(part) / labels + contrastive / 2
    total.backward()
    assert_same(found, gradients(model), **EXACT)


def test_batch_without_texts_trains_the_autoregressive_loss_alone(processor):
    model = training_model()
    collated = made.batch(processor, texts=0)
    expected = whole(model, collated)[1]
    losses, found = chunked(model, collated)
    assert losses.contrastive is None
    assert_same(found, expected, **EXACT)
    assert "logit_scale" not in found


def test_batch_without_conversations_trains_the_contrastive_loss_alone(processor):
    model = training_model()
    losses, found = chunked(model, without_talk(made.batch(processor)))
    assert losses.autoregressive == 0
    assert losses.contrastive > 0
    assert not any(".generate" in name for name in found)


def test_equal_captions_and_pictures_are_no_negatives(processor):
    """Two pictures with equal captions: with their hashes it is as if the mask had said so."""
    model = training_model(summary_lengths=[4])
    collated = made.batch(processor, images=3, texts=3, chunk=3)
    del collated["text_image_mask"]
    groups = {"text_group": torch.tensor([5, 9, 5]), "image_group": torch.tensor([1, 2, 3])}
    found = chunked(model, collated | groups)[0].contrastive
    mask = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    expected = chunked(model, collated | {"text_image_mask": mask})[0].contrastive
    assert torch.equal(found, expected)
    assert not torch.equal(found, chunked(model, collated)[0].contrastive)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_picture_without_a_text_is_no_negative(processor, loss):
    """Two pictures with captions and one that is only spoken of: the contrastive loss is that of the two."""
    model = training_model(summary_lengths=[4], contrastive_loss=loss)
    expected, of_two = chunked(model, without_talk(made.batch(processor, images=2, texts=2, chunk=1)))
    found, of_three = chunked(model, without_talk(made.batch(processor, images=3, texts=2, chunk=1)))
    torch.testing.assert_close(found.contrastive, expected.contrastive, **EXACT)
    assert_same(of_three, of_two, **EXACT)


def test_hard_negative_stands_against_the_pictures_with_texts_alone(processor):
    model = training_model(summary_lengths=[4])
    side = made.text_side(processor, made.CAPTIONS[:3], images=2, text_chunk=3)
    expected = chunked(model, without_talk(made.batch(processor, images=2, chunk=2)) | side)[0].contrastive
    wide = side | {"text_image_mask": torch.cat([side["text_image_mask"], torch.ones(1, 3, dtype=torch.bool)])}
    found = chunked(model, without_talk(made.batch(processor, images=3, chunk=3)) | wide)[0].contrastive
    torch.testing.assert_close(found, expected, **EXACT)
    plain = chunked(model, without_talk(made.batch(processor, images=2, texts=2, chunk=2)))[0].contrastive
    assert not torch.allclose(found, plain, **EXACT)


def test_checkpointed_chunks_have_the_same_gradient(processor):
    model = training_model()
    collated = made.batch(processor)
    expected = chunked(model, collated)[1]
    tiny.enable_checkpointing(model)
    assert_same(chunked(model, collated)[1], expected, **EXACT)


def test_evaluation_needs_no_gradient_and_is_at_the_configured_length(processor):
    model = tiny.tiny_fwd2bot()
    collated = made.batch(processor)
    losses = ChunkedStep(model)(as_batch(collated), count_labels(collated))
    assert not losses.total.requires_grad
    images = torch.cat([model.embed(**take_prefixed(chunk, "compress_")) for chunk in collated["chunks"]])
    texts = torch.cat([model.embed(**chunk) for chunk in collated["text_chunks"]])
    expected = model.contrastive_loss(images[None], texts[None], collated["text_image"], collated["text_image_mask"])
    torch.testing.assert_close(losses.contrastive, expected.detach(), **EXACT)


@pytest.mark.slow
def test_batch_of_1024_in_small_chunks_has_the_gradient_of_large_ones(processor):
    model = training_model(summary_lengths=[1, 4])
    images = processor.process_images(tiny.pictures(1024))
    texts = processor.process_texts([f"caption {number}" for number in range(1024)])

    def cut(size: int) -> dict:
        places = range(0, 1024, size)
        return {
            "chunks": [{f"compress_{name}": value[i : i + size] for name, value in images.items()} for i in places],
            "text_chunks": [{name: value[i : i + size] for name, value in texts.items()} for i in places],
            "text_image": torch.arange(1024),
        }

    assert_same(chunked(model, cut(16))[1], chunked(model, cut(512))[1], **EXACT)


def test_lengths_do_not_depend_on_the_order_of_known_images():
    step = ChunkedStep(training_model(summary_lengths=[1, 2, 4]))
    groups = torch.arange(40)
    lengths = step._draw_lengths("a", torch.tensor([40]), groups)
    assert set(lengths.tolist()) == {1, 2, 4}
    assert torch.equal(step._draw_lengths("a", torch.tensor([40]), groups.flip(0)), lengths.flip(0))
    assert not torch.equal(step._draw_lengths("b", torch.tensor([40]), groups), lengths)
