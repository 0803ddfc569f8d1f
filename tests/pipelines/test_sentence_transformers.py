"""A checkpoint folder in Sentence Transformers: `encode` gives what `embed` gives, with the library's own habits."""

import base64
import json
import os
import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModel, AutoProcessor

from fwd2bot.pipelines.embedded import default_checkpoint, gallery

sentence_transformers = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator  # noqa: E402

TEXTS = ["a dog", "two cats beside a large red house on a hill", "x", "a boat at the left of a tree"]


def load(folder, **options):
    return sentence_transformers.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


@pytest.fixture(scope="module")
def encoder(checkpoint):
    """Shared by the module: do not change it."""
    return load(checkpoint)


@pytest.fixture(scope="module")
def images():
    return tiny.pictures(4)


@pytest.fixture(scope="module")
def embed(checkpoint):
    """`embed(texts_or_images)` without Sentence Transformers, in one batch."""
    model, processor = AutoModel.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)

    def embed(inputs, **options):
        process = processor.process_texts if isinstance(inputs[0], str) else processor.process_images
        return model.embed(**process(inputs), **options).numpy()

    return embed


def assert_same(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


# The same vectors


def test_texts_get_the_embeddings_of_the_model(encoder, embed):
    assert_same(encoder.encode(TEXTS), embed(TEXTS))


def test_pictures_get_the_embeddings_of_the_model(encoder, embed, images):
    assert_same(encoder.encode(images), embed(images))


def test_texts_and_pictures_may_be_mixed_in_one_list(encoder, embed, images):
    mixed = [TEXTS[0], images[0], images[1], TEXTS[1]]
    texts, pictures = embed(TEXTS[:2]), embed(images[:2])
    assert_same(encoder.encode(mixed), np.stack([texts[0], pictures[0], pictures[1], texts[1]]))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_embeddings_do_not_depend_on_batch_size_and_order(encoder, images, batch_size):
    mixed = [*TEXTS, *images]
    backwards = encoder.encode(mixed[::-1], batch_size=batch_size)
    assert_same(backwards[::-1], encoder.encode(mixed))


def test_one_text_and_one_picture_give_one_vector(encoder, embed, images):
    assert_same(encoder.encode(TEXTS[0]), embed(TEXTS[:1])[0])
    assert_same(encoder.encode(images[0]), embed(images[:1])[0])


@pytest.mark.parametrize("kind", ["str", "path", "bytes", "array", "dict of a path", "data URL", "message"])
def test_picture_may_come_in_many_ways(encoder, images, tmp_path, kind):
    path = tmp_path / "picture.png"
    images[0].save(path)
    buffer = BytesIO()
    images[0].save(buffer, "PNG")
    given = {
        "str": str(path),
        "path": path,
        "bytes": buffer.getvalue(),
        "array": np.asarray(images[0]),
        "dict of a path": {"image": path.rename(tmp_path / "no_suffix") if kind == "dict of a path" else None},
        "data URL": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "message": {"role": "user", "content": [{"type": "image", "image": images[0]}]},
    }[kind]
    assert_same(encoder.encode(given), encoder.encode(images[0]))


@pytest.mark.parametrize("given", [{"text": TEXTS[0]}, [{"role": "user", "content": TEXTS[0]}]])
def test_text_may_come_as_dict_or_message(encoder, given):
    assert_same(encoder.encode(given), encoder.encode(TEXTS[0]))


def test_queries_and_documents_are_embedded_alike(encoder, images):
    assert_same(encoder.encode_query(TEXTS), encoder.encode(TEXTS))
    assert_same(encoder.encode_document(images), encoder.encode(images))


def test_prompt_is_put_before_texts_alone(encoder, images):
    found = encoder.encode([TEXTS[0], images[0]], prompt="a drawing of ")
    assert_same(found, encoder.encode([f"a drawing of {TEXTS[0]}", images[0]]))


def test_end_of_a_text_that_is_too_long_is_left_out(checkpoint):
    encoder = load(checkpoint)
    room = encoder.max_seq_length - encoder.processor.process_texts("a")["input_ids"].shape[1] + 1
    fits = "abcdefgh" * 100
    assert_same(encoder.encode(fits), encoder.encode(fits[:room]))
    encoder.max_seq_length -= 10
    assert_same(encoder.encode(fits), encoder.encode(fits[: room - 10]))


# The length k


@pytest.mark.parametrize("length", [1, 3])
def test_length_is_chosen_per_call_or_for_all(checkpoint, embed, images, length):
    encoder, expected = load(checkpoint), embed(images, num_summary_tokens=length)
    assert_same(encoder.encode(images, num_summary_tokens=length), expected)
    encoder[0].num_summary_tokens = length
    assert_same(encoder.encode(images), expected)


def test_token_embeddings_are_the_summaries(encoder, images):
    tokens = encoder.encode(images, output_value="token_embeddings", num_summary_tokens=3)
    summary = encoder[0].model.compress(**encoder.processor.process_images(images), num_summary_tokens=3)
    torch.testing.assert_close(torch.stack(tokens), summary.tokens, atol=1e-5, rtol=0)


# What Sentence Transformers makes of the vectors


def test_model_says_what_it_is(encoder):
    assert encoder.similarity_fn_name == "cosine"
    assert encoder.get_embedding_dimension() == 32
    assert encoder.supports("image") and encoder.supports("text") and not encoder.supports("audio")
    assert encoder.get_model_kwargs() == ["num_summary_tokens"]


def test_sentence_finds_its_picture_in_the_gallery():
    encoder, pictures = load(default_checkpoint()), gallery()[:20]
    sentences = encoder.encode_query([picture.description for picture in pictures])
    vectors = encoder.encode_document([str(picture.path) for picture in pictures])
    assert encoder.similarity(sentences, vectors).argmax(1).tolist() == list(range(20))


def test_truncate_dim_gives_the_first_numbers(encoder, images):
    assert_same(encoder.encode(images, truncate_dim=8), encoder.encode(images)[:, :8])


@pytest.mark.parametrize("precision, dtype, width", [("int8", np.int8, 32), ("binary", np.int8, 4)])
def test_precision_quantises(encoder, images, precision, dtype, width):
    found = encoder.encode(images, precision=precision)
    assert (found.dtype, found.shape) == (dtype, (4, width))
    assert len(np.unique(found, axis=0)) == 4


def test_pool_of_processes_gives_the_same(encoder, images):
    mixed = [*TEXTS, *images]
    assert_same(encoder.encode(mixed, device=["cpu", "cpu"], chunk_size=3), encoder.encode(mixed))


def test_retrieval_evaluator_takes_texts_and_pictures(images):
    encoder, pictures = load(default_checkpoint()), gallery()[:8]
    evaluator = InformationRetrievalEvaluator(
        queries={f"q{index}": picture.description for index, picture in enumerate(pictures)},
        corpus={f"d{index}": picture.image for index, picture in enumerate(pictures)},
        relevant_docs={f"q{index}": {f"d{index}"} for index in range(8)},
        accuracy_at_k=[1],
        write_csv=False,
    )
    assert encoder.evaluate(evaluator)["cosine_accuracy@1"] == 1.0


# Saving and loading


def test_saved_model_loads_with_all_its_settings(checkpoint, encoder, images, tmp_path):
    first = load(checkpoint, prompts={"query": "find "}, truncate_dim=16, similarity_fn_name="dot")
    first[0].num_summary_tokens = 2
    first.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert (again.prompts["query"], again.truncate_dim, again.similarity_fn_name) == ("find ", 16, "dot")
    assert_same(again.encode(images), encoder.encode(images, num_summary_tokens=2, truncate_dim=16))
    added = {"README.md", "sentence_fwd2bot_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {*os.listdir(checkpoint), *added}


def test_part_for_texts_embeds_texts_alone(checkpoint, encoder, images):
    part = load(checkpoint, model_kwargs={"stage": "text"})
    assert_same(part.encode(TEXTS), encoder.encode(TEXTS))
    with pytest.raises(ValueError, match="'image' is not supported.*Supported modalities: text"):
        part.encode(images)


ALONE = """
import json, sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotHere())
if "sentence_transformers" in sys.argv[2]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
    model.save_pretrained(sys.argv[3])
    processor.save_pretrained(sys.argv[3])
    found = model.embed(**processor.process_texts(["a dog"]))
else:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
    model.save_pretrained(sys.argv[3])
    found = model.encode(["a dog"])
print(json.dumps(found.tolist()))
"""


@pytest.mark.parametrize("missing", ["fwd2bot", "fwd2bot,sentence_transformers"])
def test_folder_alone_is_enough_with_and_without_sentence_transformers(checkpoint, encoder, tmp_path, missing):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(checkpoint), missing, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), encoder.encode(TEXTS[:1]), atol=1e-5)
    assert_same(load(tmp_path / "saved").encode(TEXTS), encoder.encode(TEXTS))


