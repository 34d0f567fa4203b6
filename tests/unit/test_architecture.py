"""The house: which folder may import which (docs/architecture.md), and that the door needs no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment

PACKAGE = Path(__file__).parents[2] / "raecli"
FLOORS = {
    "errors": 0,
    "compiled": 0,
    "console": 0.5,
    "recipe": 1,
    "store": 2,
    **dict.fromkeys(("data", "models", "flow", "losses", "metrics", "training"), 3),
    "convert": 3.5,  # holds what it converts against the modules of models/
    "evaluation": 3.5,  # metrics of images through networks, over ranks: what evaluating and training stages share
    "decoding": 3.5,  # the turns of a decoder and its adversary: models, losses, data and training together
    "sampling": 3.75,  # noise to images: models, labels, decoding; a sweep measures them by evaluation/
    "stages": 4,
}
DOOR = {
    "__init__",
    "__main__",
    "launch",
    "launch_folder",
    "plan",
    "doctor",
    "inspection",
    "report",
    "cli",
}  # above all floors
FLAT = ("flow", "losses", "metrics")  # take numbers, never a recipe


def imports_of(path: Path) -> list[str]:
    """The parts of raecli that a file imports: `recipe.blocks`, `errors`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("raecli."):
            found.append(node.module.removeprefix("raecli."))
        elif isinstance(node, ast.Import):
            found += [alias.name.removeprefix("raecli.") for alias in node.names if alias.name.startswith("raecli.")]
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


def test_imports_go_down_the_floors():
    breaches, seen = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            seen += 1
            other = name.partition(".")[0]
            if home in DOOR or other == home:
                continue
            if other in DOOR or FLOORS[other] >= FLOORS[home]:
                breaches.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert breaches == []
    assert seen > 150  # or the walk saw nothing


def test_stages_do_not_import_one_another():
    stages = [
        path for path in (PACKAGE / "stages").glob("*.py") if not path.name.startswith("_") and path.stem != "worker"
    ]
    assert len(stages) == 8
    for path in stages:
        assert [name for name in imports_of(path) if name.startswith("stages.")] == []


def test_the_mathematics_knows_no_recipe():
    files = [path for folder in FLAT for path in (PACKAGE / folder).glob("*.py")]
    assert len(files) > 10
    assert [path.name for path in files if any(name.startswith("recipe") for name in imports_of(path))] == []


def test_nothing_unpickles_or_runs_a_shell():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                told = ast.unparse(node)
                assert not told.startswith(("pickle.", "os.system(", "eval(", "exec(", "yaml.load(")), (path, told)
                assert "torch.load(" not in told or "weights_only=True" in told, (path, told)
                assert "np.load(" not in told or "allow_pickle=False" in told, (path, told)
                assert "shell=True" not in told, (path, told)


def test_one_file_writes_safetensors_and_tells_a_full_disk():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 100
    assert [path.name for path in files if " save_file(" in path.read_text()] == ["tensors.py"]


def test_no_file_outgrows_a_reader():
    long = {path.name: count for path in PACKAGE.rglob("*.py") if (count := len(path.read_text().splitlines())) > 400}
    assert long == {}


VERBS = [
    "",
    "encode-cache",
    "verify",
    "train-decoder",
    "train-diffusion",
    "sample",
    "reconstruct",
    "eval",
    "eval reconstruction",
    "overfit-toy",
    "recipes",
    "convert",
    "fetch",
    "plot",
    "report",
    "doctor",
    "inspect",
    "flops",
]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_quick_and_needs_no_torch(verb):
    code = (
        "import sys, time; sys.argv = ['rae', *sys.argv[1:]]\n"
        "from raecli.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'timm', 'numpy', 'scipy', 'matplotlib', 'pydantic', 'yaml', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print('CPU', time.process_time())"
    )
    seconds = []
    for _ in range(3):  # the least of three: caches are cold the first time, and a busy machine adds to any of them
        result = subprocess.run(
            [sys.executable, "-c", code, *verb.split(), "--help"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        assert "Usage: rae" in result.stdout
        seconds.append(float(result.stdout.rpartition("CPU ")[2]))
        if seconds[-1] < 0.4:
            break
    # CPU seconds, as a busy machine stretches the wall's; 0.4 s is promised, 0.15 s was seen.
    assert min(seconds) < 0.4


def test_help_lists_every_verb_the_six_stages_first(rae):
    _, _, listed = rae("--help").stdout.partition("Commands:")
    found = re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE)
    assert found[:6] == ["encode-cache", "train-decoder", "train-diffusion", "sample", "eval", "overfit-toy"]
    assert sorted(found) == sorted({verb.split()[0] for verb in VERBS if verb})
