# `just VERB`; the scripts in shell/ do the same without just.

fmt:
    ruff format .
    ruff check --fix .

lint:
    ruff format --check .
    ruff check .

types:
    mypy

test:
    python -m pytest -n 2 tests/unit tests/parity

e2e:
    python -m pytest -n 2 tests/e2e

demo:
    bash shell/demo.sh

bench:
    for file in benchmarks/*.py; do python $file; done
