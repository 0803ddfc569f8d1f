import pytest
import yaml

from fwd2bot.training.recipe import RECIPES, load_recipe


def write(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


BASES = ("photos.yaml",)  # what others stand upon, no recipe by itself


@pytest.mark.parametrize("name", sorted({path.name for path in RECIPES.glob("*.yaml")} - set(BASES)))
def test_shipped_recipe_loads_by_its_name(name):
    assert load_recipe(name).kind == ("backbone" if "backbone" in name else "fwd2bot")


def test_overrides_are_yaml_under_dotted_keys():
    recipe = load_recipe(
        "fwd2bot.yaml", ["model.summary_lengths=[1, 4]", "training.max_steps=7", "optimizer.learning_rate=1e-3"]
    )
    assert recipe.model.summary_lengths == [1, 4]
    assert recipe.training["max_steps"] == 7
    assert recipe.optimizer.learning_rate == 0.001


def test_what_is_no_yaml_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text("kind: [fwd2bot")
    with pytest.raises(ValueError, match="recipe.yaml cannot be read as YAML: .*line 1"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "picture.yaml").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match="picture.yaml is no text"):
        load_recipe(tmp_path / "picture.yaml")
    with pytest.raises(ValueError, match=r"the override 'model.summary_lengths=\[1' cannot be read as YAML"):
        load_recipe("fwd2bot.yaml", ["model.summary_lengths=[1"])


def test_whole_number_where_a_fraction_is_wanted_becomes_one():
    recipe = load_recipe("backbone.yaml", ["optimizer.weight_decay=1"])
    assert isinstance(recipe.optimizer.weight_decay, float)


@pytest.mark.parametrize(
    ("override", "unknown", "allowed"),
    [
        ("model.depth=3", "depth", "layers"),
        ("data.picture=3", "picture", "pictures"),
        ("optimizer.lr=3", "lr", "learning_rate"),
        ("training.max_step=3", "max_step", "max_steps"),
        ("trainig.max_steps=3", "trainig", "training"),
    ],
)
def test_unknown_key_is_fatal_and_the_allowed_ones_are_listed(override, unknown, allowed):
    with pytest.raises(ValueError, match=f"unknown key {unknown} in .*{allowed}"):
        load_recipe("backbone.yaml", [override])


@pytest.mark.parametrize("override", ["model.layers=many", "model.layers=true", "model.layers=1.5", "resume=perhaps"])
def test_value_of_another_type_is_fatal(override):
    with pytest.raises(ValueError, match=override.split("=")[0]):
        load_recipe("backbone.yaml", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps=abc", "training.max_steps is 'abc', of type str; it must be int"),
        ("training.max_steps=1.5", "training.max_steps is 1.5, of type float"),
        ("training.use_cpu=yes", "training.use_cpu is 'yes', of type str; it must be bool"),
        ("training.eval_strategy=false", "training.eval_strategy is False, of type bool; it must be str"),
        ("training.learning_rate=0.1", "training.learning_rate would have no effect: set optimizer.learning_rate"),
        ("training.optim=adafactor", "set optimizer.name instead"),
        ("training.weight_decay=0.1", "set optimizer.weight_decay instead"),
        ("training.adam_beta2=0.9", "set optimizer.betas instead"),
        ("training.adam_epsilon=1e-6", "training.adam_epsilon would have no effect: leave it out"),
    ],
)
def test_training_value_that_would_fail_late_or_do_nothing_is_fatal(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("backbone.yaml", [override])


def test_no_is_a_word_and_not_a_boolean():
    overrides = ["training.eval_strategy=no", "training.save_strategy=no", "training.bf16=True", "resume=false"]
    recipe = load_recipe("backbone.yaml", overrides)
    assert (recipe.training["eval_strategy"], recipe.training["save_strategy"]) == ("no", "no")
    assert recipe.training["bf16"] is True and recipe.resume is False


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learning_rate_is_that_of_the_matrices_too_unless_they_have_their_own(tmp_path, name):
    path = write(tmp_path, kind="fwd2bot", optimizer={"name": name, "learning_rate": 1e-5})
    assert load_recipe(path).optimizer.matrix_learning_rate == 1e-5
    assert load_recipe(path, ["optimizer.matrix_learning_rate=1e-3"]).optimizer.matrix_learning_rate == 1e-3


def test_override_without_a_value_is_fatal():
    with pytest.raises(ValueError, match="key=value"):
        load_recipe("backbone.yaml", ["training.max_steps"])


def test_override_inside_a_single_value_is_fatal():
    with pytest.raises(ValueError, match="layers"):
        load_recipe("backbone.yaml", ["model.layers.first=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.several.shares=0.5", "unknown key shares in data.several; .*share"),
        ("model.freeze=['(']", r"model.freeze has '\(', which is no regular expression"),
        ("model.freeze=[1]", "model.freeze has 1, which is no regular expression"),
        ("model.trained_stage=compress", "model.trained_stage is 'compress'; choose one of both, generate"),
        ("data.several.share=1.5", "data.several.share is 1.5; it must be in 0..1"),
        ("data.several.share=half", "data.several.share is 'half', of type str; it must be float"),
        ("data.several.pictures=[1, 2]", r"data.several.pictures is \[1, 2\]; list whole numbers of 2 or more"),
        ("data.several.pictures=[]", r"data.several.pictures is \[\]"),
        ("data.several.questions={who: 1}", "unknown kind who in data.several.questions; choose from which, how many"),
        ("data.several=3", "data.several is 3; give keys and values"),
        ("data.pictures=4", "data.several.pictures asks for 5 pictures in a row, but data.pictures is 4"),
    ],
)
def test_setting_of_several_pictures_that_cannot_be_is_fatal(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("fwd2bot_several.yaml", [override])


def test_unknown_kind_is_fatal(tmp_path):
    with pytest.raises(ValueError, match="backbone, fwd2bot"):
        load_recipe(write(tmp_path, kind="teacher"))


def test_missing_recipe_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="backbone.yaml, comparison.yaml, fwd2bot.yaml"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("name", ["llava15_7b", "qwen25_vl_3b", "smolvlm_500m"])
def test_recipes_on_real_backbones_stand_upon_one_base(name):
    recipe, base = load_recipe(f"{name}.yaml"), load_recipe("real.yaml")
    assert "/" in recipe.model.backbone and recipe.model.summary_lengths == [16, 32]
    assert recipe.data.sources == base.data.sources and recipe.data.contrastive_max_tokens == 30
    assert recipe.training == base.training | {"output_dir": recipe.training["output_dir"]}
