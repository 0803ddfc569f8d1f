"""The mixture: every position known from the seed, parts without overlap, resuming, broken rows."""

import logging
from collections import Counter

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from tiny_sources import mixture_of, picture_bytes, write_captions, write_json, write_llava
from torch.utils.data import DataLoader, SequentialSampler, Subset

from fwd2bot.training.source_recipe import SourceRecipe
from fwd2bot.training.sources import UnusableRowsError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # datasets waits 5 s at the end of every stream
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)


def keys(samples):
    return [sample["key"] for sample in samples]


def as_is(samples):
    return samples


def loaded(mixture, workers, first_batch=0, rank=0, batch_size=4):
    """Keys as a DataLoader of one process gives them, from a batch on: as accelerate and Trainer slice it."""
    batches = [list(range(start, start + batch_size)) for start in range(0, len(mixture), batch_size)]
    mine = batches[rank :: mixture.processes][first_batch:]
    options = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(mixture, batch_sampler=mine, num_workers=workers, collate_fn=keys, **options)
    return list(loader)


def test_every_epoch_has_each_row_once_in_an_order_of_its_own(tmp_path):
    mixture = mixture_of(write_llava(tmp_path, 8), length=24)
    epochs = [keys(mixture[position] for position in range(start, start + 8)) for start in (0, 8, 16)]
    assert all(set(epoch) == {f"chat-{number}" for number in range(8)} for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_weights_are_shares_of_the_samples_and_other_seeds_other_orders(tmp_path):
    recipes = [write_llava(tmp_path), write_captions(tmp_path, weight=3.0)]
    mixture = mixture_of(*recipes, length=10_000)
    drawn = Counter(mixture.source_of(position) for position in range(10_000))
    assert drawn[1] / 10_000 == pytest.approx(0.75, abs=0.02)
    again, other = mixture_of(*recipes, length=10_000), mixture_of(*recipes, length=10_000, seed=1)
    positions = [9_000, 17, 4_100, 17]  # in any order: a sample of a table depends on nothing else
    assert keys(mixture[p] for p in positions) == keys(again[p] for p in positions)
    assert keys(mixture[p] for p in range(40)) != keys(other[p] for p in range(40))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("files", [1, 5])
def test_stream_is_shared_out_without_overlap_over_processes_and_workers(tmp_path, workers, files):
    recipe = write_captions(tmp_path, 40, files=files, streaming=True, shuffle_buffer=8)
    found = []
    for rank in range(2):
        mixture = mixture_of(recipe, length=16, batch_size=2, processes=2)
        found += [key for batch in loaded(mixture, workers, rank=rank, batch_size=2) for key in batch]
    assert len(found) == 16 == len(set(found))


@pytest.mark.parametrize("files", [1, 4])
def test_streams_are_shared_out_by_the_batches_that_accelerate_gives_a_process(tmp_path, files):
    """No row is read twice over two processes, and a process that skips batches goes on where it would have been."""
    recipe = write_captions(tmp_path, 40, files=files, streaming=True, shuffle_buffer=4)

    def prepared(rank):
        mixture = mixture_of(recipe, length=24, batch_size=3, processes=2)
        loader = DataLoader(mixture, batch_size=3, collate_fn=keys, sampler=SequentialSampler(mixture), num_workers=2)
        return prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)

    whole = [list(prepared(rank)) for rank in range(2)]
    found = [key for batches in whole for batch in batches for key in batch]
    assert len(found) == 24 == len(set(found))
    assert [list(skip_first_batches(prepared(rank), 1)) for rank in range(2)] == [batches[1:] for batches in whole]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_run_that_begins_later_reads_what_the_undisturbed_one_read_there(tmp_path, streaming, workers):
    """Past the end of an epoch, too, and with broken rows on the way."""
    recipe = write_captions(tmp_path, 30, files=3, streaming=streaming, shuffle_buffer=4)
    path = write_json(tmp_path / "broken.jsonl", [{"image": "nowhere.png", "question": "?", "answer": "a"}] * 3)
    other = SourceRecipe(name="qa", format="vqa", path=path, images=str(tmp_path), weight=0.01)
    recipes = [recipe, write_llava(tmp_path), other]
    if streaming:
        recipes.pop()

    def mixture():
        return mixture_of(*recipes, length=160, max_broken=100, seed=2)

    whole = loaded(mixture(), workers)
    for first in (1, 17):
        assert loaded(mixture(), workers, first_batch=first) == whole[first:]


def test_table_is_not_read_before_the_position(tmp_path):
    mixture = mixture_of(write_llava(tmp_path), length=1_000_000)
    [source], numbers = mixture.sources, []
    source.table = Recorder(source.table, numbers)
    loader = DataLoader(Subset(mixture, range(999_996, 1_000_000)), batch_size=4, collate_fn=keys)
    assert len(list(loader)) == 1 and len(numbers) == 4


class Recorder:
    def __init__(self, table, numbers):
        self.table, self.numbers = table, numbers

    def __len__(self):
        return len(self.table)

    def __getitem__(self, number):
        self.numbers.append(number)
        return self.table[number]


