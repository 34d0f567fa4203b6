"""What the launcher starts on every rank: `python -m raecli.stages RECIPE TIMEOUT`."""

import os
import sys

from raecli.stages.worker import die_with_parent, work

if __name__ == "__main__":
    die_with_parent()
    code = work(sys.argv[1], float(sys.argv[2]))
    for stream in (sys.stdout, sys.stderr):
        if stream:  # closed by the shell: >&-
            stream.flush()
    os._exit(code)  # threads of a broken collective must not hold the process
