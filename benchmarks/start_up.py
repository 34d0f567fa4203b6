"""PERFORMANCE row 10: CPU seconds of `rae --help` and each verb's, over `python -c pass`. One JSON line a verb."""

import json
import resource
import statistics
import subprocess
import sys

from raecli.cli.app import VERBS

REPEATS = 11  # of both sides, by turns


def cpu_seconds(*arguments: str) -> float:
    """User and system seconds of a Python started so."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    for verb in ("", *VERBS, "eval fid"):
        pairs = [
            (cpu_seconds("-m", "raecli", *verb.split(), "--help"), cpu_seconds("-c", "pass")) for _ in range(REPEATS)
        ]
        ours, nothing = (statistics.median(side) for side in zip(*pairs, strict=True))
        line = {"row": 10, "verb": verb or "rae", "ours_s": ours, "python_pass_s": nothing, "ratio": ours / nothing}
        print(json.dumps({**line, "bar": "<= 12 and <= 0.4 s"}))


if __name__ == "__main__":
    main()
