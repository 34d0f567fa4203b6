"""A recipe's problems: all of them, each with its line, its full path and what was meant; and the way back to YAML."""

import subprocess
import sys

import pytest

from raecli.errors import ExitCode, UsageError
from raecli.recipe.load import dump_recipe, load_recipe, recipe_from_options
from raecli.recipe.recipes import EncodeCacheRecipe, SampleRecipe, TrainDecoderRecipe, TrainDiffusionRecipe

GOOD = """\
stage: train-diffusion
paper: none
cache: latents/x
output: runs/x
optimizer:
  learning_rate: 2e-4
  betas: [0.9, 0.95]
schedule:
  kind: constant
duration: 10 steps
batch_size: 4
ema_decay: 0.99
model:
  kind: dit
  width: 32
  depth: 2
  heads: 2
flow:
  time_shift_base: 128
"""


@pytest.fixture
def write(tmp_path):
    """Writes GOOD with some of its lines replaced, or any other text."""

    def write_recipe(*swaps: tuple[str, str], text: str = GOOD):
        for old, new in swaps:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write_recipe


def complaint(path, overrides=(), recipe_class=None) -> list[str]:
    """The lines of the one message."""
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe_class, path, overrides)
    assert caught.value.exit_code is ExitCode.USAGE
    message = str(caught.value)
    assert "pydantic" not in message
    assert "http" not in message
    return message.splitlines()


def test_a_good_recipe_loads_with_numbers_and_lists_as_the_spec_holds_them(write):
    spec = load_recipe(TrainDiffusionRecipe, write())
    assert spec.optimizer.learning_rate == 2e-4
    assert spec.optimizer.betas == (0.9, 0.95)
    assert spec.model.head_width is None
    assert load_recipe(None, write()) == spec


