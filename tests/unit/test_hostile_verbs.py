"""Every verb against every hostile path: a word and its exit code, never a traceback, a hang, a trace or debris.

A new verb has to be put into VERBS or NO_PATHS: the first test walks the app.
"""

import json
import os
import pty
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
import typer

from raecli.cli.app import command_line
from raecli.console import Guarded
from raecli.models.classifier import Classifier, save_classifier
from tests.unit.hostile import rae
from tests.unit.tiny_models import save_decoder, save_diffusion

JUDGE = ("--features", "judge.safetensors")
ENCODE = ("encode-cache", "--image-size", "32", "--encoder")
SAMPLE = ("-n", "2", "--steps", "1")
TRAIN = ("output=made", "duration=1 steps", "batch_size=4")
NO_PERCEPTION = ("loss.perceptual=none", "loss.perceptual_weights=null")
TOY = ("overfit-toy", "--preset", "tiny", "--width", "32", "--steps", "1", "--out", "made")
P = "{path}"
VERBS = {  # every place where a verb takes a file or folder of somebody's
    "encode-cache": [
        (*ENCODE, "digits-mae", P, "made"),
        (*ENCODE, "digits-mae", "--weights", P, "images", "made"),
        (*ENCODE, P, "images", "made"),
        (*ENCODE, f"sdvae:{P}", "images", "made"),
    ],
    "verify": [("verify", P), ("verify", "broken", "--repair", "--source", P)],
    "train-diffusion": [
        ("train-diffusion", P),
        ("train-diffusion", "digits/diffusion", f"cache={P}", *TRAIN),
    ],
    "train-decoder": [
        ("train-decoder", P),
        ("train-decoder", "digits/decoder", "images=images", f"cache={P}", *NO_PERCEPTION, *TRAIN),
        ("train-decoder", "digits/decoder", f"images={P}", "cache=cache", *NO_PERCEPTION, *TRAIN),
    ],
    "sample": [
        ("sample", P),
        ("sample", P, "made", "-a", "decoder", *SAMPLE),
        ("sample", "diffusion", "made", "-a", P, *SAMPLE),
        ("sample", "diffusion", "made", "-a", "decoder", "--guide", P, *SAMPLE),
        ("sample", "diffusion", "made", "-a", "decoder", "--guidance-sweep", "1", "--ref", P, *JUDGE, *SAMPLE),
    ],
    "reconstruct": [("reconstruct", P, "made", "-a", "decoder"), ("reconstruct", "images", "made", "-a", P)],
    **{
        f"eval {name}": [
            ("eval", name, P, "--ref", "images", *JUDGE),
            ("eval", name, "samples", "--ref", P, *JUDGE),
            ("eval", name, "samples", "--ref", "images", "--features", P),
        ]
        for name in ("fid", "sfid", "is", "precision-recall", "kid", "fdd", "all")
    },
    "eval accuracy": [
        ("eval", "accuracy", P, "--classifier", "judge.safetensors"),
        ("eval", "accuracy", "samples", "--classifier", P),
    ],
    "eval features": [("eval", "features", P, "made.npz", "--inception", P)],
    "eval statistics": [("eval", "statistics", "samples", "made.npz", "--inception", P)],
    "eval compare": [("eval", "compare", P, "fid.json"), ("eval", "compare", "fid.json", P)],
    "eval reconstruction": [
        ("eval", "reconstruction", P, "recon", "--metrics", "psnr"),
        ("eval", "reconstruction", "images", P, "--metrics", "psnr"),
    ],
    "eval probe": [("eval", "probe", P), ("eval", "probe", "cache", "--val", P)],
    "eval tsne": [("eval", "tsne", P, "made.png")],
    "overfit-toy": [(*TOY, "--image", P), (*TOY, "--autoencoder", P)],
    "plot": [("plot", P)],
    "report": [("report", P), ("report", "diffusion", "--samples", P), ("report", "diffusion", "--eval", P)],
    "convert": [
        ("convert", P, "made"),
        ("convert", "decoder.pt", "made", "--encoder", "digits-mae", "--statistics", P),
        ("convert", "decoder.pt", "made", "--encoder", P, "--statistics", "none"),
    ],
    "fetch": [("fetch", P)],
    "recipes show": [("recipes", "show", P)],
    "recipes cp": [("recipes", "cp", P)],
    "recipes validate": [("recipes", "validate", P)],
    "flops": [("flops", P)],
    "inspect": [("inspect", P), ("inspect", P, "--json")],
}
NO_PATHS = {"recipes ls", "doctor"}  # they take none
PATHS = {
    "absent": "absent",
    "loop of links": "loop",
    "link to nothing": "dangling",
    "pipe": "pipe",
    "named pipe .npz": "pipe.npz",
    "named pipe .json": "pipe.json",
    "device without end": "/dev/zero",
    "memory of the process": "/proc/self/mem",
    "empty folder": "empty",
    "folder named as a tar": "folder.tar",
    "folder named as weights": "folder.safetensors",
    "empty npz": "empty.npz",
    "empty tar": "empty.tar",
    "empty weights": "empty.safetensors",
    "junk npz": "junk.npz",
    "junk tar": "junk.tar",
    "junk weights": "junk.safetensors",
    "junk pt": "junk.pth",
    "junk recipe": "junk.yaml",
    "quotes and a command": "$(touch pwned)`touch pwned`'\"",
    "a command to pipe": "pipe:touch pwned",
    "newline": "a\nb",
    "colours": "\x1b[31mred",
    "no UTF-8": "\udcff\udcfe",
    "emoji": "\U0001f600",
    "too long": "x" * 300,
    "far too long": "x/" * 3000,
    "nobody's address": "http://127.0.0.1:9/x",
}


