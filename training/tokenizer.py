"""The tokenizer of the small backbone: byte-level BPE trained on the drawn world's texts."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"

# One turn reads "USER: <image>\nWhat is it? ASSISTANT: a dog</s>"; the tokenizer puts <s> in front of all. In a chat
# with several pictures each has its number, in the words that a question has for it:
# "USER: picture 1: <image> picture 2: <image>\nIs there a dog in picture 2? ASSISTANT: yes</s>".
CHAT_TEMPLATE = """\
{%- set seen = namespace(images=0, number=0) -%}
{%- for message in messages if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is string -%}{%- set content = [{'type': 'text', 'text': content}] -%}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}
{%- elif message['role'] != 'system' -%}
{{ raise_exception('unknown role ' + message['role'] + '; use system, user or assistant') }}
{%- endif -%}
{%- for part in content if part['type'] == 'image' -%}
{%- set seen.number = seen.number + 1 -%}
{%- if seen.images > 1 -%}{{ 'picture ' ~ seen.number ~ ': ' }}{%- endif -%}
{{ '<image>' }}{{ '\\n' if loop.last else ' ' }}
{%- endfor -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ eos_token if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 1024, model_max_length: int = 2048
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string has tokens, none is unknown, and text comes back byte for byte.

    Args:
        texts: what to learn the merges from.
        vocab_size: tokens in all, the 256 bytes and 4 special ones included.
        model_max_length: the longest prompt, in tokens.

    Raises ValueError if the vocabulary cannot hold the bytes and the special tokens.
    """
    special = [PAD, BOS, EOS, IMAGE]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too small; {len(alphabet)} bytes and {len(special)} special "
            f"tokens need at least {len(alphabet) + len(special)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_in_context(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _in_context(texts: Iterable[str]) -> Iterable[str]:
    """Each text as the template places it: after a line break, as a question, and after a space, as an answer."""
    for text in texts:
        yield f"USER: \n{text} ASSISTANT: {text}"