def test_stream_asked_for_an_earlier_position_is_an_error(tmp_path):
    mixture = mixture_of(write_captions(tmp_path, streaming=True), length=20)
    assert list(SequentialSampler(mixture)) == list(range(20))
    mixture[3]
    with pytest.raises(RuntimeError, match="position 2 of the streamed source 'photos'.*sequential sampler"):
        mixture[2]


def write_with_broken(tmp_path, broken=("truncated", "no picture", "missing")):
    """8 good rows and some broken ones."""
    recipe = write_llava(tmp_path)
    images = tmp_path / "images"
    (images / "truncated.png").write_bytes(picture_bytes(1)[0][:60])
    (images / "no picture.png").write_bytes(b"hello")
    rows = [*_rows(range(8), "{}"), *_rows(broken, "{}")]
    write_json(tmp_path / "chat.json", rows)
    return recipe


def _rows(names, pattern):
    talk = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This"}]
    return [{"id": f"id {name}", "image": f"{pattern.format(name)}.png", "conversations": talk} for name in names]


def test_broken_rows_are_counted_once_logged_with_key_and_reason_and_replaced(tmp_path, caplog):
    mixture = mixture_of(write_with_broken(tmp_path), length=33, max_broken=3)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        found = keys(mixture[position] for position in range(33))
    logging.getLogger("transformers").propagate = False
    assert len(found) == 33 and set(found) == {f"id {number}" for number in range(8)}
    assert mixture.num_broken == {"chat": 3}
    messages = sorted(record.getMessage() for record in caplog.records)
    assert len(messages) == 3
    for message, key in zip(messages, ["missing", "no picture", "truncated"], strict=True):
        assert message.startswith(f"data.sources['chat'], id {key}: ")
    assert "is not there" in messages[0] and "no picture in a format" in messages[1] and "damaged" in messages[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_broken_row_too_many_is_an_error(tmp_path, workers):
    mixture = mixture_of(write_with_broken(tmp_path), length=44, max_broken=2)
    with pytest.raises(UnusableRowsError, match=r"more than data.max_broken=2 \(chat: 3\)"):
        loaded(mixture, workers)


def test_counts_of_workers_come_together_in_the_process(tmp_path):
    mixture = mixture_of(write_with_broken(tmp_path), length=44, max_broken=10)
    loaded(mixture, workers=2)
    assert 3 <= mixture.num_broken["chat"] <= 6  # each worker counts a row once


def test_source_that_has_nothing_for_its_use_is_an_error_and_no_endless_search(tmp_path):
    mixture = mixture_of(write_captions(tmp_path, use="contrastive"), length=4, contrastive_max_tokens=2)
    with pytest.raises(RuntimeError, match="nothing for use: contrastive with contrastive_max_tokens=2"):
        mixture[0]


def test_source_whose_pictures_are_all_missing_is_said_to_be_broken(tmp_path):
    recipe = write_llava(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    recipe.images = str(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError) as error:
        mixture_of(recipe, length=4)[0]
    said = str(error.value)
    assert "none of 8 rows can be used: 8 are broken, the last is chat-" in said and "is not there" in said
    assert "nothing for use" not in said and "Mend the data, or path and images" in said


def test_only_row_of_use_is_found_from_every_position(tmp_path):
    recipe = write_llava(tmp_path)
    for number in range(1, 8):
        (tmp_path / "images" / f"{number}.png").unlink()
    mixture = mixture_of(recipe, length=40)
    assert {mixture[position]["key"] for position in range(40)} == {"chat-0"}


@pytest.mark.parametrize("streaming", [False, True])
def test_each_row_once_shares_by_weight_and_takes_the_rest_where_a_source_ends(tmp_path, streaming):
    recipes = [write_llava(tmp_path, 8), write_captions(tmp_path, 4, streaming=streaming, weight=0.5)]
    found = mixture_of(*recipes, length=0).each_row_once(6)
    assert Counter(sample["source"] for sample in found) == {"chat": 4, "photos": 2}
    assert keys(found) == keys(mixture_of(*recipes, length=0).each_row_once(6))
    every = mixture_of(*recipes, length=0).each_row_once(100)
    assert len(every) == 12 == len(set(keys(every)))


def test_each_row_once_passes_over_broken_rows_and_names_a_source_that_has_no_other(tmp_path):
    mixture = mixture_of(write_with_broken(tmp_path), length=0)
    assert sorted(keys(mixture.each_row_once(20))) == [f"id {number}" for number in range(8)]
    assert mixture.num_broken == {"chat": 3}
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(RuntimeError, match="'chat'.: none of 11 rows can be used: 11 are broken"):
        mixture.each_row_once(20)


def test_samples_are_the_same_with_and_without_workers(tmp_path):
    recipes = [write_llava(tmp_path), write_captions(tmp_path)]
    whole = [mixture_of(*recipes, length=12)[position] for position in range(12)]
    [loader] = DataLoader(mixture_of(*recipes, length=12), batch_size=12, num_workers=1, collate_fn=as_is)
    for one, other in zip(whole, loader, strict=True):
        assert one["input_ids"] == other["input_ids"] and one["captions"] == other["captions"]
        assert one["image_groups"] == other["image_groups"] and one["text"] == other["text"]
    assert torch.is_tensor(mixture_of(*recipes).broken)
