"""Upload of a Hub folder: to a small server that speaks the Hub's calls, and what is refused before."""

import os
import re
import subprocess
import sys

import pytest
import tiny
from hub_server import hub_server

from fwd2bot.training.export import main
from fwd2bot.training.push import Destination, files_to_push, listing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "final"
    tiny.tiny_fwd2bot().save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


def run_export(*arguments, endpoint, token="hf_tests"):
    """The command in a process of its own, which is not told to stay offline."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "HF_HOME": str(arguments[1]) + "-home",
        **({"HF_TOKEN": token} if token else {}),
    }
    command = [sys.executable, "-m", "fwd2bot.training.export", *map(str, arguments)]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=240)


def contents(folder):
    return {path.as_posix(): (folder / path).read_bytes() for path in files_to_push(folder)}


def test_pushed_files_arrive_byte_for_byte_and_stale_weights_go(checkpoint, tmp_path):
    with hub_server() as hub:
        hub.repos["me/model"] = {}
        hub.branches["me/model", "main"] = {".gitattributes": b"", "compress/adapter_model.safetensors": b"old"}
        done = run_export(checkpoint, tmp_path / "hub", "--push", "me/model", "--message", "First", endpoint=hub.url)
        assert done.returncode == 0, done.stderr
        assert f"pushed to {hub.url}/me/model/commit/" in done.stdout
        expected = contents(tmp_path / "hub")
        assert "model.safetensors" in expected and "README.md" in expected and "modeling_fwd2bot.py" in expected
        assert hub.branches["me/model", "main"] == expected | {".gitattributes": b""}
        assert hub.messages == ["First"]


def test_push_to_a_branch_of_a_new_private_repository(checkpoint, tmp_path):
    with hub_server() as hub:
        options = ("--push", "model", "--private", "--branch", "k16", "--adapter-only", "--base-model", "some/llava")
        done = run_export(checkpoint, tmp_path / "hub", *options, endpoint=hub.url)
        assert done.returncode == 0, done.stderr
        assert hub.repos["tester/model"].get("visibility", hub.repos["tester/model"].get("private")) in (
            "private",
            True,
        )
        assert hub.branches["tester/model", "main"] == {".gitattributes": b""}
        sent = hub.branches["tester/model", "k16"]
        assert {name: sent[name] for name in sent if name != ".gitattributes"} == contents(tmp_path / "hub")
        assert "generate/adapter_model.safetensors" in sent and "model.safetensors" not in sent


@pytest.mark.parametrize(
    ("endpoint", "token", "message"),
    [
        (None, "hf_another", "Invalid username or password"),
        ("http://127.0.0.1:9", "hf_tests", "was not reached"),
        (None, None, "no token of the Hub; run `hf auth login`"),
    ],
)
def test_push_that_fails_says_why(endpoint, token, message, checkpoint, tmp_path):
    with hub_server() as hub:
        arguments = (checkpoint, tmp_path / "hub", "--push", "me/model")
        done = run_export(*arguments, endpoint=endpoint or hub.url, token=token)
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr
        assert not hub.branches.get(("me/model", "main"))


def test_dry_run_lists_what_would_go_and_asks_no_server(checkpoint, tmp_path, capsys):
    main([str(checkpoint), str(tmp_path / "hub"), "--push", "me/model", "--dry-run", "--private"])
    shown = capsys.readouterr().out
    files = contents(tmp_path / "hub")
    assert f"{len(files)} files, {sum(map(len, files.values())):,} bytes" in shown
    assert "me/model, branch main, private if it is made now" in shown
    for name, content in files.items():
        assert f"{len(content):>15,}  {name}\n" in shown


def test_drafts_and_caches_are_not_pushed(tmp_path):
    for name in ("config.json", ".saving-x/model.safetensors", ".cache/x", "__pycache__/x.pyc", "compress/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    assert [path.as_posix() for path in files_to_push(tmp_path)] == ["compress/a.json", "config.json"]
    assert "2 files, 2 bytes" in listing(tmp_path, Destination("me/model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", "a/b/c"], "--push 'a/b/c' is no name of a repository"),
        (["--push", "me/model"], "HF_HUB_OFFLINE is set"),
        (["--dry-run"], "--dry-run is about an upload; give --push"),
        (["--branch", "x"], "--branch is about an upload; give --push"),
        (["--language", "English"], "English is no language code"),
        (["--adapter-only"], "adapters alone need a backbone"),
        (["--base-model", "llava"], "--base-model 'llava' is no id of the Hub"),
        (["--recipe", "typo.json"], "There is no recipe typo.json"),
    ],
)
def test_export_refuses_before_it_loads_the_model(options, message, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("fwd2bot.training.export.Fwd2BotForConditionalGeneration", None)
    with pytest.raises(SystemExit, match=re.escape(message)):
        main([str(checkpoint), str(tmp_path / "hub"), *options])
    assert not (tmp_path / "hub").exists()
