"""What is learnt of a conversation, for the chat template of every family: the assistant's words and their end."""

import pytest
import torch

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.training.sources import ConversationEncoder, SourceBackboneCollator, SourceCollator, content_hash

from .tiny_families import FAMILIES, build, pictures

# Not ours to mend: transformers' GLM-4V processor hands a tensor to numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# How an answer ends: the token that the template writes after it, else the tokenizer's end token.
ENDS = {
    "llava": "</s>",
    "llava_next": "</s>",
    "mistral3": "</s>",
    "llava_onevision": "<|im_end|>",
    "qwen": "<|im_end|>",
    "internvl": "<|im_end|>",
    "lfm2": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "paligemma": "<eos>",
    "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
    "aya": "<|END_OF_TURN_TOKEN|>",
    "glm4v": "<|user|>",
}
# PaliGemma's own processor adds a line break that the template does not write, and makes labels of its own.
OWN_TEXT = {"paligemma", "paligemma2"}


def turn(role, text, images=0):
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


DIALOGUE = [
    turn("user", "What is in the pictures?", images=2),
    turn("assistant", "A dog; a cat."),
    turn("user", "Which is larger?"),
    turn("assistant", "The dog"),
]
ONE = [turn("user", "Where?", images=1), turn("assistant", "In the picture.")]
WORDS = [turn("user", "Hello"), turn("assistant", "the")]


def end_of(name):
    return ENDS[max((known for known in ENDS if name.startswith(known)), key=len)]


@pytest.fixture(params=sorted(FAMILIES))
def name(request):
    return request.param


@pytest.fixture
def family(name):
    backbone, processor = build(name)
    return backbone, Fwd2BotProcessor(processor)


def learnt(processor, ids, labels):
    """The learnt tokens as text; each is the input token at its own place."""
    ids, labels = torch.as_tensor(ids), torch.as_tensor(labels)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    return processor.tokenizer.decode(labels[chosen], skip_special_tokens=False)


def without_space(text):
    return "".join(text.split())


def prepared(encoder, messages, images):
    encoded = encoder(messages)
    return {
        "images": images,
        "image_groups": [content_hash(image) for image in images],
        "text": encoded.text,
        "input_ids": encoded.input_ids,
        "labels": encoded.labels,
        "captions": [],
        "negatives": [],
    }


def batch_of_samples(encoder):
    shown = pictures()
    return [
        prepared(encoder, DIALOGUE, shown[:2]),
        prepared(encoder, WORDS, []),
        prepared(encoder, ONE, shown[2:3]),
    ]


def test_assistant_turns_and_their_end_tokens_are_learnt_and_nothing_else(name, family):
    _, processor = family
    encoded = ConversationEncoder(processor)(DIALOGUE)
    end = end_of(name)
    told = learnt(processor, encoded.input_ids, encoded.labels)
    assert without_space(told) == without_space(f"A dog; a cat.{end}The dog{end}")
    assert encoded.input_ids.count(processor.image_token_id) == 2


def test_prompt_before_the_first_learnt_token_is_that_of_generation(family):
    _, processor = family
    encoded = ConversationEncoder(processor)(ONE)
    first = next(index for index, label in enumerate(encoded.labels) if label != -100)
    prompt = processor(text=processor.apply_chat_template(ONE[:1], add_generation_prompt=True))["input_ids"][0]
    assert encoded.input_ids[:first] == prompt.tolist()


def test_chunks_of_a_batch_go_through_the_model_and_their_labels_are_the_answers(name, family):
    backbone, processor = family
    torch.manual_seed(0)
    model = Fwd2BotForConditionalGeneration.from_backbone(backbone, num_summary_tokens=2, lora_rank=2).train()
    samples = batch_of_samples(ConversationEncoder(processor))
    batch = SourceCollator(processor, chunk_size=2)(samples)
    end, told = end_of(name), []
    assert [len(chunk["input_ids"]) for chunk in batch["chunks"]] == [2, 1]
    for chunk in batch["chunks"]:
        assert chunk.pop("placeholder_image").tolist() == list(range(len(chunk["compress_input_ids"])))
        told += [learnt(processor, *row) for row in zip(chunk["input_ids"], chunk["labels"], strict=True)]
        output = model(**chunk, num_summary_tokens=2)
        assert torch.isfinite(output.loss)
    expected = ["the" + end, "In the picture." + end, f"A dog; a cat.{end}The dog{end}"]
    assert list(map(without_space, told)) == list(map(without_space, expected))


def test_plain_backbone_learns_the_same_words_after_its_own_image_tokens(name, family):
    backbone, processor = family
    samples = batch_of_samples(ConversationEncoder(processor))
    collate = SourceBackboneCollator(processor)
    if name in OWN_TEXT:
        with pytest.raises(ValueError, match="PaliGemmaProcessor does not write the words of the chat template"):
            collate(samples[:1])
        return
    end = end_of(name)
    expected = [f"A dog; a cat.{end}The dog{end}", "the" + end, "In the picture." + end]
    for chosen in ([0, 2], [1]):  # with pictures, and words alone
        batch = collate([samples[index] for index in chosen])
        told = [learnt(processor, *row) for row in zip(batch["input_ids"], batch["labels"], strict=True)]
        assert list(map(without_space, told)) == [without_space(expected[index]) for index in chosen]
        with torch.no_grad():
            assert torch.isfinite(backbone(**batch).loss)
