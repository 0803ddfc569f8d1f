"""Chats about a few pictures: the model reads their summaries once, and answers as if it read all anew."""

import pytest
import torch
from families.tiny_families import build as build_family
from transformers import pipeline
from transformers.generation.streamers import BaseStreamer

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.pipelines.store import SummaryStore

QUESTIONS = ("Where?", "Why is it there?", "What else?")
SHORT = {"max_new_tokens": 6, "do_sample": False}
IDS = ["p3", "p1"]


@pytest.fixture
def computed(vivid_fwd2bot):
    """A list that grows by the number of tokens of every pass through the decoder."""
    lengths = []
    hook = (
        vivid_fwd2bot.get_decoder()
        .layers[0]
        .register_forward_pre_hook(lambda layer, inputs: lengths.append(inputs[0].shape[1]))
    )
    yield lengths
    hook.remove()


@pytest.fixture
def words(tiny_processor):
    """A `prefix_allowed_tokens_fn` whose answers are a space and letters, which the tokenizer makes of them again."""
    vocabulary = tiny_processor.tokenizer.get_vocab()
    colon, letters = vocabulary[":"], [vocabulary[letter] for letter in "abcdefgh"]
    return lambda row, ids: [vocabulary["Ġ"]] if ids[-1] == colon else letters


def without_cache(pipe, chat, **options):
    """The answer to the last question of a chat, from the whole conversation at once."""
    ids = [picture["id"] for picture in chat.pictures]
    return pipe(chat.messages[:-1], ids=ids, **options)["answer"]


def test_answers_are_those_without_the_cache(rag):
    chat = rag.chat(ids=IDS)
    for turn, question in enumerate(QUESTIONS):
        result = chat.ask(question, **SHORT)
        assert result["answer"] == without_cache(rag, chat, **SHORT)
        assert (result["tokens"]["cached"] > 0) == (turn > 0)


def test_only_new_tokens_are_computed(rag, words, computed):
    chat = rag.chat(ids=IDS)
    first = chat.ask(QUESTIONS[0], **SHORT, prefix_allowed_tokens_fn=words)
    assert computed == [first["tokens"]["prompt"], 1, 1, 1, 1, 1]
    computed.clear()
    second = chat.ask(QUESTIONS[1], **SHORT, prefix_allowed_tokens_fn=words)
    assert second["tokens"]["cached"] == first["tokens"]["prompt"] + 5  # the last of six new ids was not read
    assert computed == [second["tokens"]["prompt"] - second["tokens"]["cached"], 1, 1, 1, 1, 1]
    assert second["answer"] == without_cache(rag, chat, **SHORT, prefix_allowed_tokens_fn=words)


def test_answer_that_is_tokenized_otherwise_is_read_anew_and_the_summaries_are_not(rag, computed):
    chat = rag.chat(ids=IDS)
    first = chat.ask(QUESTIONS[0], **SHORT)  # without the space that the template puts before an answer
    computed.clear()
    second = chat.ask(QUESTIONS[1], **SHORT)
    assert second["tokens"]["cached"] == first["tokens"]["prompt"]
    assert computed[0] == second["tokens"]["prompt"] - first["tokens"]["prompt"]


def test_conversation_that_does_not_begin_with_what_was_read_is_read_anew(rag, words, computed):
    chat = rag.chat(ids=IDS)
    chat.ask(QUESTIONS[0], **SHORT, prefix_allowed_tokens_fn=words)
    chat.messages[0] = {"role": "user", "content": [{"type": "text", "text": "Whose?"}]}
    computed.clear()
    result = chat.ask(QUESTIONS[1], **SHORT)
    assert result["tokens"]["cached"] < result["tokens"]["prompt"] - len("Whose?")
    assert computed[0] == result["tokens"]["prompt"] - result["tokens"]["cached"]
    assert result["answer"] == without_cache(rag, chat, **SHORT)