def test_all_problems_are_told_in_one_message_by_line(write):
    path = write(
        ("output: runs/x\n", ""),
        ("learning_rate: 2e-4", "learning_rate: on"),
        ("duration: 10 steps", "duration: ten steps"),
        ("batch_size: 4", "batch_size: 4\nbatch_size: 8"),
        ("width: 32", 'width: "abc"'),
        ("  depth: 2\n", ""),
        ("time_shift_base: 128", "time_shft_base: 128"),
    )
    assert complaint(path) == [
        f"{path} has 7 problems",
        "  line 1, output: missing",
        '  line 5, optimizer.learning_rate: must be a number, found "on"',
        '  line 9, duration: a duration reads like "40 epochs" or "1500 steps", found "ten steps"',
        "  line 11, batch_size: duplicate key, first on line 10",
        "  line 13, model.depth: missing",
        '  line 15, model.width: must be an integer, found "abc"',
        "  line 18, flow.time_shft_base: unknown key; did you mean time_shift_base?",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("width: 32", "width: 32.0", "  line 15, model.width: must be an integer, found 32.0"),
        ("width: 32", "width: true", "  line 15, model.width: must be an integer, found true"),
        ("width: 32", "width: [32]", "  line 15, model.width: must be an integer, found a list of 1"),
        ("width: 32", "width: 0", "  line 15, model.width: must be at least 1, found 0"),
        ("width: 32", "width:", "  line 15, model.width: must be an integer, found null"),
        ("learning_rate: 2e-4", "learning_rate: 0", "  line 6, optimizer.learning_rate: must be above 0, found 0"),
        ("ema_decay: 0.99", "ema_decay: 1.5", "  line 12, ema_decay: must be at most 1, found 1.5"),
        ("ema_decay: 0.99", "ema_decay: false", "  line 12, ema_decay: must be a number, found false"),
        ("cache: latents/x", "cache: 3", "  line 3, cache: must be text, found 3; put it in quotes"),
        ("cache: latents/x", "cache: {a: 1}", "  line 3, cache: must be text, found a block of keys"),
        ("[0.9, 0.95]", "[0.9]", "  line 7, optimizer.betas: must be a list of 2 values, found a list of 1"),
        ("[0.9, 0.95]", "[0.9, 1, 1]", "  line 7, optimizer.betas: must be a list of 2 values, found a list of 3"),
        ("[0.9, 0.95]", "[]", "  line 7, optimizer.betas: must be a list of 2 values, found a list of 0"),
        ("[0.9, 0.95]", "0.9", "  line 7, optimizer.betas: must be a list, found 0.9"),
        ("[0.9, 0.95]", "[0.9, x]", '  line 7, optimizer.betas[1]: must be a number, found "x"'),
        (
            "kind: dit\n",
            "kind: dit_d\n",
            '  line 14, model.kind: must be one of dit, dit_dh, found "dit_d"; did you mean dit_dh?',
        ),
        (
            "flow:\n  time_shift_base: 128",
            "flow: 128",
            "  line 18, flow: must be a block of keys, found 128",
        ),
        (
            "batch_size: 4",
            "batch_size: 4\ncompile: on",
            '  line 12, compile: must be true or false, found "on"',
        ),
        (
            "kind: dit\n",
            "kind: dit_dh\n",
            "  line 14, model.kind: kind dit_dh needs head_width, head_depth and head_heads",
        ),
        (
            "time_shift_base: 128",
            "time_max: 2",
            "  line 19, flow.time_max: time_max is at most 1",
        ),
    ],
)
def test_a_mistyped_value_is_told_in_words(write, old, new, line):
    path = write((old, new))
    assert complaint(path) == [f"{path} has 1 problem", line]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("model.widht", "width"),
        ("model.head-width", "head_width"),
        ("optimizer.learning_rat", "learning_rate"),
        ("bach_size", "batch_size"),
        ("time_shift_dim", "flow.time_shift_dim"),
        ("model.time_shft_dim", "flow.time_shift_dim"),
        ("model.label_dropout", "label_dropout"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one_also_in_other_blocks(write, key, meant):
    block, _, name = key.rpartition(".")
    old = {"model": "  depth: 2\n", "optimizer": "  betas: [0.9, 0.95]\n", "": "paper: none\n"}[block]
    path = write((old, f"{old}{'  ' if block else ''}{name}: 3\n"))
    line = GOOD.splitlines().index(old.rstrip("\n")) + 2
    assert complaint(path)[1:] == [f"  line {line}, {key}: unknown key; did you mean {meant}?"]


def test_a_key_like_no_other_gets_no_advice(write):
    assert complaint(write(("paper: none", "paper: none\nqqqqqq: 1")))[1:] == ["  line 3, qqqqqq: unknown key"]


def test_a_misspelt_required_key_is_one_problem_not_two(write):
    assert complaint(write(("depth: 2", "deph: 2")))[1:] == [
        "  line 16, model.deph: unknown key; did you mean depth?",
    ]


def test_a_missing_block_is_told_at_the_top_and_a_missing_key_at_its_block(write):
    path = write(("flow:\n  time_shift_base: 128\n", ""), ("  learning_rate: 2e-4\n", ""))
    assert complaint(path)[1:] == ["  line 1, flow: missing", "  line 5, optimizer.learning_rate: missing"]


def test_refused_values_are_not_told_twice(write):
    path = write(("width: 32", "width: 032"), ("batch_size: 4", "batch_size: !!int 4"))
    assert complaint(path)[1:] == [
        "  line 11, batch_size: tag !!int is not allowed: write a plain value",
        "  line 15, model.width: 032 starts with a 0: drop it if this is a number, quote it if it is text",
    ]


def test_a_text_that_is_no_yaml_is_one_problem_with_its_line(write):
    path = write(("betas: [0.9, 0.95]", "betas: [0.9, 0.95"))
    lines = complaint(path)
    assert lines[0] == f"{path} has 1 problem"
    assert lines[1].startswith("  line 8: not valid YAML")


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("stage: train-decoder", "this is a recipe for train-decoder; give one for train-diffusion"),
        ("stage: train-difusion", 'must be train-diffusion, found "train-difusion"; did you mean train-diffusion?'),
    ],
)
def test_another_stage_than_asked_for_is_refused(write, stage, words):
    path = write(("stage: train-diffusion", stage))
    assert complaint(path, recipe_class=TrainDiffusionRecipe)[1:] == [f"  line 1, stage: {words}"]


