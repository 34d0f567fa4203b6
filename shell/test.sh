#!/usr/bin/env bash
# Sets up and runs every check: format, lint, types, tests. Needs no network after the installation.
# Arguments go to pytest: bash shell/test.sh tests/unit -k recipe
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev

ruff format --check .
ruff check .
mypy
export HF_HUB_OFFLINE=1
python -m pytest -n "${RAE_TEST_WORKERS:-2}" "$@" && exit 0
# Faults are tested by the clock: what failed beside other tests is tried once more by itself, and has to pass then.
exec python -m pytest --last-failed --last-failed-no-failures none "$@"
