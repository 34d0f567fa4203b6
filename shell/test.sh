#!/usr/bin/env bash
# Sets up and runs every check: format, lint, types, tests. Needs no network after the installation.
# Arguments go to pytest: bash shell/test.sh tests/unit -k recipe
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev

ruff format --check .
ruff check .
mypy
export HF_HUB_OFFLINE=1
exec python -m pytest -n "${RAE_TEST_WORKERS:-2}" "$@"
