"""What programs call, and what the server does not serve."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from fwd2bot.pipelines.embedded import gallery


@pytest.fixture
def client(space):
    made = Client(space.url, verbose=False)
    yield made
    made.close()


def test_endpoints_are_named_and_documented(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    parameters = {name: [one["parameter_name"] for one in about["parameters"]] for name, about in named.items()}
    assert parameters == {
        "/compress": ["picture", "num_summary_tokens"],
        "/search": ["query", "num_summary_tokens", "top_k"],
        "/ask": ["question", "pictures", "find", "num_summary_tokens", "uncompressed", "fresh"],
    }
    assert all(len(about["description"]) > 80 for about in named.values())


def test_picture_is_compressed_found_and_asked_about_and_other_clients_do_not_see_it(client, space):
    made = client.predict(handle_file(str(gallery()[47].path)), 8, api_name="/compress")
    assert (made["id"], made["num_summary_tokens"], made["summary_bytes"]) == ("own-1", 8, 8 * 192 * 2)
    assert len(made["summary"]) == 8 and len(made["summary"][0]) == 192
    hits = client.predict("two snowmen on a blue field", 8, 2, api_name="/search")
    assert {hit["id"] for hit in hits} == {"own-1", "gallery-47"}
    said = client.predict("What colour is the background?", ["own-1"], 0, 8, True, api_name="/ask")
    assert said["answer"] == said["uncompressed"]["answer"] == "blue"
    assert said["cost"]["image_tokens"] == 8 and said["uncompressed"]["cost"]["image_tokens"] == 64
    other = Client(space.url, verbose=False)
    with pytest.raises(AppError, match="There is no picture 'own-1' in this session"):
        other.predict("What is it?", ["own-1"], 0, 8, False, api_name="/ask")
    other.close()


@pytest.mark.parametrize(
    ("arguments", "name", "words"),
    [
        (("", 8, 3), "/search", "The query is empty"),
        (("a dog", 99, 3), "/search", "must be 0 .the largest. or 1 to 16, not"),
        (("a dog", 8, 0), "/search", "top_k must be a whole number from 1 to 50, not 0"),
        (("a dog", "abc", 3), "/search", "num_summary_tokens must be a whole number, not 'abc'"),
        (("a dog", 2.5, 3), "/search", "num_summary_tokens must be a whole number, not 2.5"),
        (("a dog", 1e308, 3), "/search", r"num_summary_tokens must be a whole number, not 1e\+308"),
        (("a dog", -1, 3), "/search", "num_summary_tokens must be 0 .the largest. or 1 to 16, not -1"),
        (("a dog", 8, None), "/search", "top_k must be a whole number, not None"),
        ((["dog"], 8, 3), "/search", r"The query must be text, not \['dog'\]"),
        (("What?", [["x"]], 0, 8, False), "/ask", r"pictures must be a list of ids such as .* not \[\['x'\]\]"),
        (("What?", "abc", 0, 8, False), "/ask", "pictures must be a list of ids such as .* not 'abc'"),
        (("What?", ["gallery-43"], -1, 8, False), "/ask", "find must be a whole number from 0 to 5, not -1"),
        (("What?", ["gallery-43"], 0, 8, "yes"), "/ask", "uncompressed must be true or false, not 'yes'"),
        (("What?", ["gallery-43"], 0, 8, False, 1), "/ask", "fresh must be true or false, not 1"),
        (("What?", ["gallery-43"], 2, 8, False), "/ask", "pictures has 1 and find is 2: only one of the two goes"),
        (("What?", [], 0, 8, False), "/ask", "No picture is chosen. Give ids in pictures, or in find how many"),
    ],
)
def test_bad_input_is_an_error_with_the_remedy(client, arguments, name, words):
    with pytest.raises(AppError, match=words):
        client.predict(*arguments, api_name=name)


def test_text_file_is_an_error(client, tmp_path):
    (tmp_path / "notes.jpg").write_text("words")
    with pytest.raises(AppError, match="“notes.jpg” is no picture"):
        client.predict(handle_file(str(tmp_path / "notes.jpg")), 8, api_name="/compress")


def test_address_is_refused_with_the_remedy_and_fetched_by_nobody(space, monkeypatch):
    from gradio import processing_utils

    fetched = []
    monkeypatch.setattr(
        processing_utils, "async_ssrf_protected_download", lambda *given, **more: fetched.append(given)
    )
    data = {"path": "https://example.org/photo.jpg", "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [data, 8], "session_hash": "addresses"}).encode()
    call = Request(space.url + "gradio_api/queue/join", body, {"Content-Type": "application/json"})
    index = next(one["id"] for one in space.page.config["dependencies"] if one["api_name"] == "compress")
    call.data = json.dumps({**json.loads(body), "fn_index": index}).encode()
    with urlopen(call):
        pass
    told = ""
    with urlopen(space.url + "gradio_api/queue/data?session_hash=addresses") as answer:
        for line in answer:
            told += line.decode()
            if "process_completed" in line.decode():
                break
    assert "taken as a file, not from an address such as 'https://example.org/photo.jpg'. Download it" in told
    assert fetched == []


def test_large_file_is_an_error_with_the_remedy(client, tmp_path):
    (tmp_path / "large.png").write_bytes(b"x" * (11 * 2**20))
    with pytest.raises(AppError, match="“large.png” has 11.0 MB; at most 10 MB are taken. Make it smaller"):
        client.predict(handle_file(str(tmp_path / "large.png")), 8, api_name="/compress")


@pytest.mark.parametrize("k", [99, -1])
def test_picture_is_not_compressed_to_a_length_that_is_none(client, service, monkeypatch, k):
    compressed = []
    monkeypatch.setattr(service, "compress", compressed.append)
    with pytest.raises(AppError, match=f"num_summary_tokens must be 0 .the largest. or 1 to 16, not {k}"):
        client.predict(handle_file(str(gallery()[4].path)), k, api_name="/compress")
    assert compressed == []


def test_fresh_question_that_cannot_be_answered_ends_no_conversation(client):
    def tokens(pictures, fresh):
        return client.predict("What is it?", pictures, 0, 8, False, fresh, api_name="/ask")["cost"]["prompt_tokens"]

    first = tokens(["gallery-43"], False)
    with pytest.raises(AppError, match="There is no picture 'own-77'"):
        tokens(["own-77"], True)
    assert tokens(["gallery-43"], False) > first


def test_same_file_twice_is_one_picture_of_the_client(client):
    made = [client.predict(handle_file(str(gallery()[4].path)), 8, api_name="/compress") for _ in range(2)]
    assert made[0] == made[1]


def test_fresh_begins_a_new_conversation(client):
    def tokens(fresh):
        said = client.predict("What is it?", ["gallery-43"], 0, 8, False, fresh, api_name="/ask")
        return said["cost"]["prompt_tokens"]

    first, second, fresh = tokens(False), tokens(False), tokens(True)
    assert fresh == first < second


def status(url, **headers):
    try:
        with urlopen(Request(url, **headers)) as answer:
            return answer.status, dict(answer.headers)
    except HTTPError as error:
        return error.code, dict(error.headers)


@pytest.mark.parametrize("path", ["gradio_api/file={}", "file={}", "gradio_api/file/{}", "gradio_api/proxy={}"])
def test_no_file_is_served_by_its_path(space, path):
    kept = space.uploads / "kept.png"
    kept.write_bytes(b"x")
    try:
        assert status(space.url + path.format(kept))[0] == 404
        assert status(space.url + path.format("/etc/passwd"))[0] == 404
    finally:
        kept.unlink()


def test_state_is_not_saved_on_the_server(space):
    assert status(space.url + "gradio_api/deep_link?session_hash=x")[0] == 404
    assert status(space.url + "gradio_api/runs")[0] in (404, 405)


def test_too_large_upload_is_refused_before_it_is_read(space):
    request = {"data": b"x", "headers": {"Content-Length": str(10**9)}, "method": "POST"}
    assert status(space.url + "gradio_api/upload", **request)[0] == 413


def test_page_may_load_nothing_from_elsewhere(space):
    code, headers = status(space.url)
    assert code == 200
    assert headers["content-security-policy"].startswith("default-src 'self'")


def test_nothing_is_shared_or_told(space):
    assert not space.page.share and not space.page.analytics_enabled
    assert space.url.startswith("http://127.0.0.1:")


def test_file_of_the_server_can_neither_be_read_nor_deleted(space, tmp_path):
    """A call that names a path instead of an upload."""
    mine = tmp_path / "mine.png"
    mine.write_bytes(gallery()[0].path.read_bytes())
    data = json.dumps({"data": [{"path": str(mine), "meta": {"_type": "gradio.FileData"}}, 8]}).encode()
    call = Request(space.url + "gradio_api/call/compress", data, {"Content-Type": "application/json"})
    with urlopen(call) as answer:
        event = json.loads(answer.read())["event_id"]
    with urlopen(space.url + f"gradio_api/call/compress/{event}") as answer:
        assert answer.read().decode().startswith("event: error")
    assert mine.exists()
