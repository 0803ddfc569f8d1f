"""The model card of an exported checkpoint, written from the figures of its evaluation."""

from collections.abc import Iterable
from typing import Any

_HEADER = """\
---
library_name: transformers
license: apache-2.0
pipeline_tag: image-text-to-text
tags: [fwd2bot, token-compression, image-retrieval, visual-question-answering, sentence-transformers]
---
"""

_TEXT = """\
# fwd2bot-tiny

A small vision-language model that compresses a picture of {image_tokens} image tokens into 1 to {k_max} summary
tokens, and then finds the picture by a sentence and answers questions about it from those tokens alone. It is the
embedded default of the [`fwd2bot`](https://pypi.org/project/fwd2bot/) package: small enough to try everything on a
laptop in seconds.

**It knows drawn scenes, not photographs.** It was trained from nothing on 96x96 pictures of one to six drawn things
(68 kinds of emoji and 6 coloured shapes) on a plain field, and on simple English sentences about them. On a photo,
a chart or a page it will be wrong, without a warning. For real pictures, wrap a real backbone with
`Fwd2BotForConditionalGeneration.from_backbone`.

## Use

```python
from transformers import AutoModel, AutoProcessor

path = "path/to/this/folder"
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

summary = model.compress(**processor.process_images(["scene.png"]), num_summary_tokens=8)  # (1, 8, {width})
vectors = model.embed(summary=summary)                                                     # (1, {width}), unit norm
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "How many things are there?"}}]}}],
    add_generation_prompt=True,
)
ids = model.generate_from_summary(summary, **processor(text=prompt), max_new_tokens=12)
print(processor.batch_decode(ids, skip_special_tokens=True))
```

With [Sentence Transformers](https://sbert.net), texts and pictures alike:

```python
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(path, trust_remote_code=True)
scores = encoder.similarity(encoder.encode(["two snowmen on a blue field"]), encoder.encode(["scene.png"]))  # cosine
```

The embedding was not trained to be cut: `truncate_dim` loses more than `precision="int8"` or `"binary"` does.

## Figures

{pictures:,} held-out scenes of the `{split}` split, {questions:,} questions, greedy decoding, an answer counts when it
equals the one canonical answer to the letter. Made with

```bash
python -m fwd2bot.training.evaluate hub/fwd2bot-tiny --output evaluation.json
```

in {dtype}, torch {torch}, transformers {transformers}; the numbers behind the tables are in `evaluation.json`.

### Questions, % right

{answers}
{several}
### Retrieval among {retrieval_pictures:,} pictures, and hard negatives, %

A short caption may be true of several pictures; any that it is true of counts as a hit. Hard negatives: the share of
pictures whose cosine to a true caption is larger than to a false one that differs in one detail (the sorts of
SugarCrepe, arXiv 2306.14610). In training, false captions of the same six sorts, and full descriptions false in one
detail, were negatives of the contrastive loss. The false captions of the two "add" sorts are always longer than the
true ones, so length alone tells them apart.

{retrieval}

### Bytes per image

{sizes}

Two bytes a number; for the uncompressed model the image tokens as they enter the language model.

## Training

Two recipes, from random weights, on scenes that the package draws itself:
`python -m fwd2bot.training.train backbone.yaml`, then `fwd2bot.yaml`; where the run of this checkpoint departed from
them or went on after them, the package's `docs/training.md` says so. The backbone is a standard
`LlavaForConditionalGeneration` ({parameters:.1f} million parameters in all, the two LoRA adapters of rank {rank}
included). It is frozen in the second stage; the adapters, the summary queries, the summary projector and the
temperature learn with an autoregressive and a contrastive loss, at lengths drawn from {lengths}.
The things are drawn with Noto Color Emoji (SIL Open Font License 1.1).

## Limits

- Drawn scenes only, English only, short answers only.
- The fewer summary tokens, the more of a crowded picture is lost; see the tables by kind of question.
- Embeddings compare at equal length k only.
- Method: Fwd2Bot, arXiv 2503.21757. Mean pooling, the text side, elastic k and this training are this project's own.
"""


