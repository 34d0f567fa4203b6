"""Finding shipped recipes, and `rae recipes ls | show | cp | validate`."""

import json
import subprocess
import sys

import pytest

from raecli.cli.recipes import app
from raecli.errors import UsageError
from raecli.recipe import shipped
from raecli.recipe.load import load_recipe
from raecli.recipe.shipped import find_recipe, list_recipes, recipes_folder, shipped_files


def run(capsys, *words: str) -> str:
    """What a command prints on stdout."""
    app(list(words), standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["dith_xl", "dith_xl.yaml", "recipes/dith_xl.yaml", "./recipes/dith_xl.yaml"])
def test_a_shipped_recipe_is_found_by_any_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == recipes_folder() / "dith_xl.yaml"


@pytest.mark.parametrize("name", ["digits/decoder", "digits/decoder.yaml", "recipes/digits/decoder.yaml"])
def test_a_shipped_recipe_in_a_folder_is_found_by_any_of_its_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == recipes_folder() / "digits" / "decoder.yaml"


def test_an_existing_file_wins_over_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dith_xl.yaml").write_text("stage: sample\n")
    assert find_recipe("dith_xl.yaml").resolve() == tmp_path / "dith_xl.yaml"
    assert find_recipe("dith_xl").resolve() != tmp_path / "dith_xl.yaml"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("dith_xxl", "dith_xl"),
        ("decodr", "digits/decoder"),
        ("recipes/dit_x.yaml", "dit_xl"),
        ("../dith_xl", "dith_xl"),
    ],
)
def test_a_mistyped_name_gets_the_nearest_ones(name, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"no recipe .*did you mean .*\b{meant}\b"):
        find_recipe(name)


def test_an_installed_package_finds_the_recipes_inside_itself(tmp_path, monkeypatch):
    inside = tmp_path / "raecli" / "_recipes" / "digits"
    inside.mkdir(parents=True)
    (inside / "decoder.yaml").write_text("stage: train-decoder\n")
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "raecli")
    assert find_recipe("digits/decoder") == inside / "decoder.yaml"
    assert list(shipped_files()) == ["digits/decoder"]
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "elsewhere")
    assert list_recipes() == []


def test_a_name_like_no_other_gets_the_command_that_lists_them():
    with pytest.raises(UsageError, match="rae recipes ls"):
        find_recipe("qqqqqqqq")


def test_every_shipped_recipe_is_listed_with_its_stage_and_row(capsys):
    rows = json.loads(run(capsys, "ls", "--json"))
    assert rows == [row._asdict() for row in list_recipes()]
    assert [row["name"] for row in rows] == list(shipped_files())
    assert len(rows) == 45
    assert {row["stage"] for row in rows} == {"train-decoder", "train-diffusion", "sample"}
    lines = run(capsys, "ls").splitlines()
    assert len(lines) == len(rows)
    assert all(row["name"] in line and row["paper"] in line for row, line in zip(rows, lines, strict=True))


def test_show_prints_a_recipe_as_it_is_written(capsys):
    assert run(capsys, "show", "dith_xl") == (recipes_folder() / "dith_xl.yaml").read_text()
    with pytest.raises(UsageError, match="did you mean dith_xl"):
        run(capsys, "show", "dith_xxl")


def test_a_copy_goes_here_or_to_a_folder_or_a_file_and_loads(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    text = (recipes_folder() / "digits" / "decoder.yaml").read_text()
    assert run(capsys, "cp", "digits/decoder") == "decoder.yaml\n"
    assert run(capsys, "cp", "digits/decoder", "folder") == "folder/decoder.yaml\n"
    assert run(capsys, "cp", "digits/decoder", "mine.yaml") == "mine.yaml\n"
    names = ["decoder.yaml", "folder/decoder.yaml", "mine.yaml"]
    assert [(tmp_path / name).read_text() for name in names] == [text] * 3
    assert load_recipe(None, tmp_path / "mine.yaml") == load_recipe(None, "digits/decoder")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")) == sorted(names)


def test_a_copy_overwrites_only_when_forced(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "dith_xl.yaml"
    target.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        run(capsys, "cp", "dith_xl")
    assert target.read_text() == "mine"
    run(capsys, "cp", "dith_xl", "--force")
    assert target.read_text() == (recipes_folder() / "dith_xl.yaml").read_text()


@pytest.mark.parametrize("destination", ["nowhere/a.yaml", "nowhere/"])
def test_a_copy_into_a_folder_that_is_not_there_is_refused(capsys, tmp_path, monkeypatch, destination):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no folder"):
        run(capsys, "cp", "dith_xl", destination)
    assert list(tmp_path.iterdir()) == []


def test_validate_tells_good_files_and_every_problem_of_the_others(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("stage: sample\nmodle: m\nnum: x\noutput: o\nautoencoder: a\n")
    (tmp_path / "b.yaml").write_text("a: [\n")
    with pytest.raises(UsageError) as caught:
        run(capsys, "validate", "dith_s", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "missing.yaml")
    assert capsys.readouterr().out == "dith_s: ok, train-diffusion\n"
    lines = str(caught.value).splitlines()
    assert lines[:3] == [
        f"{tmp_path / 'a.yaml'} has 2 problems",
        "  line 2, modle: unknown key; did you mean model?",
        '  line 3, num: must be an integer, found "x"',
    ]
    assert lines[3] == f"{tmp_path / 'b.yaml'} has 1 problem"
    assert lines[5].startswith("no recipe missing.yaml")


def test_validate_holds_its_overrides_against_every_file(capsys):
    assert run(capsys, "validate", "dith_s", "dit_s", "model.width=768", "seed=3").count("ok") == 2
    with pytest.raises(UsageError, match=r"override model\.width=x: must be an integer"):
        run(capsys, "validate", "dith_s", "model.width=x")
    with pytest.raises(UsageError, match="no recipe to check"):
        run(capsys, "validate", "seed=3")


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2e-4.yaml").write_text((recipes_folder() / "dit_s.yaml").read_text())
    assert run(capsys, "validate", "lr=2e-4.yaml") == "lr=2e-4.yaml: ok, train-diffusion\n"


def test_help_imports_neither_pydantic_nor_yaml():
    code = (
        "import sys\nfrom raecli.cli.recipes import app\ntry:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('pydantic', 'yaml', 'torch') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert all(verb in done.stdout for verb in ("ls", "show", "cp", "validate"))
    assert "\x1b" not in done.stdout


def test_validate_tells_a_program_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("stage: sample\nmodle: x\n")
    told = json.loads(run(capsys, "validate", "dith_s", "--json"))
    assert told == {"ok": {"dith_s": "train-diffusion"}, "problems": []}
    with pytest.raises(UsageError, match=r"bad\.yaml"):
        app(["validate", "dith_s", "bad.yaml", "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert list(told["ok"]) == ["dith_s"] and len(told["problems"]) == 1 and "modle" in told["problems"][0]


def test_show_and_cp_tell_a_program_too(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, file in shipped_files().items():
        told = json.loads(run(capsys, "show", name, "--json"))
        assert told == {"file": str(file), "recipe": shipped.read_recipe(file).values}
    told = json.loads(run(capsys, "cp", "digits/decoder", "mine.yaml", "--json"))
    assert told == {"file": str(shipped_files()["digits/decoder"]), "output": "mine.yaml"}
    assert (tmp_path / "mine.yaml").read_bytes() == shipped_files()["digits/decoder"].read_bytes()
