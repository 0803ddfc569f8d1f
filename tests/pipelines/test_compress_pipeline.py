"""`fwd2bot-compress`: every sort of input, batches, streams, and what it refuses."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.pipelines.pt_utils import KeyDataset

TOLERANCE = 1e-5


def close(one, other):
    return torch.allclose(one.tokens, other.tokens, atol=TOLERANCE, rtol=0)


@pytest.fixture
def picture(pictures):
    return pictures(1)[0]


@pytest.fixture
def expected(vivid_fwd2bot, tiny_processor, pictures):
    """What the model itself makes of five pictures."""
    return vivid_fwd2bot.compress(**tiny_processor.process_images(pictures(5)))


def png(picture) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("sort", ["path", "str", "bytes", "bytearray", "pil", "rgba", "array"])
def test_every_type_of_picture_gives_the_same_summary(compress, picture, tmp_path, sort):
    path = tmp_path / "picture.png"
    picture.save(path)
    given = {
        "path": path,
        "str": str(path),
        "bytes": png(picture),
        "bytearray": bytearray(png(picture)),
        "pil": Image.open(path),
        "rgba": picture.convert("RGBA"),
        "array": np.asarray(picture),
    }[sort]
    summary = compress(given)
    assert len(summary) == 1
    assert torch.equal(summary.tokens, compress(picture).tokens)


def test_list_gives_one_summary_in_its_order(compress, pictures, expected):
    summary = compress(pictures(5))
    assert len(summary) == 5
    assert close(summary, expected)
    assert close(compress(pictures(5)[::-1]), expected[[4, 3, 2, 1, 0]])


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"batch_size": 8}, {"batch_size": 2, "num_workers": 2}])
def test_batches_and_workers_change_no_summary(compress, pictures, expected, options):
    assert close(compress(pictures(5), **options), expected)


def test_length_is_that_asked_for_and_a_prefix(compress, pictures, expected):
    summary = compress(pictures(5), num_summary_tokens=2)
    assert summary.lengths.tolist() == [2] * 5
    assert close(summary, expected.truncate(2))


def test_length_may_be_set_when_the_pipeline_is_made(vivid_fwd2bot, tiny_processor, picture):
    pipe = make(vivid_fwd2bot, tiny_processor, num_summary_tokens=3)
    assert pipe(picture).lengths.tolist() == [3]
    assert pipe(picture, num_summary_tokens=1).lengths.tolist() == [1]


def test_generator_is_read_as_the_result_is(compress, pictures, expected):
    read = []

    def source():
        for picture in pictures(5):
            read.append(picture)
            yield picture

    summaries = compress(source(), batch_size=2)
    assert not read
    first = next(summaries)
    assert len(read) <= 3
    assert len(first) == 1
    assert close(type(first).cat([first, *summaries]), expected)


def test_data_set_gives_an_iterator_over_its_image_column(compress, pictures, expected):
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(p), "path": None} for p in pictures(5)], "id": range(5)}
    )
    data = data.cast_column("image", datasets.Image())
    for given in (data, data["image"], KeyDataset(data, "image"), data.to_iterable_dataset()):
        summaries = list(compress(given, batch_size=2))
        assert [len(summary) for summary in summaries] == [1] * 5
        assert close(type(summaries[0]).cat(summaries), expected)


def test_torch_stream_with_a_length_is_read_as_a_stream(compress, pictures, expected):
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 5

        def __iter__(self):
            return iter(pictures(5))

    summaries = list(compress(Stream(), batch_size=2))
    assert close(type(summaries[0]).cat(summaries), expected)


def test_data_set_without_image_column_is_refused_with_its_columns(compress, pictures):
    data = datasets.Dataset.from_dict({"photo": [png(picture) for picture in pictures(2)]})
    with pytest.raises(ValueError, match=r"columns \['photo'\].*'image'"):
        compress(data)


def test_summary_can_be_saved_and_answers_as_before(compress, answer, pictures, tmp_path):
    summary = compress(pictures(3))
    summary.save_file(tmp_path / "summaries.safetensors")
    loaded = type(summary).load_file(tmp_path / "summaries.safetensors")
    question = {"questions": "What?", "max_new_tokens": 4}
    assert answer(**question, summary=loaded[1]) == answer(**question, summary=summary[1])


SORTS = {  # of several inputs, and what a finished bar shows of three
    "list": (list, "3/3"),
    "data set": (lambda pictures: datasets.Dataset.from_dict({"image": [png(one) for one in pictures]}), "3/3"),
    "generator": (lambda pictures: (one for one in pictures), "3it"),
}


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize(
    ("progress", "delay", "is_shown"),
    [(True, float("inf"), True), (None, 0, True), (None, float("inf"), False), (False, 0, False)],
)
def test_progress_bar_only_where_it_is_asked_for_or_long(
    compress, pictures, capsys, monkeypatch, sort, progress, delay, is_shown
):
    monkeypatch.setattr("fwd2bot.pipelines.pipeline_batches.BAR_DELAY", delay)
    make_input, shown = SORTS[sort]
    assert len(list(compress(make_input(pictures(3)), progress=progress))) == 3
    written = capsys.readouterr().err
    assert shown in written if is_shown else written == ""


def test_progress_bar_of_a_stream_begins_with_its_reading(compress, pictures, capsys):
    summaries = compress(iter(pictures(2)), progress=True)
    assert capsys.readouterr().err == ""
    next(summaries)
    assert "fwd2bot-compress" in capsys.readouterr().err


def test_progress_may_be_set_when_the_pipeline_is_made(vivid_fwd2bot, tiny_processor, pictures, capsys):
    pipe = make(vivid_fwd2bot, tiny_processor, progress=True)
    list(pipe(iter(pictures(2))))
    assert "2it" in capsys.readouterr().err
    list(pipe(iter(pictures(2)), progress=False))
    assert capsys.readouterr().err == ""


def test_repr_names_the_model(compress):
    assert "Fwd2BotForConditionalGeneration" in repr(compress)


def make(model, processor, **arguments):
    from transformers import pipeline

    return pipeline("fwd2bot-compress", model=model, processor=processor, device="cpu", **arguments)


def truncated(picture, tmp_path):
    data = png(picture.resize((200, 200)))
    path = tmp_path / "truncated.png"
    path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ValueError, "list is empty"),
        (5, TypeError, "got int"),
        ([None], TypeError, "Picture 0: .*NoneType"),
        (["nowhere.png"], FileNotFoundError, "Picture 0: .*nowhere.png"),
        ([b"no picture"], ValueError, "Picture 0: .*no picture in a format"),
        ({"photo": []}, TypeError, "mapping.*photo"),
    ],
)
def test_bad_pictures_are_refused_by_name(compress, given, error, message):
    with pytest.raises(error, match=message):
        compress(given)


def test_bad_picture_in_a_list_is_found_before_any_compute(vivid_fwd2bot, compress, pictures, count_calls):
    calls = count_calls(vivid_fwd2bot, "compress")
    with pytest.raises(TypeError, match="Picture 4: .*got int"):
        compress([*pictures(4), 5])
    assert not calls


def test_truncated_picture_is_named(compress, pictures, tmp_path):
    with pytest.raises(ValueError, match=r"Picture 1: .*truncated\.png.*file is truncated"):
        compress([pictures(1)[0], truncated(pictures(1)[0], tmp_path)])


@pytest.mark.parametrize("length", [0, 5, -1])
def test_length_out_of_range_is_refused(compress, picture, length):
    with pytest.raises(ValueError, match=f"{length}.*1 to 4"):
        compress(picture, num_summary_tokens=length)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": True}, {"num_workers": -1}])
def test_bad_batch_size_and_workers_are_refused(compress, picture, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an integer"):
        compress([picture], **options)


def test_unknown_argument_is_refused_with_the_known_ones(compress, picture):
    with pytest.raises(TypeError, match="'num_tokens'.*num_summary_tokens"):
        compress(picture, num_tokens=4)


def test_model_without_processor_is_refused(vivid_fwd2bot):
    from fwd2bot.pipelines.compress_pipeline import CompressPipeline

    with pytest.raises(ValueError, match="needs a processor"):
        CompressPipeline(model=vivid_fwd2bot, device="cpu")
