"""Every command that README, docs/ and the help texts show is one that the command line takes, up to the launch."""

import os
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import raecli.launch
import raecli.store.encoders
from raecli.errors import UsageError
from raecli.recipe.load import load_recipe
from raecli.recipe.shipped import find_recipe, shipped_files
from raecli.store.encoders import resolve_encoder
from tests.conftest import REPOSITORY
from tests.documented import PAGES, commands_of, examples_of, parsed, spans_of, verbs

TO_THE_LAUNCH = ("encode-cache", "train-decoder", "train-diffusion", "sample", "reconstruct", "overfit-toy")
SIX = (
    "rae encode-cache --encoder dinov2-b imagenet/ latents/",
    "rae train-diffusion recipes/dith_xl.yaml",
    "rae eval fid samples/ --ref adm_ref.npz",
    "rae overfit-toy --width 384..896",
)


def commands() -> list[list[str]]:
    return [words for page in PAGES for words in commands_of(page)]


def check(words: list[str], monkeypatch) -> list[str]:
    """Take a command as the door does: parse it, and go to the launch with `--dry-run`. Returns the stages launched."""
    launched: list[str] = []
    command, given = parsed(words)
    if "recipe" in given and "=" not in given["recipe"] and given["recipe"] in shipped_files():
        load_recipe(None, find_recipe(given["recipe"]), given.get("overrides") or ())
    if command.name not in TO_THE_LAUNCH:
        return launched
    monkeypatch.setattr(raecli.launch, "start", lambda stage, *_, **__: launched.append(stage))
    monkeypatch.setattr(raecli.store.encoders, "resolve_encoder", without_the_hub)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # no part of this project
    for name in (given.get("source"), given.get("images")):
        if isinstance(name, str):
            Path(name).mkdir(parents=True, exist_ok=True)
    for image in given.get("image") or ():
        Path(image).touch()
    command.callback(**{**given, "dry_run": True})
    return launched


def without_the_hub(name: str, **settings):
    """Any preset's name stands for the embedded encoder, at its own size."""
    return resolve_encoder("digits-mae", image_size=32)


def test_the_commands_are_found():
    found = {page.name: len(commands_of(page)) for page in PAGES}
    assert sum(found.values()) >= 64
    assert found["README.md"] >= 20 and found["own_data.md"] >= 9
    assert sum(len(spans_of(page)) for page in PAGES) >= 75


def test_readme_has_the_verbs_literally():
    lines = [line.partition("#")[0].strip() for line in (REPOSITORY / "README.md").read_text().splitlines()]
    assert [line for line in SIX if line not in lines] == []


def test_readme_names_every_verb_and_every_page():
    text = (REPOSITORY / "README.md").read_text()
    assert [verb for verb in verbs() if f"rae {verb.split()[0]}" not in text] == []
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_documented_command_reaches_its_launch(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for copied in (other for other in commands() if other[:2] == ["recipes", "cp"]):
        command, given = parsed(copied)
        command.callback(**given)
    launched = check(words, monkeypatch)
    assert len(launched) == (words[0] in TO_THE_LAUNCH)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_running_text_are_of_known_verbs_and_options(page):
    assert all(parsed(words, whole=False)[0].name for words in spans_of(page))


@pytest.mark.parametrize("verb", verbs())
def test_each_help_has_examples_that_parse(verb):
    examples = examples_of(verbs()[verb])
    assert examples
    for words in examples:
        parsed(words)
    assert any(" ".join(words).startswith(verb) for words in examples)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_misspelt_option_is_refused(words):
    """Without this, a page could say anything: one letter more in an option's name has to fail."""
    options = [index for index, word in enumerate(words) if word.startswith("--")]
    for index in options:
        wrong = [*words[:index], words[index].replace("--", "--x", 1), *words[index + 1 :]]
        for whole in (True, False):
            with pytest.raises(Exception) as refused:
                parsed(wrong, whole=whole)
            assert type(refused.value).__name__ == "NoSuchOption"


def test_a_misspelt_verb_recipe_or_key_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LookupError, match="trian-diffusion"):
        check(["trian-diffusion", "dith_xl"], monkeypatch)
    with pytest.raises(UsageError, match="did you mean"):
        check(["train-diffusion", "dith_xxl"], monkeypatch)
    with pytest.raises(UsageError, match="unknown key"):
        check(["train-diffusion", "dith_xl", "model.widht=3"], monkeypatch)
    with pytest.raises(UsageError, match="unknown key"):
        check(["flops", "dith_xl", "model.widht=3"], monkeypatch)


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("verb", ["", "eval", "recipes", *verbs()])
def test_help_fits_the_terminal_and_cuts_nothing(verb, columns, monkeypatch, capsys):
    from raecli.cli.app import command_line

    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((columns, 40)))
    command_line()([*verb.split(), "--help"], standalone_mode=False, prog_name="rae")
    text = capsys.readouterr().out
    listed = text.partition("Commands:")[2]
    assert text.startswith("Usage: rae") and "..." not in listed
    assert [line for line in text.splitlines() if len(line) > columns] == []
    if verb in verbs():  # a line that is wrapped cannot be copied
        lines = [re.split(r"\s{2,}| > ", line.strip())[0] for line in text.splitlines()]
        assert [
            words for words in examples_of(verbs()[verb]) if shlex.join(["rae", *words]) not in map(plain, lines)
        ] == []


def plain(line: str) -> str:
    """A line of a shell, its words quoted as shlex quotes them; "" for what is none."""
    try:
        return shlex.join(shlex.split(line))
    except ValueError:
        return ""


def test_a_metrics_help_shows_no_option_that_it_does_not_heed(capsys):
    from raecli.cli.app import command_line

    shown = {}
    for metric in ("is", "fid", "all"):
        command_line()(["eval", metric, "--help"], standalone_mode=False, prog_name="rae")
        shown[metric] = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, re.MULTILINE))
    assert shown["all"] - shown["is"] == {"--ref", "--dinov2", "--features", "--pr-precision"}
    assert shown["all"] - shown["fid"] == {"--dinov2", "--pr-precision"}
    parsed(["eval", "is", "samples.npz", "--ref", "x"])  # taken all the same, as ever
