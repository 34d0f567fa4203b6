"""What the launcher starts on every rank: `python -m raecli.stages RECIPE TIMEOUT`."""

import os
import sys

from raecli.console import end_workers_soon, guard_streams
from raecli.stages.worker import die_with_parent, work

if __name__ == "__main__":
    die_with_parent()
    guard_streams()
    end_workers_soon()
    code = work(sys.argv[1], float(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a broken collective must not hold the process
