import pytest

from fwd2bot.training.scenes import corpus
from fwd2bot.training.scenes.things import KINDS, plural
from fwd2bot.training.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(1500))


def test_any_text_comes_back_byte_for_byte(tokenizer):
    text = "Voilà: 3 œufs, 日本, \x07 and a tab\t; <b> 🦆"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None


def test_nouns_are_single_tokens(tokenizer):
    words = [word for kind in KINDS if " " not in kind for word in (kind, plural(kind))]
    assert [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) > 1] == []


def test_chat_template_writes_one_turn(tokenizer):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]},
        {"role": "assistant", "content": "yes"},
    ]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "USER: <image>\nIs there a dog? ASSISTANT:"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == prompt + " yes</s>"


def test_chat_template_numbers_the_pictures_of_a_chat_with_several(tokenizer):
    two = [{"type": "image"}] * 2
    messages = [
        {"role": "user", "content": [*two, {"type": "text", "text": "Which shows a dog?"}]},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "USER: picture 1: <image> picture 2: <image>\nWhich shows a dog? ASSISTANT: 2</s>"
        "USER: picture 3: <image>\nAnd this? ASSISTANT:"
    )


def test_start_token_comes_first_and_padding_before_it(tokenizer):
    ids = tokenizer(["a dog", "a small dog at the top"], padding=True)["input_ids"]
    assert ids[0][0] == tokenizer.pad_token_id
    assert ids[1][0] == tokenizer.bos_token_id


def test_unknown_role_is_an_error(tokenizer):
    with pytest.raises(Exception, match="unknown role teacher"):
        tokenizer.apply_chat_template([{"role": "teacher", "content": "x"}], tokenize=False)


def test_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="256 bytes"):
        train_tokenizer(["a dog"], vocab_size=100)