# Errors


@pytest.mark.parametrize(
    "given, message",
    [
        ({"image": "missing.png"}, "missing.png.*does not exist"),
        (b"no picture", "no picture in a format"),
        ("", "Text 0 is empty"),
        (np.zeros(7), "'audio' is not supported.*Supported modalities: text, image"),
        ({"image": "a.png", "text": "a"}, "got image.text"),
        ([["a", "b"]], "got text .list."),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "the conversation has more"),
        ([3.5], "Unsupported input type: float"),
    ],
)
def test_bad_input_is_named(encoder, given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        encoder.encode(given)


def test_length_out_of_range_names_the_range(encoder):
    with pytest.raises(ValueError, match="num_summary_tokens=9 .*Choose 1 to 8"):
        encoder.encode(TEXTS, num_summary_tokens=9)


def test_misspelt_argument_is_an_error(encoder):
    with pytest.raises(ValueError, match="num_summary_token'"):
        encoder.encode(TEXTS, num_summary_token=2)


def test_missing_trust_is_explained(checkpoint):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        sentence_transformers.SentenceTransformer(str(checkpoint), device="cpu")


def test_other_backends_and_weights_of_pickle_are_refused(checkpoint, encoder, tmp_path):
    with pytest.raises(ValueError, match="backend='onnx' is not supported; the only one is 'torch'"):
        load(checkpoint, backend="onnx")
    with pytest.raises(ValueError, match="safetensors only"):
        encoder.save_pretrained(str(tmp_path), safe_serialization=False)


def test_training_is_refused(checkpoint):
    encoder = load(checkpoint)
    with pytest.raises(NotImplementedError, match="Train the model with fwd2bot.training"):
        encoder.train()(encoder.preprocess(TEXTS))