def test_a_misspelt_stage_still_gets_the_rest_checked(write):
    path = write(("stage: train-diffusion", "stage: train-difusion"), ("width: 32", "width: x"))
    assert [line.split(":")[0] for line in complaint(path)[1:]] == ["  line 1, stage", "  line 15, model.width"]


@pytest.mark.parametrize(("stage", "words"), [("", "missing"), ("stage: 7\n", "found 7"), ("stage: zzz\n", '"zzz"')])
def test_without_a_known_stage_the_stages_are_listed(write, stage, words):
    line = complaint(write(("stage: train-diffusion\n", stage)))[1]
    assert line.startswith("  line 1, stage: ")
    assert words in line
    assert "train-diffusion" in line
    assert "overfit-toy" in line


def test_overrides_change_add_and_mend_values(write):
    path = write(("width: 32", "width: abc"))
    overrides = ["model.width=64", "seed=3", "optimizer.betas=[0.5, 0.9]", "optimizer.clip_norm=null", "cache=a=b"]
    overrides += ["flow.time_shift_dim=4", "micro_batch_size=2", "duration=3 steps", "duration=5 steps"]
    spec = load_recipe(TrainDiffusionRecipe, path, overrides)
    assert (spec.model.width, spec.seed, spec.cache, spec.micro_batch_size) == (64, 3, "a=b", 2)
    assert spec.optimizer.betas == (0.5, 0.9)
    assert spec.optimizer.clip_norm is None
    assert spec.flow.time_shift == (4 / 128) ** 0.5
    assert spec.duration == "5 steps"


def test_an_override_makes_the_block_it_needs(write):
    path = write(("flow:\n  time_shift_base: 128\n", ""))
    assert load_recipe(TrainDiffusionRecipe, path, ["flow.time_shift_base=64"]).flow.time_shift_base == 64


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.width=abc", 'must be an integer, found "abc"'),
        ("model.widht=64", "unknown key; did you mean width?"),
        ("modle.width=64", "unknown key; did you mean model?"),
        ("time_shift_dim=4", "unknown key; did you mean flow.time_shift_dim?"),
        ("lr=1e-3", "unknown key; did you mean optimizer.learning_rate?"),
        ("optimizer.lr=1e-3", "unknown key; did you mean learning_rate?"),
        ("epochs=3", "unknown key; did you mean duration?"),
        ("duration=20", 'a duration reads like "40 epochs" or "1500 steps", found 20'),
        ("save_every=2.5", 'a duration reads like "40 epochs" or "1500 steps", found 2.5'),
        ("optimizer.betas=[0.9]", "must be a list of 2 values, found a list of 1"),
        ("optimizer.betas=[0.9, x]", 'must be a number, found "x"'),
        ("model=3", "must be a block of keys, found 3"),
        ("seed.x=3", "must be an integer, found a block of keys"),
        ("cache.x=3", 'cache is "latents/x", not a block of keys'),
        ("model.width", 'an override reads key=value or block.key=value; with a space, "duration=20 steps"'),
        ("=3", 'an override reads key=value or block.key=value; with a space, "duration=20 steps"'),
        ("model..width=3", 'an override reads key=value or block.key=value; with a space, "duration=20 steps"'),
        ("model.width=010", "010 starts with a 0: drop it if this is a number, quote it if it is text"),
        ("flow.time_max=2", "time_max is at most 1"),
        ("cache=7", "must be text, found 7; put it in quotes"),
        ("stage=sample", "this is a recipe for sample; give one for train-diffusion"),
    ],
)
def test_an_overrides_problem_names_the_override_and_no_line(write, override, words):
    path = write()
    assert complaint(path, [override], TrainDiffusionRecipe) == [
        f"{path} has 1 problem",
        f"  override {override}: {words}",
    ]