def verbs_of(folder: typer.Typer, before: str = "") -> set[str]:
    """Every command, with its group's name."""
    found = {f"{before}{command.name}" for command in folder.registered_commands}
    for group in folder.registered_groups:
        found |= verbs_of(group.typer_instance, f"{before}{group.name} ")
    return found


def test_every_verb_of_the_app_is_in_the_table():
    verbs = verbs_of(command_line())
    assert len(verbs) > 25
    assert verbs == set(VERBS) | NO_PATHS


@pytest.fixture(scope="module")
def place(tmp_path_factory, images, cache):
    """One of each artifact, and everything hostile that a path may lead to. Verbs that work on a copy say so."""
    root = tmp_path_factory.mktemp("place")
    save_diffusion(root / "diffusion")
    save_decoder(root / "decoder")
    shutil.copytree(images, root / "images")
    shutil.copytree(cache, root / "cache")
    shutil.copytree(cache, root / "broken")
    (root / "broken" / "shard-000001.tar").write_bytes(b"")
    torch.manual_seed(0)
    save_classifier(root / "judge.safetensors", Classifier(image_size=32, classes=3, widths=(8, 8), feature_width=6))
    made = [
        ("sample", "diffusion", "samples", "-a", "decoder", "-n", "6", "--steps", "1"),
        ("reconstruct", "images", "recon", "-a", "decoder"),
        ("eval", "fid", "samples", "--ref", "images", *JUDGE, "--out", "fid.json"),
        ("convert", "decoder", "decoder.pt", "--to", "official"),
    ]
    for command in made:
        assert rae(*command, cwd=root).code == 0, rae(*command, cwd=root).err
    hostile_files(root)
    return root


def hostile_files(root: Path) -> None:
    for name in ("pipe", "pipe.npz", "pipe.json"):
        os.mkfifo(root / name)
    for name in ("empty", "folder.tar", "folder.safetensors"):
        (root / name).mkdir()
    for ending in ("npz", "tar", "safetensors", "pth", "yaml"):
        (root / f"empty.{ending}").write_bytes(b"")
        (root / f"junk.{ending}").write_bytes(bytes(range(256)) * 8)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("absent")


CASES = [(verb, number) for verb, places in VERBS.items() for number in range(len(places))]


@pytest.mark.parametrize("verb, number", CASES, ids=[f"{verb}-{number}" for verb, number in CASES])
def test_a_hostile_path_is_refused_in_words(place, verb, number):
    before = set(place.rglob("*"))
    faults = {}
    for name, path in PATHS.items():
        outcome = rae(*(word.replace(P, path) for word in VERBS[verb][number]), cwd=place)
        wrong = outcome.faults
        if outcome.code not in (2, 3, 4, 6):
            wrong.append(f"exit code {outcome.code}")
        if wrong:
            faults[name] = (wrong, outcome.err[-600:])
        clear_made(place)
    assert faults == {}
    debris = {path.name for path in set(place.rglob("*")) - before}
    assert debris == set(), "left behind"