_SEVERAL = """
### Questions about 2 to 5 pictures in one prompt, % right

{several_questions:,} further questions, each about pictures of its own: which of them show a thing ("which") or
have a field ("field"; the answer is a list such as "1 and 3", or "none"), how many of them do ("how many"), which has
the most or the fewest things ("most"), and what is in the one that the question names ("presence", "detail"). The
backbone was trained on one picture per prompt, so its uncompressed column says what that training left it able to do
with several, not what compression costs.

{kinds}
"""


def model_card(results: dict[str, Any], model: Any) -> str:
    """The card as Markdown, from the output of `fwd2bot.training.evaluate` and the model that it was of.

    Raises:
        ValueError: a figure of the card is not among the results; the message names it.
    """
    lengths = [name for name in results if name.startswith("k=")]
    if not lengths:
        raise _missing("k=...")
    settings = ["uncompressed", *lengths]

    def values(names: Iterable[str], *path: str) -> list[Any]:
        return [_entry(results, name, *path) for name in names]

    kinds = [kind for kind in _entry(results, "uncompressed", "answers") if kind != "all"]
    answers = [[kind, *map(_percent, values(settings, "answers", kind))] for kind in kinds]
    of_all = values(settings, "answers", "all")
    answers.append(["**all**", *map(_percent, of_all)])
    if of_all[0] > 0:
        answers.append(["share of uncompressed", *(_percent(share / of_all[0]) for share in of_all)])

    several = ""
    if results.get("several_questions"):  # an evaluation may leave them out
        shares = [
            [kind if kind != "all" else "**all**", *map(_percent, values(settings, "several", kind))]
            for kind in sorted(_entry(results, "uncompressed", "several"), key=lambda kind: (kind == "all", kind))
        ]
        shares += [
            [f"{number} pictures", *map(_percent, values(settings, "several_by_pictures", number))]
            for number in _entry(results, "uncompressed", "several_by_pictures")
        ]
        several = _SEVERAL.format(
            several_questions=results["several_questions"], kinds=_table(["", *settings], shares)
        )

    rows = []
    for group in (
        "full_caption_to_image",
        "image_to_full_caption",
        "short_caption_to_image",
        "image_to_short_caption",
    ):
        for measure in _entry(results, lengths[0], group):
            rows.append([f"{group.replace('_', ' ')}, {measure}", *map(_percent, values(lengths, group, measure))])
    for sort in _entry(results, lengths[0], "hard_negatives"):
        shares = map(_percent, values(lengths, "hard_negatives", sort))
        rows.append([f"hard negatives, {sort.replace('_', ' ')}", *shares])

    config = model.config
    width = config.get_text_config().hidden_size
    return _HEADER + _TEXT.format(
        image_tokens=_entry(results, "uncompressed", "bytes_per_image") // (2 * width),
        k_max=config.num_summary_tokens,
        width=width,
        answers=_table(["kind", *settings], answers),
        several=several,
        retrieval=_table(["", *lengths], rows),
        sizes=_table(settings, [[f"{size:,}" for size in values(settings, "bytes_per_image")]]),
        parameters=model.num_parameters() / 1e6,
        rank=config.adapters["compress"]["r"],
        lengths=", ".join(map(str, config.summary_lengths)),
        torch=_entry(results, "versions", "torch"),
        transformers=_entry(results, "versions", "transformers"),
        **{key: _entry(results, key) for key in ("pictures", "questions", "split", "dtype", "retrieval_pictures")},
    )


def _entry(results: dict[str, Any], *path: str) -> Any:
    entry: Any = results
    for name in path:
        if not isinstance(entry, dict) or name not in entry:
            raise _missing(*path)
        entry = entry[name]
    return entry


def _missing(*path: str) -> ValueError:
    return ValueError(
        f"the evaluation has no entry {' / '.join(path)}: it is of an older version, or of a model that does not "
        "compress. Evaluate this checkpoint anew with fwd2bot.training.evaluate."
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