def test_problems_of_overrides_come_after_those_of_the_file(write):
    lines = complaint(write(("depth: 2", "depth: x")), ["model.width=abc"])
    assert [line.split(":")[0] for line in lines[1:]] == ["  line 16, model.depth", "  override model.width=abc"]


def test_a_message_stays_short_and_quick_for_a_file_of_nothing_but_mistakes(write):
    path = write(text=GOOD + "".join(f"bach_size_{i}: 1\n" for i in range(4_000)))
    lines = complaint(path)
    assert lines[0].endswith("has 4000 problems")
    assert len(lines) == 102
    assert lines[-1] == "  ... and 3900 more"


def test_no_control_character_of_a_recipe_reaches_the_terminal(write):
    text = "\n".join(complaint(write(("paper: none", '"\\e[31mx": 1\npaper: "\\e[31m"\nseed: "\\e[31m\\n"'))))
    assert "\x1b" not in text
    assert "\\u001B[31m" in text


def test_a_folder_a_binary_an_empty_and_a_missing_file_are_told_apart(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "empty.yaml").write_text("")
    assert complaint(tmp_path) == [f"recipe {tmp_path} is a folder; give a file in it"]
    assert "not UTF-8 text" in complaint(tmp_path / "binary.yaml")[1]
    assert "empty" in complaint(tmp_path / "empty.yaml")[1]
    missing = complaint(tmp_path / "empti.yaml")[0]
    assert missing.startswith(f"no recipe {tmp_path / 'empti.yaml'}")
    assert f"did you mean {tmp_path / 'empty.yaml'}" in missing


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "/dev/zero", "dith_xl/", "../dith_xl"])
def test_a_name_that_is_no_file_is_a_usage_error(name):
    assert complaint(name)


def test_a_dumped_recipe_reads_back_equal_with_stage_first_and_the_schemas_order(write, tmp_path):
    spec = load_recipe(TrainDiffusionRecipe, write(), ["paper=on", 'output="1e5"', "optimizer.weight_decay=1e-5"])
    text = dump_recipe(spec)
    path = tmp_path / "dumped.yaml"
    path.write_text(text)
    assert load_recipe(TrainDiffusionRecipe, path) == spec
    assert dump_recipe(load_recipe(None, path)) == text
    keys = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert keys == ["stage", *(key for key in TrainDiffusionRecipe.model_fields if key != "stage")]


def test_every_kind_of_value_survives_the_way_to_a_file_and_back(tmp_path):
    spec = SampleRecipe(
        stage="sample",
        model="on",
        autoencoder="1e5",
        output="a: b # \u00e9 \x07",
        num=3,
        classes=(1, 2),
        guidance_scale=1.42,
    )
    path = tmp_path / "sample.yaml"
    path.write_text(dump_recipe(spec), encoding="utf-8")
    assert load_recipe(SampleRecipe, path) == spec


def test_bad_options_of_a_command_are_told_by_their_flags():
    with pytest.raises(UsageError) as caught:
        recipe_from_options(EncodeCacheRecipe, {"stage": "encode-cache", "source": "a", "output": "b", "batch_size": 0})
    assert str(caught.value) == "--encoder: missing; --batch-size: must be at least 1, found 0"


def test_the_class_asked_for_is_the_class_returned(write):
    assert isinstance(load_recipe(TrainDecoderRecipe, "digits/decoder"), TrainDecoderRecipe)


def test_loading_recipes_imports_no_torch():
    code = (
        "import sys, raecli.recipe.load, raecli.cli.recipes; print('pydantic' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True", "False"]