def clear_made(root: Path) -> None:
    """What a verb may have begun under the name that it was given."""
    shutil.rmtree(root / "made", ignore_errors=True)
    for name in ("made.npz", "made.png"):
        (root / name).unlink(missing_ok=True)


OUTPUTS = {  # where a file or folder is written; these cost little up to the moment of writing
    "encode-cache": (*ENCODE, "digits-mae", "images", P),
    "sample": ("sample", "diffusion", P, "-a", "decoder", *SAMPLE),
    "reconstruct": ("reconstruct", "images", P, "-a", "decoder"),
    "eval fid": ("eval", "fid", "samples", "--ref", "images", *JUDGE, "--out", P),
    "eval probe": ("eval", "probe", "cache", "--iterations", "1", "--out", P),
    "convert": ("convert", "decoder", P, "--to", "official", "--force"),
    "recipes cp": ("recipes", "cp", "dith_s", P, "--force"),
}


@pytest.mark.parametrize("verb", OUTPUTS)
@pytest.mark.parametrize("path", ["/dev/full", "pipe", "fid.json/below", "/proc/made"])
def test_where_nothing_can_be_written_a_verb_ends_with_its_code_and_without_debris(place, verb, path):
    before = set(place.rglob("*"))
    outcome = rae(*(word.replace(P, path) for word in OUTPUTS[verb]), cwd=place)
    assert outcome.faults == [] and outcome.code in (2, 3, 6), outcome
    assert set(place.rglob("*")) == before
    assert Path("/dev/full").is_char_device() and (place / "pipe").is_fifo()


def test_a_pipe_among_images_is_a_bad_image_and_nobody_waits_for_it(tmp_path, images):
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    os.mkfifo(folder / "class0" / "pipe.png")
    (folder / "class0" / "zero.png").symlink_to("/dev/zero")
    (folder / "class0" / "gone.png").symlink_to("absent")
    outcome = rae(*ENCODE, "digits-mae", "images", "latents", cwd=tmp_path)
    assert outcome.code == 3 and outcome.faults == []
    for name in ("pipe.png", "zero.png", "gone.png"):
        assert f"class0/{name}: not a readable file" in outcome.err
    assert rae(*ENCODE, "digits-mae", "images", "skipped", "--on-bad-image", "skip", cwd=tmp_path).code == 0
    assert len(json.loads((tmp_path / "skipped" / "manifest.json").read_text())["skipped"]) == 3


def tar_of(path: Path, **members: bytes) -> None:
    """A tar; `__` in a name is a dot."""
    for name, data in members.items():
        (path.parent / name).write_bytes(data)
    with tarfile.open(path, "w") as archive:
        for name in members:
            archive.add(path.parent / name, name.replace("__", "."))


def test_a_tar_without_images_and_one_with_a_class_of_millions_are_refused(tmp_path, images):
    picture = next(images.rglob("*.png")).read_bytes()
    tar_of(tmp_path / "none.tar", a__txt=b"x")
    tar_of(tmp_path / "many.tar", a__png=picture, a__cls=b"9999999")
    for name, told in (("none.tar", "no images in it"), ("many.tar", "not a class number below 100 000")):
        outcome = rae(*ENCODE, "digits-mae", name, "latents", cwd=tmp_path)
        assert outcome.code == 3 and told in outcome.err and outcome.faults == []


def test_a_name_with_codes_for_a_terminal_cannot_steer_it(tmp_path):
    outcome = rae("inspect", "\x1b[31mred\x9b\x07", cwd=tmp_path)
    assert outcome.code == 3 and "\\x1b[31mred\\x9b\\x07" in outcome.err


def test_nor_can_it_on_a_real_terminal():
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        Guarded(terminal, "stderr").write("\x1b]52;c;stolen\x07\rbar\n")
    shown = os.read(ours, 100)
    os.close(ours)
    assert shown == b"\\x1b]52;c;stolen\\x07\rbar\r\n"


@pytest.mark.parametrize("word", [r'"a\0b"', "\udcff"], ids=["NUL", "no UTF-8"])
def test_a_recipe_cannot_name_what_no_file_system_holds(place, word):
    outcome = rae("train-diffusion", "digits/diffusion", f"output={word}", "cache=cache", cwd=place)
    assert outcome.code == 2 and "must be text in UTF-8, without NUL" in outcome.err and outcome.faults == []
