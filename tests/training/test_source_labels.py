"""Which tokens of a conversation are learnt: templates with and without `{% generation %}`, and ones that are refused.

Templates of all families: tests/families/test_family_labels.py.
"""

import pytest
import tiny

from fwd2bot.training.sources import ConversationEncoder, MalformedRowError

PART = "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
LOOP = "{% for message in messages %}"
PARTS = "{% for part in message['content'] %}" + PART + "{% endfor %}"
# As llava-hf/llava-1.5-7b-hf has it: images first, `{% generation %}`, and no end token.
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MARKED = (
    LOOP + "[{{ message['role'] }}]{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'][0]['text'] }}</s>{% endgeneration %}{% else %}" + PARTS + "{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
END_OUTSIDE = MARKED.replace("</s>{% endgeneration %}", "{% endgeneration %}</s>")
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def user(text, images=0):
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


TALK = [user("What?", 1), assistant("A dog"), user("Why?"), assistant(" the A dog\n")]


def encoder(template=None):
    processor = tiny.tiny_processor()
    if template is not None:
        processor.chat_template = template
    return ConversationEncoder(processor)


def learnt(one, encoded):
    return one.tokenizer.decode([label for label in encoded.labels if label != -100], skip_special_tokens=False)


@pytest.mark.parametrize("template", [MARKED, END_OUTSIDE, UNMARKED])
def test_same_words_are_learnt_with_and_without_marks_in_the_template(template):
    one = encoder(template)
    assert learnt(one, one(TALK)) == "A dog</s>the A dog</s>"


def test_template_of_llava_15_gets_the_end_tokens_that_it_leaves_out():
    one = encoder(LLAVA_15)
    encoded = one(TALK)
    assert encoded.text == "USER: <image>\nWhat? ASSISTANT: A dog</s>USER: Why? ASSISTANT: the A dog</s>"
    assert learnt(one, encoded) == "A dog</s>the A dog</s>"


def test_tokens_are_those_of_the_whole_text(tiny_processor):
    one = encoder()
    encoded = one(TALK)
    whole = tiny_processor.apply_chat_template([*TALK[:3], assistant("the A dog")])
    assert encoded.text == whole
    assert encoded.input_ids == tiny_processor(text=whole)["input_ids"][0].tolist()


REFUSED = {
    "hides what was said before": LOOP
    + "{% if loop.last or message['role'] == 'user' %}[{{ message['role'] }}]"
    + PARTS
    + "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "writes another prompt than it shows": LOOP
    + "[{{ message['role'] }}]"
    + PARTS
    + "</s>{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}",
    "puts something before the answer": LOOP
    + "[{{ message['role'] }}]{% if message['role'] == 'assistant' %}<think></think>{% endif %}"
    + PARTS
    + "</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "changes the answer": UNMARKED.replace("['text'] }}</s>", "['text'] | upper }}</s>"),
}


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED.keys())
def test_template_that_does_not_show_what_the_assistant_says_is_refused_by_name(template):
    with pytest.raises(ValueError, match="the chat template of LlavaProcessor does not show what the assistant says"):
        encoder(template)


def test_marks_make_a_template_usable_that_writes_another_prompt():
    one = encoder(MARKED.replace("{% if add_generation_prompt %}[assistant]", "{% if add_generation_prompt %}[bot]"))
    assert learnt(one, one(TALK)) == "A dog</s>the A dog</s>"


def test_image_tokens_in_words_are_no_pictures():
    one = encoder()
    encoded = one([user("What is <image> here?", 1), assistant("An <image> mark")])
    assert encoded.input_ids.count(one.processor.image_token_id) == 1
    assert learnt(one, encoded).strip() == "An   mark</s>"


def test_empty_answer_is_malformed():
    with pytest.raises(MalformedRowError, match="an answer of the assistant is empty"):
        encoder()([user("What?"), assistant("  ")])


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_conversation_that_the_template_refuses_is_malformed(template):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    one = encoder(strict + template)
    with pytest.raises(MalformedRowError, match="the chat template of LlavaProcessor refuses it: no system turn"):
        one([{"role": "system", "content": [{"type": "text", "text": "Be brief"}]}, *TALK])


def test_long_conversation_loses_its_last_turns_and_a_long_first_turn_leaves_nothing():
    one = encoder()
    talk = [*TALK, user("And then?"), assistant("word " * 50)]
    messages, encoded = one.fitting(talk, 100)
    assert messages == TALK
    assert encoded == one(TALK)
    assert one.fitting(talk, len(one(TALK).input_ids) - 1)[0] == TALK[:2]
    assert one.fitting(talk, 10) is None
