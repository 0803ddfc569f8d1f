"""The folder of a Space: what is in it, and that it runs by itself."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from fwd2bot.pipelines.embedded import default_checkpoint
from fwd2bot.space_app import export as module
from fwd2bot.space_app.export import export, requirements

ROOT = Path(__file__).parents[2]
METADATA = """Metadata-Version: 2.4
Name: {name}
Version: 0.1.0
Requires-Dist: torch>=2.13
Requires-Dist: transformers<6,>=5.17
Requires-Dist: gradio<6.32,>=6.31; extra == "space"
Requires-Dist: lancedb>=0.40; extra == "store"
"""


def make_wheel(folder, name="fwd2bot"):
    path = folder / f"{name}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-0.1.0.dist-info/METADATA", METADATA.format(name=name))
    return path


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "6.31.0")
    export(tmp_path / "space", make_wheel(tmp_path), pictures=ROOT / "docs")
    return tmp_path / "space"


def test_folder_holds_app_readme_requirements_wheel_checkpoint_and_pictures(exported):
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "fwd2bot-0.1.0-py3-none-any.whl"} <= files
    assert {f"pictures/space-{name}.png" for name in ("search", "ask", "look")} <= files
    held = {path.relative_to(default_checkpoint()).as_posix() for path in default_checkpoint().rglob("*.*")}
    assert {f"checkpoint/{name}" for name in held if "__pycache__" not in name} <= files
    compile((exported / "app.py").read_text(), "app.py", "exec")


def test_readme_begins_with_the_header_of_a_space(exported):
    header = (exported / "README.md").read_text().split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    assert (fields["sdk"], fields["sdk_version"], fields["python_version"]) == ("gradio", "6.31.0", '"3.11"')
    assert fields["app_file"] == "app.py"
    assert len(fields["short_description"]) <= 60


def test_requirements_have_ranges_and_are_those_of_the_space_alone(exported):
    lines = (exported / "requirements.txt").read_text().splitlines()
    assert lines == ["gradio<6.32,>=6.31", "torch>=2.13", "transformers<6,>=5.17"]


def test_export_replaces_what_it_wrote_and_nothing_else(exported, tmp_path):
    mine = (".git/config", "checkpoint/notes.txt", "visits.db")
    for name in mine:
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_text("mine")
    (exported / "app.py").write_text("edited")
    export(exported, make_wheel(tmp_path))  # without pictures
    assert [(exported / name).read_text() for name in (".git/config", "checkpoint/notes.txt", "visits.db")] == [
        "mine"
    ] * 3
    assert "serve(SpaceOptions())" in (exported / "app.py").read_text()
    assert not (exported / "pictures").exists()


def test_other_folder_can_be_named_after_the_usual_one(tmp_path, monkeypatch):
    """What `make space-export ARGS="--to DIR"` would run."""
    other = tmp_path / "other"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "space-export", f"ARGS=--to {other}"]
    recipe = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    [line] = [line for line in recipe.splitlines() if "-m fwd2bot.space_app.export" in line]
    arguments = shlex.split(line.split("-m fwd2bot.space_app.export")[1])
    wheel = [str(make_wheel(tmp_path)) if "*.whl" in one else one for one in arguments]
    monkeypatch.setattr(module, "version", lambda name: "6.31.0")
    monkeypatch.setattr(sys, "argv", ["export", *wheel])
    monkeypatch.chdir(ROOT)
    module.main()
    assert (other / "app.py").is_file() and (other / "pictures" / "space-ask.png").is_file()


def test_clone_of_an_empty_repository_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "6.31.0")
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    assert "app.py" in export(tmp_path / "clone", make_wheel(tmp_path))
    assert (tmp_path / "clone" / ".git").is_dir()


def test_folder_that_was_not_exported_is_refused_and_left_alone(tmp_path, monkeypatch):
    """Such as another Space, which has files of the same names."""
    monkeypatch.setattr(module, "version", lambda name: "6.31.0")
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("app.py", "README.md", "requirements.txt", "precious.db"):
        (mine / name).write_text("mine")
    with pytest.raises(FileExistsError, match="no Space that was exported before"):
        export(mine, make_wheel(tmp_path))
    assert all(path.read_text() == "mine" for path in mine.iterdir()) and len(list(mine.iterdir())) == 4


def test_file_in_the_way_is_refused_before_anything_is_changed(exported, tmp_path):
    (exported / "pictures" / "space-look.png").write_text("mine")
    marker = exported / module.MARKER
    marker.write_text(marker.read_text().replace('"pictures/space-look.png",', ""))
    with pytest.raises(FileExistsError, match="space-look.png is there and was not exported before"):
        export(exported, make_wheel(tmp_path), pictures=ROOT / "docs")
    assert (exported / "app.py").exists()


def test_marker_that_names_files_outside_deletes_none(exported, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (exported / module.MARKER).write_text('{"files": ["../precious", ".git/config"]}')
    for path in sorted(exported.rglob("*"), reverse=True):
        if path.is_file() and path.name != module.MARKER:
            path.unlink()
    (exported / ".git").mkdir()
    (exported / ".git" / "config").write_text("mine")
    export(exported, make_wheel(tmp_path))
    assert (tmp_path / "precious").exists() and (exported / ".git" / "config").exists()


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.whl is not there"):
        export(tmp_path / "space", tmp_path / "no.whl")
    with pytest.raises(ValueError, match="wheel of 'other'"):
        requirements(make_wheel(tmp_path, "other"))


@pytest.mark.slow
def test_exported_space_runs_in_an_empty_environment(tmp_path):
    """A wheel of this checkout, an environment of its requirements alone, `python app.py`, a question."""
    pytest.importorskip("gradio")
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "outputs")
    shutil.copytree(ROOT, tmp_path / "source", ignore=leave_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, tmp_path / "source"]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    folder, python = tmp_path / "space", tmp_path / "env" / "bin" / "python"
    export(folder, wheel)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", "-r", folder / "requirements.txt"]
    subprocess.run(install, check=True, capture_output=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [python, "app.py"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        try:
            lines = []
            for line in running.stdout:
                lines.append(line)
                if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            assert found, "".join(lines)
            assert "error" not in "".join(lines)
            with urlopen(found[0]) as page:
                assert page.status == 200
            program = (
                "import sys; from gradio_client import Client; client = Client(sys.argv[1], verbose=False);"
                "print(client.predict('How many carrots are there?', ['gallery-43'], 0, 8, True, api_name='/ask'))"
            )
            done = subprocess.run([python, "-c", program, found[0]], capture_output=True, text=True, env=environment)
            assert "'answer': '3'" in done.stdout, done.stderr
            other = program.replace("How many carrots are there?", "Сколько морковок?")
            done = subprocess.run([python, "-c", other, found[0]], capture_output=True, text=True, env=environment)
            assert "simple English only" in done.stderr
        finally:
            running.terminate()
