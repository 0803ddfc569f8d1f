"""A store on object storage, on a local S3 server. Runs where `pip install "moto[server]"` was; not part of `dev`."""

import os
import subprocess
import sys
import threading
import warnings
from datetime import timedelta

import numpy as np
import pytest
import tiny
from command_runner import fails, run_json

from fwd2bot.pipelines.store import SummaryStore
from fwd2bot.pipelines.store.table import exists

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # not ours to mend
    moto_server = pytest.importorskip("moto.server", reason='pip install "moto[server]" runs these')
    boto3 = pytest.importorskip("boto3")  # which moto brings


@pytest.fixture(scope="module")
def endpoint():
    """The address of an S3 server with a bucket "photos", which the environment names as a user would."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT", address)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        client(address).create_bucket(Bucket="photos")
        yield address
    server.stop()


@pytest.fixture
def place(endpoint, request):
    """A URI of its own for every test."""
    return f"s3://photos/{request.node.name}"


@pytest.fixture
def new_store(place, vivid_fwd2bot, tiny_processor):
    return SummaryStore.create(place, vivid_fwd2bot, tiny_processor, codec="fp16")


def client(address):
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1")


def objects(endpoint, place) -> dict[str, bytes]:
    """Everything that the bucket holds of a store."""
    photos = client(endpoint)
    listing = photos.list_objects_v2(Bucket="photos", Prefix=place.removeprefix("s3://photos/"))
    names = [one["Key"] for one in listing["Contents"]]
    return {name: photos.get_object(Bucket="photos", Key=name)["Body"].read() for name in names}


def test_store_is_the_same_as_on_a_disk(new_store, place, vivid_fwd2bot, tiny_processor, photos, tmp_path):
    local = SummaryStore.create(tmp_path / "local", vivid_fwd2bot, tiny_processor, codec="fp16")
    assert not exists(f"{place}-other") and exists(place)
    for store in (new_store, local):
        assert store.add(photos, metadata={"year": 2020}).added == 5
        assert store.add(photos, metadata={"year": 2020}).skipped == 5
    reader = SummaryStore.open(f"{place}/")
    names = sorted(local)
    assert sorted(reader) == names and reader.check() == 5
    assert (reader.summary(names).tokens == local.summary(names).tokens).all()
    query = np.ones(local.config.width, np.float32)
    assert reader.search(query, 3, where="year = 2020") == local.search(query, 3, where="year = 2020")
    reader.export(tmp_path / "rows.jsonl", "jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 5
    with pytest.raises(FileExistsError, match="holds a store"):
        SummaryStore.create(place, vivid_fwd2bot, tiny_processor)


def test_purged_bytes_are_in_no_object(new_store, place, endpoint):
    new_store.add(tiny.pictures(6), ids=list("abcdef"), batch_size=2, commit_every=2)
    rows = {row["id"]: row["tokens"] for row in new_store._table.find("id", "abcdef", ["id", "tokens"])}

    def holds(name):
        return any(rows[name] in content for content in objects(endpoint, place).values())

    new_store.delete("b")
    assert holds("a") and holds("b")
    new_store.optimize(older_than=timedelta(0))
    new_store.delete("a", purge=True)
    assert not holds("a") and not holds("b") and holds("c")
    assert sorted(new_store) == list("cdef") and new_store.check() == 4
    assert 0 < new_store.stats()["bytes"] <= sum(map(len, objects(endpoint, place).values()))


def test_two_writers_at_once_lose_nothing_and_store_nothing_twice(new_store, place, vivid_fwd2bot, tiny_processor):
    shown = tiny.pictures(18)
    writers = [SummaryStore.open(place, vivid_fwd2bot, tiny_processor) for _ in range(2)]
    threads = [
        threading.Thread(target=store.add, args=(part,), kwargs={"batch_size": 2, "commit_every": 2})
        for store, part in zip(writers, (shown[:12], shown[6:]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(new_store) == len(set(new_store)) == 18


def test_killed_command_run_again_completes_the_store(place, photos, checkpoint, tmp_path):
    for index, picture in enumerate(tiny.pictures(60)):
        picture.save(tmp_path / f"{index:02}.png")
    command = ["index", str(tmp_path), "--store", place, "--model", str(checkpoint)]
    once = [*command, "--commit-every", "1", "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "fwd2bot_cli", *once], stderr=subprocess.PIPE)
    while not (exists(place) and len(SummaryStore.open(place))):
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.communicate()
    done = run_json(*command)
    assert 0 < done["skipped"] < 60 and done["added"] + done["skipped"] == done["rows"] == 60
    assert run_json("optimize", place, "--older-than", "0", "--leftovers")["fragments"] == 1
    assert run_json("stats", place, "--check")["checked_rows"] == 60
    [name, *_] = SummaryStore.open(place)
    assert run_json("delete", place, name, "--purge", "--yes")["rows"] == 59


def test_bucket_that_is_not_there_is_an_error_that_says_what_to_look_at(endpoint):
    message = fails("stats", "s3://nowhere/store")
    assert "The store s3://nowhere/store could not be read or written: The specified bucket does not exist" in message
    assert "AWS_ENDPOINT" in message and "backtrace" not in message