def test_cache_that_cannot_be_cut_is_not_used(tmp_path):
    backbone, processor = build_family("gemma3")  # with a layer that sees 12 tokens
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=4, lora_rank=2)
    processor = Fwd2BotProcessor(processor)
    store = SummaryStore.create(tmp_path / "store", model, processor)
    tokens = torch.randn(2, 4, store.config.width, generator=torch.Generator().manual_seed(0))
    store.add_summary(tokens, ids=["a", "b"])
    pipe = pipeline("fwd2bot-rag", model=model, processor=processor, store=store, device="cpu")
    chat, cached = pipe.chat(ids=["a", "b"]), []
    for question in QUESTIONS:
        cached.append(chat.ask(question, **SHORT)["tokens"]["cached"])
        assert chat.messages[-1]["content"][0]["text"] == without_cache(pipe, chat, **SHORT)
    assert 0 in cached[1:]


def test_chat_is_about_the_pictures_that_its_query_finds(rag, picture_store):
    chat = rag.chat("a dog", top_k=2, where="year < 2005", num_summary_tokens=3)
    hits = picture_store.search("a dog", top_k=2, where="year < 2005")
    assert chat.pictures == [{"number": number, **hit} for number, hit in enumerate(hits, 1)]
    result = chat.ask(QUESTIONS[0], **SHORT)
    ids = [hit["id"] for hit in hits]
    assert result["answer"] == rag(QUESTIONS[0], ids=ids, num_summary_tokens=3, **SHORT)["answer"]
    assert result["seconds"]["retrieve"] > 0
    assert chat.ask(QUESTIONS[1], **SHORT)["seconds"]["retrieve"] == 0


def test_chats_do_not_share_their_caches(rag):
    one, other = rag.chat(ids=IDS), rag.chat(ids=["p0"])
    for question in QUESTIONS:
        for chat in (one, other):
            assert chat.ask(question, **SHORT)["answer"] == without_cache(rag, chat, **SHORT)


def test_interrupted_answer_leaves_the_chat_as_it_was(rag):
    class Stop(BaseStreamer):
        def put(self, value):
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self):
            raise AssertionError("the answer was not interrupted")

    chat = rag.chat(ids=IDS)
    chat.ask(QUESTIONS[0], **SHORT)
    messages = list(chat.messages)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTIONS[1], streamer=Stop(), **SHORT)
    assert chat.messages == messages
    result = chat.ask(QUESTIONS[2], **SHORT)
    assert result["answer"] == without_cache(rag, chat, **SHORT)
    assert len(chat.messages) == 4


def test_conversation_longer_than_the_model_reads_is_an_error(rag):
    chat = rag.chat(ids=IDS)
    chat.ask(QUESTIONS[0], **SHORT)
    with pytest.raises(ValueError, match="2 summaries and all that was said.*at most 512.*in a chat, begin a new one"):
        chat.ask("What? " * 80, **SHORT)
    assert chat.ask(QUESTIONS[1], **SHORT)["answer"] == without_cache(rag, chat, **SHORT)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"question": ""}, ValueError, "question is empty"),
        ({"question": [{"role": "user", "content": "Where?"}]}, TypeError, "one question after the other"),
        ({"num_beams": 2}, ValueError, "Leave out num_beams"),
        ({"use_cache": False}, ValueError, "use_cache cannot be chosen"),
        ({"top_k": 2}, ValueError, "top_k cannot be chosen"),
        ({"fallback": "image"}, ValueError, "fallback cannot be chosen"),
        ({"no_such": 1}, TypeError, "no argument 'no_such'"),
    ],
)
def test_what_a_chat_cannot_have_is_refused(rag, options, error, message):
    with pytest.raises(error, match=message):
        rag.chat(ids=IDS).ask(**{"question": QUESTIONS[0], **options})


@pytest.mark.parametrize("given", [{}, {"query": "a dog", "ids": IDS}])
def test_chat_needs_either_query_or_ids(rag, given):
    with pytest.raises(ValueError, match="Give query or ids, got"):
        rag.chat(**given)
