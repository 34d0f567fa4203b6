"""What a stage says when it is done, and what a plan says: a line for a person, JSON for a program."""

import json
import os

import pytest

from raecli import launch
from raecli.launch import LaunchOptions, start
from raecli.recipe.load import load_recipe
from raecli.recipe.recipes import TrainDiffusionRecipe
from raecli.recipe.shipped import find_recipe
from raecli.training.result import PRINT_JSON, tell_result


@pytest.mark.parametrize(("told", "as_json", "is_json"), [("", False, False), ("1", False, True), ("", True, True)])
def test_a_result_is_a_line_or_json(told, as_json, is_json, monkeypatch, capsys):
    monkeypatch.setenv(PRINT_JSON, told)
    tell_result("made: 3 images", {"images": 3}, as_json=as_json)
    said = capsys.readouterr().out
    assert json.loads(said) == {"images": 3} if is_json else said == "made: 3 images\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_launcher_tells_its_workers(as_json, monkeypatch):
    seen = []
    monkeypatch.setenv(PRINT_JSON, "of an outer run")
    monkeypatch.setattr(
        launch, "run_elastic", lambda command, options, folder, cache: seen.append(os.environ[PRINT_JSON])
    )
    recipe = load_recipe(TrainDiffusionRecipe, find_recipe("dit_s"))
    start("train-diffusion", recipe, LaunchOptions(), as_json=as_json)
    assert seen == ["1" if as_json else ""]


def test_a_plan_in_json_is_all_on_stdout(monkeypatch, capsys):
    monkeypatch.setenv(PRINT_JSON, "")
    monkeypatch.setattr("sys.argv", ["rae", "train-diffusion", "dit_s", "--dry-run", "--json"])
    recipe = load_recipe(TrainDiffusionRecipe, find_recipe("dit_s"))
    start("train-diffusion", recipe, LaunchOptions(), dry_run=True, as_json=True)
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert plan["recipe"] == json.loads(json.dumps(recipe.to_dict())) and said.err == ""
    assert plan["plan"][-1] == "to run it: rae train-diffusion dit_s --json"
