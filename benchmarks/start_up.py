"""PERFORMANCE row 10: CPU seconds of `rae --help` and each verb's, over `python -c pass`. One JSON line a verb."""

import json
import os
import statistics
import subprocess
import sys

VERBS = ("", "encode-cache", "train-decoder", "train-diffusion", "sample", "eval", "overfit-toy", "recipes")


def cpu_seconds(command: list[str], repeats: int = 7) -> float:
    """Median user + system seconds of a command."""
    seconds = []
    for _ in range(repeats):
        before = os.times()
        subprocess.run(command, check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(seconds)


def main() -> None:
    nothing = cpu_seconds([sys.executable, "-c", "pass"], 21)
    for verb in VERBS:
        ours = cpu_seconds([sys.executable, "-m", "raecli", *verb.split(), "--help"])
        line = {"row": 10, "verb": verb or "rae", "ours_s": ours, "python_pass_s": nothing, "ratio": ours / nothing}
        print(json.dumps({**line, "bar": "<= 12 and <= 0.4 s"}))


if __name__ == "__main__":
    main()
