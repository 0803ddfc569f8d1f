"""The command `fwd2bot`: every command, its JSON, its exit codes, and what it says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from command_runner import fails, run, run_json
from fwd2bot_cli.printing import print_json, print_table
from safetensors import safe_open

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines import demo
from fwd2bot.pipelines.embedded import default_checkpoint
from fwd2bot.pipelines.store import SummaryStore

COMMANDS = ("index", "search", "ask", "stats", "delete", "optimize", "export", "compress", "info", "tour", "demo")


# Help


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["index", "--help"], ["search", "store"]])
def test_help_and_usage_errors_load_no_torch(arguments):
    program = (
        "import sys\nfrom fwd2bot_cli import main\ntry:\n    main()\nfinally:\n"
        "    print(*sorted({'torch', 'transformers', 'lancedb'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode in (0, 2)
    assert done.stdout + done.stderr.strip()
    assert done.stderr.splitlines()[-1] == ""


def test_help_lists_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_and_json(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"\n  fwd2bot {command}" in result.stdout
    assert ("--json" in result.stdout) == (command != "demo")  # which serves until it is stopped


def test_unknown_command_is_a_usage_error():
    assert "No such command 'find'" in fails("find", exit_code=2)


# index


def test_index_reports_and_goes_on(photos, checkpoint, tmp_path):
    path = tmp_path / "new.store"
    first = run_json("index", photos, "--store", path, "--model", checkpoint, "-k", 2, "--codec", "fp16")
    assert (first["added"], first["failed"], first["rows"]) == (5, [], 5)
    again = run_json("index", photos, "--store", path, "--model", checkpoint)
    assert (again["added"], again["skipped"], again["rows"]) == (0, 5, 5)
    assert SummaryStore.open(path).config.num_summary_tokens == 2


def test_index_takes_globs_files_and_folders_together(photos, checkpoint, tmp_path):
    found = run_json(
        "index", photos / "[01].png", photos / "3.png", photos, "--store", tmp_path / "s", "--model", checkpoint
    )
    assert found["added"] == found["rows"] == 5


def test_metadata_of_a_command_are_kept_with_their_types(photos, checkpoint, tmp_path):
    path = tmp_path / "s"
    pairs = [
        "year=2024",
        "place=São Paulo = SP",
        'zip="01234"',
        "code=007",
        "fine=true",
        "x=-1.5e3",
        'tags=["a"]',
        "n=NaN",
    ]
    options = [part for pair in pairs for part in ("--metadata", pair)]
    assert run_json("index", photos, "--store", path, "--model", checkpoint, *options)["added"] == 5
    store = SummaryStore.open(path)
    values = {"year": 2024, "place": "São Paulo = SP", "zip": "01234", "code": "007", "fine": True, "x": -1500.0}
    assert store.get(list(store))[0]["metadata"] == values | {"tags": ["a"], "n": "NaN"}
    assert run_json("index", photos, "--store", path, "--model", checkpoint)["skipped"] == 5
    again = run_json("index", photos / "0.png", "--store", path, "--model", checkpoint, "--metadata", "year=2025")
    assert (again["updated"], again["rows"]) == (1, 5)


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["year"], 2, "'year' is not of the form KEY=VALUE"),
        (["=1"], 2, "'=1' is not of the form"),
        (["a=1", "--metadata", "a=2"], 2, "'a' is given twice"),
        (["my col=1"], 2, "'my col' cannot be the name of metadata"),
    ],
)
def test_metadata_that_cannot_be_are_an_error_before_a_model_is_loaded(photos, tmp_path, options, exit_code, message):
    command = ("index", photos, "--store", tmp_path / "s", "--model", "/nowhere", "--metadata", *options)
    assert message in fails(*command, exit_code=exit_code)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--workers", "2"), "is for --engine ray"),
        (("--engine", "ray", "--device", "cuda"), "is for --engine local"),
        (("--engine", "spark"), "'spark' is not one of"),
    ],
)
def test_engines_and_their_options_must_fit(photos, tmp_path, options, message):
    assert message in fails("index", photos, "--store", tmp_path / "s", *options, exit_code=2)
    assert not (tmp_path / "s").exists()


def test_metadata_that_do_not_fit_the_store_are_a_usage_error(photos, checkpoint, tmp_path):
    command = ["index", photos, "--store", tmp_path / "s", "--model", checkpoint, "--metadata"]
    assert run(*command, "year=2020").exit_code == 0
    assert "'year' is int64 in the" in fails(*command, "year=many", exit_code=2)


def test_broken_picture_is_listed_and_exits_with_3(photos, checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    sources = (photos / "0.png", tmp_path / "broken.jpg")
    found = run_json("index", *sources, "--store", tmp_path / "s", "--model", checkpoint, exit_code=3)
    assert found["added"] == 1
    [failed] = found["failed"]
    assert failed["source"].endswith("broken.jpg")
    assert "no picture" in failed["reason"]


def test_strict_index_stops_at_a_broken_picture(photos, checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    path = tmp_path / "s"
    for sources in (["broken.jpg"], ["broken.jpg", photos / "0.png"]):
        pictures = [tmp_path / one for one in sources]
        assert "broken.jpg: it is no" in fails("index", *pictures, "--store", path, "--model", checkpoint, "--strict")
        assert not path.exists()
    pictures = [photos / "0.png", tmp_path / "broken.jpg"]
    assert "broken.jpg: it is no" in fails("index", *pictures, "--store", path, "--model", checkpoint, "--strict")
    assert len(SummaryStore.open(path)) == 1


def test_broken_pictures_alone_are_listed_and_make_no_store(photos, checkpoint, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no picture")
    path = tmp_path / "s"
    command = ["index", tmp_path / "*.jpg", "--store", path]
    found = run_json(*command, exit_code=3)
    assert [one["source"] for one in found["failed"]] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    assert (found["added"], found["rows"]) == (0, 0)
    result = run(*command)
    assert f"{path} was not made." in result.stdout and "failed: " in result.stderr
    assert not path.exists()
    assert run_json("index", photos, "--store", path, "--model", checkpoint, "-k", 2)["added"] == 5
    assert run_json(*command, "--model", checkpoint, exit_code=3)["rows"] == 5


def test_empty_folder_is_an_error(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    message = fails("index", tmp_path / "empty", "--store", tmp_path / "s", "--model", checkpoint)
    assert "holds no picture" in message
    assert not (tmp_path / "s").exists()  # so that the next command may choose -k and --codec


def test_missing_source_is_an_error_before_a_store_is_made(tmp_path):
    assert "'/nowhere/*.jpg' does not exist" in fails("index", "/nowhere/*.jpg", "--store", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_other_length_than_that_of_the_store_is_an_error(photo_store, photos, checkpoint):
    message = fails("index", photos, "--store", photo_store, "--model", checkpoint, "-k", 3)
    assert "was made with -k 4, not 3" in message


def test_other_model_than_that_of_the_store_is_refused_by_name(photo_store, photos):
    message = fails("index", photos, "--store", photo_store, "--model", default_checkpoint())
    assert "made by another model: 'fwd2bot-test'" in message
    assert "'fwd2bot-tiny'" in message


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(photos, checkpoint, tmp_path):
    picture, running = (photos / "4.png").read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            if running:  # the first time, in the midst of the job, as a user would press Ctrl-C
                running.pop().send_signal(signal.SIGINT)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/4.png"
        sources = [photos / "0.png", photos / "1.png", url, *[photos / "2.png"] * 200]
        command = ["index", *map(str, sources), "--store", str(tmp_path / "s"), "--model", str(checkpoint)]
        process = subprocess.Popen(
            [sys.executable, "-m", "fwd2bot_cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(process)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 130, stderr
        assert stdout == ""
        assert "the same command goes on" in stderr
        assert "Traceback" not in stderr
        assert run_json(*command)["rows"] == 4
        server.shutdown()


# stats, delete, export


def test_stats_are_those_of_the_store(photo_store):
    assert run_json("stats", photo_store) == json.loads(json.dumps(SummaryStore.open(photo_store).stats()))
    assert "rows:               5" in run("stats", photo_store).stdout


def test_check_counts_the_rows_of_a_whole_store_and_fails_for_a_damaged_one(own_store):
    assert run_json("stats", own_store, "--check")["checked_rows"] == 5
    [file] = (own_store / "summaries.lance" / "data").iterdir()
    file.write_bytes(b"garbage" * 1000)
    assert run("stats", own_store).exit_code == 0
    message = fails("stats", own_store, "--check")
    assert "A file of it is damaged or missing" in message and "Columns that cannot be read: id, hash" in message


def test_optimize_joins_files_and_frees_what_was_deleted(own_store, ids):
    SummaryStore.open(own_store).delete(ids[:1])
    before = run_json("stats", own_store)["bytes"]
    kept = run_json("optimize", own_store)
    assert (kept["rows"], kept["bytes_before"], kept["index"]) == (4, before, None)
    found = run_json("optimize", own_store, "--older-than", "0", "--leftovers")
    assert found["fragments"] == 1 and found["bytes"] < kept["bytes"]
    assert "holds 4 pictures in" in run("optimize", own_store, "--older-than", "7d").stdout


def test_optimize_builds_an_index(own_store):
    assert "needs at least 256 rows to learn from, not 5" in fails("optimize", own_store, "--index", "ivf_pq")
    store = SummaryStore.open(own_store)
    summary = torch.randn(300, 4, store.config.width, generator=torch.Generator().manual_seed(0))
    store.add_summary(summary, ids=[str(index) for index in range(300)])
    found = run_json("optimize", own_store, "--index", "hnsw_sq")
    assert (found["index"]["indexed_rows"], found["index"]["unindexed_rows"]) == (305, 0)
    assert "knows 305 of them" in run("optimize", own_store).stdout


@pytest.mark.parametrize("age", ["1", "h", "-1h", "1 h", "2w", ""])
def test_age_of_another_form_is_a_usage_error(own_store, age):
    assert "is no age. Give a number with s, m, h or d" in fails(
        "optimize", own_store, "--older-than", age, exit_code=2
    )


def test_delete_asks_first(own_store, ids):
    refused = run("delete", own_store, ids[0], stdin="n\n")
    assert refused.exit_code == 1
    assert len(SummaryStore.open(own_store)) == 5
    assert run("delete", own_store, ids[0], stdin="y\n").exit_code == 0
    assert ids[0] not in set(SummaryStore.open(own_store))


def test_delete_without_anybody_to_ask_deletes_nothing(own_store, ids):
    assert run("delete", own_store, ids[0]).exit_code == 1
    assert len(SummaryStore.open(own_store)) == 5


def test_delete_with_yes_does_not_ask(own_store, ids):
    found = run_json("delete", own_store, ids[0], ids[1], ids[0], "--purge", "--yes")
    assert found == {"store": str(own_store), "deleted": [ids[0], ids[1]], "purged": True, "rows": 3}


def test_purge_may_be_given_again(own_store, ids):
    for deleted in ([ids[0]], []):
        assert run_json("delete", own_store, ids[0], "--purge", "--yes")["deleted"] == deleted


def test_delete_of_an_unknown_id_deletes_nothing(own_store, ids):
    assert "nobody" in fails("delete", own_store, ids[0], "nobody", "--yes")
    assert len(SummaryStore.open(own_store)) == 5


@pytest.mark.parametrize(("name", "options"), [("a.jsonl", []), ("a.parquet", []), ("a", ["--format", "numpy"])])
def test_export_writes_every_row(photo_store, tmp_path, name, options):
    found = run_json("export", photo_store, "--to", tmp_path / name, *options)
    assert found["rows"] == 5
    assert (tmp_path / name).exists()
    if name == "a.jsonl":
        assert len((tmp_path / name).read_text().splitlines()) == 5


def test_export_without_a_known_ending_is_a_usage_error(photo_store, tmp_path):
    assert "Choose with --format" in fails("export", photo_store, "--to", tmp_path / "a.csv", exit_code=2)


# Without a store


def test_compress_writes_the_summaries_in_order(photos, checkpoint, tmp_path):
    file = tmp_path / "pair.safetensors"
    found = run_json("compress", photos / "1.png", photos / "0.png", "--to", file, "-k", 2, "--model", checkpoint)
    summary = Fwd2BotSummary.load_file(file)
    assert found["num_summary_tokens"] == summary.num_summary_tokens == 2
    alone = tmp_path / "alone.safetensors"
    run_json("compress", photos / "0.png", "--to", alone, "-k", 2, "--model", checkpoint)
    assert (summary[1].tokens - Fwd2BotSummary.load_file(alone).tokens).abs().max() < 1e-2


def test_compress_names_a_folder_and_a_missing_file(photos, tmp_path):
    file = tmp_path / "pictures.safetensors"
    assert f"'{photos}' is a folder. Give its files: {photos}/*" in fails("compress", photos, "--to", file)
    assert "missing.jpg' does not exist or is no file" in fails("compress", tmp_path / "missing.jpg", "--to", file)
    assert not file.exists()


def test_compress_of_a_broken_picture_writes_nothing(photos, checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    file = tmp_path / "pair.safetensors"
    message = fails("compress", photos / "0.png", tmp_path / "broken.jpg", "--to", file, "--model", checkpoint)
    assert "Picture 1" in message
    assert not file.exists()


def test_info_reads_config_and_weights(checkpoint):
    found = run_json("info", checkpoint)
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert found["parameters"] == sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118
    assert (found["kind"], found["backbone"], found["num_summary_tokens"]) == ("full", "llava", 8)


def test_info_without_a_checkpoint_is_of_the_embedded_one():
    assert run_json("info")["checkpoint"] == str(default_checkpoint())


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "nowhere", "runs/nowhere/final"])
def test_missing_checkpoint_is_an_error_at_once(name, photos, tmp_path):
    for command in (["info", name], ["index", photos, "--store", tmp_path / "s", "--model", name]):
        message = fails(*command)
        assert f"There is no folder '{name}', and an id on the Hub has the form owner/name" in message
        assert "Give the folder of a checkpoint" in message
    assert not (tmp_path / "s").exists()


def test_id_that_the_hub_does_not_give_is_an_error_that_names_both_places():
    assert "There is no folder 'you/nowhere', and the Hub gives no checkpoint of that id: " in fails(
        "info", "you/nowhere"
    )


def test_tour_prints_its_results_as_json(checkpoint, tmp_path, monkeypatch):
    for name in ("set_verbosity_error", "disable_progress_bar"):  # of the whole process
        monkeypatch.setattr(demo.logging, name, lambda: None)
    found = run_json("tour", "--model", checkpoint, "--output", tmp_path / "hits.png")
    assert set(found["results"]) == {"uncompressed", "k=8", "k=2"}
    assert (tmp_path / "hits.png").is_file()


def test_demo_without_gradio_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("gradio", "fwd2bot.space_app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'This needs gradio, which is not installed: pip install "fwd2bot[space]"' in fails("demo")


def test_error_of_the_tour_is_one_line(checkpoint, tmp_path):
    assert "is a folder" in fails("tour", "--model", checkpoint, "--output", tmp_path)


# On a terminal and off it


def test_table_on_a_terminal_shows_markup_and_escapes_as_text(monkeypatch):
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        print_table(["id"], [["[red]\x1b[2Jid"]])
        terminal.flush()
        shown = os.read(reader, 10_000).decode()
    os.close(reader)
    assert "[red]" in shown
    assert "\x1b[2J" not in shown
    assert "\x1b" in shown  # the head of the table is bold


def test_json_has_null_for_what_is_no_number(capsys):
    print_json({"year": [float("nan"), 1.5]})
    assert json.loads(capsys.readouterr().out) == {"year": [None, 1.5]}
