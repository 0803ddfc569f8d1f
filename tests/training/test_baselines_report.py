"""The page of the comparison: what is made of its JSON files."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from fwd2bot.training.baselines import grid, report


def result(name, method, seed, right, lengths=(4,), **more):
    """What a row leaves behind, with made-up figures."""
    cost = {"tokens_per_image": 4, "bytes_per_image": 1536, "cache_bytes": 9216, "first_token_ms": 3.21}
    setting = "uncompressed" if not lengths else "k=4"
    answers = {"all": right, "background": 1.0, "count": 0.25, "place": 0.5}
    figures = {setting: {"answers": answers, "presence": {"adversarial": {"f1": 0.5}}}, "cost": {setting: cost}}
    values = {
        "name": name,
        "method": method,
        "seed": seed,
        "config": {},
        "rank": 1.0,
        "rate": 1.0,
        "about": "what it is",
    }
    values |= {"lengths": list(lengths)}
    values |= {
        "backbone_sha256": "ab" * 32,
        "steps": 10,
        "steps_done": 10,
        "batch_size": 2,
        "row_length": 96,
        "lora_rank": 4,
    }
    values |= {"pictures": 9, "test_pictures": 5, "split": "validation", "seconds": 61.0, "loss": [2.0, 1.25]}
    values |= {
        "trained_parameters": 1234,
        "fingerprint": "0123456789",
        "versions": {"torch": "2"},
        "command": "python --rows one two --steps 10 --seeds 0",
    }
    return values | {"figures": figures} | more


def write(folder, *results):
    folder.mkdir(exist_ok=True)
    for one in results:
        (folder / f"{one['name']}-seed{one['seed']}.json").write_text(json.dumps(one))
    return folder


def test_rows_made_otherwise_are_named_with_what_made_them(tmp_path):
    """By another version or with other options; the folder alone does not count."""
    command = "python -m fwd2bot.training.baselines.run {} --rows {} --steps 10{}"
    folder = write(
        tmp_path / "results",
        result("cache", "cache", 0, 0.5, command=command.format("there", "cache", "")),
        result("pooling-k4", "pooling", 0, 0.5, command=command.format("here", "pooling-k4", "")),
        result("pooling-k2", "pooling", 0, 0.5, command=command.format("here", "pooling-k2", " --minutes 3")),
        result("pooling-k1", "pooling", 0, 0.5, command=command.format("here", "x", ""), versions={"torch": "3"}),
    )
    report.main([str(folder), str(tmp_path / "docs")])
    lines = (tmp_path / "docs" / "results.md").read_text().splitlines()
    plain = "`python -m fwd2bot.training.baselines.run here --steps 10"
    assert [line.partition("name: ")[2] for line in lines if line.startswith("Command")] == [f"{plain}` (torch 2)."]
    assert sorted(line for line in lines if line.startswith("Otherwise")) == [
        f"Otherwise pooling-k1: {plain}` (torch 3).",
        f"Otherwise pooling-k2: {plain} --minutes 3` (torch 2).",
    ]


def test_shipped_setting_is_drawn_with_the_methods_and_is_an_ablation_in_the_tables(tmp_path):
    changed = {"config": {"summary_norm": False}}
    found = [result("fwd2bot", "fwd2bot", 0, 0.5), result("before_norm", "before_norm", 0, 0.6, **changed)]
    assert list(report._points(found)) == ["fwd2bot", "before_norm"]
    report.main([str(write(tmp_path / "results", *found)), str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.index("| fwd2bot |") < page.index("## Fwd2Bot with one thing changed") < page.index("| before_norm |")


def test_plots_without_matplotlib_are_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = write(tmp_path / "results", result("cache", "cache", 0, 0.5))
    with pytest.raises(SystemExit, match="^error: .*pip install matplotlib"):
        report.main([str(folder), str(tmp_path / "docs")])


def test_report_has_mean_and_range_of_seeds_costs_plots_and_what_was_not_run(tmp_path):
    folder = write(
        tmp_path / "results",
        *(result("pooling-k4", "pooling", seed, right) for seed, right in enumerate((0.5, 0.6, 0.7))),
        result("uncompressed", "uncompressed", 0, 0.8, lengths=(), loss=None, steps_done=0),
    )
    report.main([str(folder), str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| pooling | 4 | 60.0 (50.0 to 70.0) | 37.5 (37.5 to 37.5) | 50.0 (50.0 to 50.0) |" in page
    assert "| 1,536 | 4,608 | 3 |" in page and "| uncompressed | 4 | 80.0 |" in page
    assert f"4 of {len(grid.rows())} rows were run" in page
    assert "- fwd2bot (seed 0, 1, 2): the base" in page and "- pooling-k4 (" not in page
    assert "2.00 to 1.25" in page and "Command, folders by their last name: `python --steps 10`" in page
    for name in ("results-tokens.png", "results-bytes.png"):
        assert f"({name})" in page and (tmp_path / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_table_has_a_line_for_each_length_and_ablations_apart(tmp_path):
    several = result("fwd2bot", "fwd2bot", 0, 0.5)
    cost = {"tokens_per_image": 16, "bytes_per_image": 6144, "cache_bytes": 36864, "first_token_ms": 3.2}
    several["figures"]["k=16"] = {"answers": {"all": 0.75}}
    several["figures"]["cost"]["k=16"] = cost
    changed = result("rank-half", "fwd2bot", 0, 0.4, rank=0.5)
    slowed = result("pooling-k4-rate0.3", "pooling", 0, 0.2, rate=0.3)
    page = report.report([several, changed, result("pooling-k4", "pooling", 0, 0.3), slowed], {})
    methods, ablations = page.split("## Methods")[1].split("## Fwd2Bot with one thing changed")
    methods, rates = methods.split("## With lower learning rates")
    assert (
        "| pooling-k4-rate0.3 | 4 | 20.0 |" in rates
        and "| means over a grid of k rectangles | learning rates x0.3 |" in page
    )
    lines = [line for line in methods.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[:3] for line in lines] == [
        ["| fwd2bot", "4", "50.0"],
        ["| ", "16", "75.0"],
        ["| pooling", "4", "30.0"],
    ]
    assert "| rank-half | 4 | 40.0 |" in ablations.split("## The rows")[0]


def test_findings_of_a_file_by_hand_stand_above_the_figures(tmp_path):
    folder = write(tmp_path / "results", result("fwd2bot", "fwd2bot", 0, 0.5))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results-findings.md").write_text("## What we found\n\nLittle.\n")
    for _ in range(2):  # the page is made anew from both
        report.main([str(folder), str(tmp_path / "docs")])
        page = (tmp_path / "docs" / "results.md").read_text()
        assert page.count("Little.") == 1
        assert page.index("One frozen backbone") < page.index("Little.") < page.index("![Questions")


def test_further_seeds_of_a_row_stand_in_its_line_and_are_counted_apart(tmp_path):
    seeds = [result("rank-half", "fwd2bot", seed, right, rank=0.5) for seed, right in ((0, 0.5), (3, 0.7))]
    others = [result("fwd2bot", "fwd2bot", seed, 0.5) for seed in (4, 1, 0)]
    write(tmp_path, *seeds, *others, result("rank-double", "fwd2bot", 0, 0.5, rank=2))
    found = report.read(tmp_path)
    assert [one["name"] for one in found] == ["fwd2bot"] * 3 + ["rank-half"] * 2 + ["rank-double"]
    assert [one["seed"] for one in found] == [0, 1, 4, 0, 3, 0]
    page = report.report(found, {})
    assert f"4 of {len(grid.rows())} rows were run, and further seeds (2)." in page
    assert "| rank-half | 4 | 60.0 (50.0 to 70.0) |" in page


def test_further_comparison_has_its_own_plot_against_tokens(tmp_path):
    folder = write(tmp_path / "results", result("fwd2bot", "fwd2bot", 0, 0.5))
    write(folder / "long", *(result(name, name, 0, 0.7, steps=20) for name in ("fwd2bot", "cache")))
    write(folder / "one-method", result("fwd2bot", "fwd2bot", 0, 0.7, steps=30))
    report.main([str(folder), str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "results.md").read_text()
    main, apart = page.split("## Apart: one method")[0].split("## Apart: long")
    assert "(results-long-tokens.png)" in apart and "long" not in main and "## Apart: one method" in page
    assert {file.name for file in (tmp_path / "docs").glob("*.png")} == {
        "results-tokens.png",
        "results-bytes.png",
        "results-long-tokens.png",
    }


def test_page_in_docs_is_what_the_results_and_the_findings_give(tmp_path):
    root = Path(__file__).parents[2]
    shutil.copy(root / "docs" / "results-findings.md", tmp_path)
    report.main([str(root / "benchmarks" / "comparison"), str(tmp_path)])
    assert (tmp_path / "results.md").read_text() == (root / "docs" / "results.md").read_text()
    assert {file.name for file in tmp_path.glob("*.png")} == {file.name for file in root.glob("docs/results*.png")}


def test_file_that_is_no_result_is_named(tmp_path):
    write(tmp_path, result("fwd2bot", "fwd2bot", 0, 0.5))
    broken = result("cache", "cache", 0, 0.5)
    for text in ("{", "[]", "{}", json.dumps(broken | {"figures": None}), '{"name": "cache", "figures": {}}'):
        (tmp_path / "cache-seed0.json").write_text(text)
        with pytest.raises(SystemExit, match=r"error: .*cache-seed0.json is no result of a row \(.*run its row again"):
            report.main([str(tmp_path), str(tmp_path / "docs")])
    (tmp_path / "cache-seed0.json").write_text(json.dumps(broken))
    shutil.copy(tmp_path / "cache-seed0.json", tmp_path / "cache-seed0-old.json")
    with pytest.raises(SystemExit, match="error: .*cache-seed0-old.json is the result of cache-seed0.json; a copy"):
        report.main([str(tmp_path), str(tmp_path / "docs")])


def test_result_of_a_row_that_the_grid_has_not_is_refused(tmp_path):
    write(tmp_path, result("fwd2bot", "fwd2bot", 0, 0.5), result("renamed", "fwd2bot", 0, 0.5))
    with pytest.raises(ValueError, match="results of renamed, which is no row of the grid; take them out"):
        report.read(tmp_path)


def test_report_of_nothing_says_that_nothing_was_run(tmp_path):
    report.main([str(tmp_path), str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.count("\n- ") == len({row.name for row in grid.rows()}) and "png" not in page
    assert not list((tmp_path / "docs").glob("*.png"))


def test_rows_say_what_they_change(tmp_path):
    changed = result("rank-half", "fwd2bot", 0, 0.5, config={"image_prompt": "Look:"}, rank=0.5)
    folder = write(tmp_path / "results", changed, result("fixed-k4", "fwd2bot", 0, 0.5))
    report.main([str(folder), str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| the base: the summary from behind the final norm | image_prompt=Look:, rank x0.5 |" in page
    assert "| the base: the summary from behind the final norm | for 4 tokens alone |" in page
    assert "- fixed-k16 (seed 0): the base: the summary from behind the final norm, for 16 tokens alone" in page
    assert "- rank-double (seed 0): the base: the summary from behind the final norm, rank x2" in page
    assert "final norm, image_prompt=Remember:, text_prompt=Remember:" in page


def test_folder_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "missing"), str(tmp_path / "docs")])
    assert "missing is no folder; give the one that baselines.run wrote" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), str(tmp_path / "page.md")])
    assert "page.md is no folder; name one for results.md and its plots" in capsys.readouterr().err


def test_results_of_different_budgets_are_not_put_into_one_table(tmp_path):
    write(tmp_path, result("fwd2bot", "fwd2bot", 0, 0.5), result("pooling-k4", "pooling", 0, 0.5, steps=20))
    with pytest.raises(ValueError, match=r"steps: 10 \(fwd2bot-seed0.json\), 20 \(pooling-k4-seed0.json\)"):
        report.read(tmp_path)


def test_results_of_different_recipes_are_not_put_into_one_table(tmp_path):
    one, other = ({"optimizer.learning_rate": rate} for rate in (0.1, 0.2))
    first, second = result("fwd2bot", "fwd2bot", 0, 0.5, recipe=one), result("cache", "cache", 0, 0.5, recipe=other)
    before = result("pooling-k4", "pooling", 0, 0.5)  # by a version that kept none
    assert len(report.read(write(tmp_path / "same", first, before))) == 2
    with pytest.raises(ValueError, match="learning_rate was 0.1 and is 0.2; report them apart"):
        report.read(write(tmp_path / "other", first, second))


def test_folder_of_results_is_another_comparison_with_the_figures_of_its_data_sets(tmp_path):
    def judged(name, right, **more):
        values = result(name, name, 0, right)
        data = {"sources": {"photos": 3.0, "rooms": 1.0}, "judged": ["photos", "rooms"], "split": None}
        data |= {"row_length": None, "pictures": None}
        counts = {"photos": {"rows": 500, "pictures": 500, "captions": 2500}, "rooms": {"rows": 858, "pictures": 92}}
        figures = {"photos": {"captions": {"cider": right}} | more, "rooms": {"exact_match": right / 2}}
        return values | data | {"figures": {"judged": counts, "k=4": figures, "cost": values["figures"]["cost"]}}

    folder = write(tmp_path / "results", result("pooling-k4", "pooling", 0, 0.5))
    recall = {"text_to_image": {"recall@10": 0.25}}
    write(folder / "real-data", judged("fwd2bot", 0.8, **recall), judged("cache", 0.6))
    write(folder / "nothing-yet")
    report.main([str(folder), str(tmp_path / "docs")])
    main, apart = (tmp_path / "docs" / "results.md").read_text().split("## Apart: real data")
    assert f"1 of {len(grid.rows())} rows were run" in main and "photos" not in main and "nothing yet" not in apart
    assert apart.rstrip().endswith("The other rows of the grid were not run here.")
    assert "10 steps of 2 samples of data sets (photos 75%, rooms 25%)" in apart and "None" not in apart
    assert "(photos: 500 rows, 500 pictures, 2,500 captions; rooms: 858 rows, 92 pictures; CIDEr times 100)" in apart
    header, _, first, second = [line for line in apart.splitlines() if line.startswith("|")][:4]
    assert header.startswith(
        "| row | tokens | photos: CIDEr | photos: caption finds picture, recall@10 | rooms: right |"
    )
    assert first.startswith("| fwd2bot | 4 | 80.0 | 25.0 | 40.0 |")
    assert second.startswith("| cache | 4 | 60.0 |  | 30.0 |")
    report.main([str(folder / "real-data"), str(tmp_path / "alone")])  # by itself: a table, nothing to plot
    page = (tmp_path / "alone" / "results.md").read_text()
    assert "| photos: CIDEr |" in page and "png" not in page
