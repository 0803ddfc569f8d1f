"""lmms-eval's own evaluation on a tiny local task, with a tiny random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value

pytest.importorskip("lmms_eval", reason="needs the extra lmms-eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.models import get_model  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

from fwd2bot.training.lmms_eval_model import Fwd2BotLmms, cut, messages  # noqa: E402

UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")] if doc["image"] is not None else []


def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""
QUESTIONS = ["Which colour?", "What?", "Is it <image> here?", "Two and two?"]
NEW = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_fwd2bot().save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


def answers(k):
    """What the model says to the questions about the pictures, one at a time; the last question has no picture."""
    model, processor = tiny.tiny_fwd2bot(), tiny.tiny_processor()
    said = []
    for question, picture in zip(QUESTIONS, [*tiny.pictures(3), None], strict=True):
        prompt = processor.apply_chat_template(messages(question, picture is not None), add_generation_prompt=True)
        shown = {} if picture is None else {"images": [picture]}
        inputs = processor(text=[prompt], **shown)
        options = {} if picture is None else {"num_summary_tokens": k}
        if k is None:
            inputs = processor.backbone_processor(text=[prompt], return_tensors="pt", **shown)
            ids = model.generate_uncompressed(**inputs, max_new_tokens=NEW, do_sample=False)
        else:
            ids = model.generate(**inputs, **options, max_new_tokens=NEW, do_sample=False)
        said.append(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    return [text.strip() for text in said]


@pytest.fixture
def task(tmp_path):
    """A folder with a task whose expected answers are given, all but the last."""

    def write(expected):
        features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
        columns = {"image": [*tiny.pictures(3), None], "question": QUESTIONS, "answer": expected}
        rows = Dataset.from_dict(columns, features=features)
        DatasetDict({"test": rows}).save_to_disk(tmp_path / "data")
        (tmp_path / "utils.py").write_text(UTILS)
        values = {
            "task": "local_questions",
            "dataset_path": str(tmp_path / "data"),
            "dataset_kwargs": {"load_from_disk": True},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "generation_kwargs": {"max_new_tokens": NEW, "temperature": 0, "do_sample": False},
            "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        }
        functions = "doc_to_visual: !function utils.doc_to_visual\nprocess_results: !function utils.process_results\n"
        (tmp_path / "local_questions.yaml").write_text(yaml.safe_dump(values) + functions)
        return tmp_path

    return write


@pytest.mark.parametrize("setting", ["num_summary_tokens=2", "uncompressed=True"])
def test_local_task_runs_through_the_plugin_and_counts_the_right_answers(checkpoint, task, setting):
    expected = answers(2 if setting == "num_summary_tokens=2" else None)
    assert len(set(expected)) > 1
    folder = task([*expected[:3], "another"])
    results = simple_evaluate(
        model="fwd2bot",
        model_args=f"pretrained={checkpoint},{setting},device=cpu",
        tasks=["local_questions"],
        task_manager=TaskManager(include_path=str(folder)),
        batch_size=3,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results["results"]["local_questions"]["right,none"] == 0.75


TWO = """
import json, sys
import torchvision_on_cpu
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

checkpoint, folder = sys.argv[1:]
found = simple_evaluate(
    model="fwd2bot",
    model_args=f"pretrained={checkpoint},num_summary_tokens=2",
    tasks=["local_questions"],
    task_manager=TaskManager(include_path=folder),
    bootstrap_iters=0,
    distributed_executor_backend="accelerate",
)
if found:  # on the first process alone
    rows = found["samples"]["local_questions"]
    said = {"results": found["results"]["local_questions"], "rows": len(rows)}
    open(f"{folder}/found.json", "x").write(json.dumps(said))
"""


def test_two_processes_share_the_rows(checkpoint, task, tmp_path):
    folder = task([*answers(2)[:3], "another"])
    script = tmp_path / "script.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    paths = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(script), str(checkpoint), str(folder)]
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "found.json").read_text())
    assert found["rows"] == 4 and found["results"]["right,none"] == 0.75


def test_model_is_registered_by_the_entry_point():
    assert get_model("fwd2bot") is Fwd2BotLmms


def test_pictures_stand_where_the_text_marks_them_or_before_it():
    image = {"type": "image"}
    assert messages("Is <image> like <image>?", 2)[0]["content"] == [
        {"type": "text", "text": "Is"},
        image,
        {"type": "text", "text": "like"},
        image,
        {"type": "text", "text": "?"},
    ]
    assert messages("What? <image>", 2)[0]["content"] == [image, image, {"type": "text", "text": "What?"}]
    assert messages("What?", 0)[0]["content"] == [{"type": "text", "text": "What?"}]


def test_answer_ends_where_the_task_says():
    assert cut("yes\n\nno. maybe", ["\n\n", "."]) == "yes"
    assert cut("yes", []) == "yes"


def test_a_length_that_the_model_does_not_have_is_refused(checkpoint):
    with pytest.raises(ValueError, match="num_summary_tokens"):
        Fwd2BotLmms(str(checkpoint), num_summary_tokens=9, device="cpu")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"dtype": "fp16"}, "dtype must be one of float32, bfloat16, float16, got 'fp16'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number from 1 on, got 'auto'"),
        ({"batch_size": 0}, "got 0"),
    ],
)
def test_a_dtype_or_batch_size_that_there_is_not_is_refused(checkpoint, given, named):
    with pytest.raises(ValueError, match=named):
        Fwd2BotLmms(str(checkpoint), device="cpu", **given)
