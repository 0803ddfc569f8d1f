"""Batches of samples: what goes into the chunks, which pairs are negatives, and what the models make of them."""

import random

import pytest
import tiny
import torch
from tiny_sources import mixture_of, picture_bytes, write_captions, write_images, write_json, write_llava

from fwd2bot import Fwd2BotProcessor
from fwd2bot.losses_fwd2bot import different_content
from fwd2bot.training.source_recipe import SourceRecipe, SourcesData
from fwd2bot.training.sources import (
    ConversationEncoder,
    SamplePreparer,
    SourceBackboneCollator,
    SourceCollator,
    content_hash,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def prepare(samples, **fields):
    """Samples as a reader gives them, prepared."""
    uses = {sample["source"]: sample.pop("use", "both") for sample in samples}
    sources = [SourceRecipe(name=name, format="captions", path="x", use=use) for name, use in uses.items()]
    preparer = SamplePreparer(SourcesData(sources=sources, **fields), ConversationEncoder(tiny.tiny_processor()))
    return [preparer(sample, random.Random(0)) for sample in samples]


def sample(images, messages=None, captions=(), negatives=(), **fields):
    return {
        "images": list(images),
        "messages": messages,
        "captions": list(captions),
        "negatives": list(negatives),
        "source": "s",
        "key": "k",
    } | fields


def talk(answer, images=1, turns=1):
    turn = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    shown = {"role": "user", "content": [{"type": "image"}] * images + turn[0]["content"]}
    return [shown, turn[1], *turn * (turns - 1)]


@pytest.mark.parametrize(
    ("use", "limit", "contrastive", "learnt"),
    [
        ("both", 20, "short", "a caption of many words"),
        ("both", None, None, None),  # either to both
        ("ar", 20, [], "any"),
        ("contrastive", 20, "short", None),
    ],
)
def test_captions_go_to_the_losses_by_their_length_and_the_sources_use(use, limit, contrastive, learnt):
    captions = ["short", "a caption of many words"]  # a token a byte
    [one] = prepare([sample(picture_bytes(1), captions=captions, use=use)], contrastive_max_tokens=limit)
    told = None if one["messages"] is None else one["messages"][1]["content"][0]["text"]
    if limit is None:
        assert one["captions"][0] in captions and told in captions
    elif use == "ar":
        assert one["captions"] == [] and told in captions
    else:
        assert one["captions"] == [contrastive] and told == learnt
    if told is not None:
        assert one["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "Describe the image."}]


def test_sample_of_which_nothing_is_for_its_use_is_none():
    [one] = prepare([sample(picture_bytes(1), captions=["long" * 9], use="contrastive")], contrastive_max_tokens=9)
    assert one is None


def test_pictures_of_turns_that_are_left_out_are_left_out():
    messages = [*talk("A dog"), *talk("word " * 80)]
    [one] = prepare([sample(picture_bytes(2), messages)], max_length=100)
    assert len(one["images"]) == 1 and one["messages"] == messages[:2]


def test_large_picture_is_scaled_down_by_its_longer_side():
    [one] = prepare([sample(picture_bytes(1), captions=["a"])], max_image_side=16)
    assert one["images"][0].size == (11, 16)


def test_chunks_texts_and_rows_of_pictures():
    one, two, three = picture_bytes(3)
    samples = prepare(
        [
            sample([one, two], talk("A long answer with words", images=2)),
            sample([three], captions=["a caption"], negatives=["no caption at all"]),
            sample([], talk("Words", images=0)),
            sample([one], talk("A dog"), captions=["dog"]),
        ]
    )
    batch = SourceCollator(tiny.tiny_processor(), chunk_size=2)(samples)
    # in the order of length: the one without conversation, words alone | a dog, the long answer
    first, second = batch["chunks"]
    assert len(first["compress_input_ids"]) == 1 and len(first["input_ids"]) == 1
    assert first["placeholder_image"].tolist() == []
    assert len(second["compress_input_ids"]) == 3 and second["placeholder_image"].tolist() == [0, 1, 2]
    groups = [content_hash(samples[n]["images"][i]) for n, i in ((1, 0), (3, 0), (0, 0), (0, 1))]
    assert batch["image_group"].tolist() == groups
    texts = [content_hash(text) for text in ("dog", "a caption", "no caption at all")]
    assert batch["text_group"].tolist() == texts
    assert batch["text_image"].tolist() == [1, 0, -1]
    assert [len(chunk["input_ids"]) for chunk in batch["text_chunks"]] == [2, 1]
    assert batch["text_image_mask"].shape == (4, 3)
    # "dog" is told of `one`, which the long answer shows, too
    assert batch["text_image_mask"].tolist() == [
        [True, False, True],
        [False, True, True],
        [False, True, True],
        [True, True, True],
    ]


def test_one_chunk_without_chunk_size_and_no_texts_where_none_are_wanted():
    samples = prepare([sample([one], talk("A"), captions=["a"]) for one in picture_bytes(3)])
    batch = SourceCollator(tiny.tiny_processor(), with_texts=False)(samples)
    assert len(batch["chunks"]) == 1 and batch["text_chunks"] == []
    assert batch["text_image"].shape == (0,) and batch["text_image_mask"].shape == (3, 0)


def test_conversation_points_past_pictures_without_one():
    samples = prepare(
        [sample([one], captions=["x"]) for one in picture_bytes(2)] + [sample(picture_bytes(1), talk("A"))]
    )
    [chunk] = SourceCollator(tiny.tiny_processor())(samples)["chunks"]
    assert chunk["placeholder_image"].tolist() == [2] and len(chunk["compress_input_ids"]) == 3


def test_mask_of_two_processes_that_meet_is_that_of_one():
    """Pictures P, P, Q with captions c1, c2, c2, of which the first is on a process of its own."""
    one, other = picture_bytes(2)
    samples = prepare(
        [sample([image], captions=[text]) for image, text in ((one, "a dog"), (one, "a cat"), (other, "a cat"))]
    )
    collator = SourceCollator(tiny.tiny_processor())
    whole = collator(samples)
    assert whole["text_image_mask"].tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    parts = [collator(samples[:1]), collator(samples[1:])]
    text_image = torch.cat([parts[0]["text_image"], parts[1]["text_image"] + 1])
    groups = [torch.cat([part[name] for part in parts]) for name in ("text_group", "image_group")]
    met = torch.block_diag(*[~part["text_image_mask"] for part in parts]) == 0
    assert torch.equal(met & different_content(text_image, *groups), whole["text_image_mask"])


def test_hash_is_that_of_the_content():
    one, other = tiny.pictures(2)
    assert content_hash(one) == content_hash(one.copy()) != content_hash(other)
    assert content_hash("A  dog\n") == content_hash("a dog") != content_hash("a cat")
    assert content_hash("a dog") == -4081912340589182210  # little-endian `printf 'a dog' | b2sum -l 64`


def test_loss_of_a_fwd2bot_on_the_chunks_is_that_of_the_flat_batch(tmp_path, shared_fwd2bot):
    """With one placeholder per image, in order, a chunk and the texts are the arguments of forward()."""
    processor = tiny.tiny_processor()
    mixture = mixture_of(write_captions(tmp_path), length=4, contrastive_max_tokens=20)
    batch = SourceCollator(processor)([mixture[position] for position in range(4)])
    [chunk], [texts] = batch["chunks"], batch["text_chunks"]
    assert chunk.pop("placeholder_image").tolist() == [0, 1, 2, 3]
    output = shared_fwd2bot(
        **chunk,
        **{f"text_{name}": value for name, value in texts.items()},
        text_image=batch["text_image"],
        text_image_mask=batch["text_image_mask"],
        num_summary_tokens=4,
    )
    assert torch.isfinite(output.autoregressive_loss) and torch.isfinite(output.contrastive_loss)


def test_plain_backbone_takes_rows_with_and_without_pictures_in_one_batch(tmp_path):
    images = write_images(tmp_path / "images", 3)
    rows = [
        {"image": images[:2], "conversations": [
            {"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "Two"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"image": images[2], "conversations": [
            {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "One"}]},
    ]  # fmt: skip
    path = write_json(tmp_path / "mixed.jsonl", rows)
    recipe = SourceRecipe(name="mixed", format="llava", path=path, images=str(tmp_path / "images"), use="ar")
    mixture = mixture_of(recipe, length=3)
    samples = sorted((mixture[position] for position in range(3)), key=lambda one: one["key"])
    processor = Fwd2BotProcessor(tiny.tiny_backbone_processor())
    batch = SourceBackboneCollator(processor)(samples)
    assert batch["pixel_values"].shape == (3, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    told = [processor.tokenizer.decode(row[row != -100], skip_special_tokens=False) for row in batch["labels"]]
    assert told == [" Two</s>", " Hello</s>", " One</s>"]
    assert ((batch["labels"] == -100) | (batch["labels"] == batch["input_ids"])).all()
    assert torch.isfinite(tiny.tiny_backbone()(**batch).loss)


def test_llava_rows_reach_the_chunks(tmp_path):
    mixture = mixture_of(write_llava(tmp_path), length=4)
    batch = SourceCollator(tiny.tiny_processor())([mixture[position] for position in range(4)])
    assert batch["text_chunks"] == [] and len(batch["chunks"][0]["input_ids"]) == 4
