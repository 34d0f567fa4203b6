# Sourced by the scripts beside it: a virtual environment with rae in it, made once, then used. $1: extras, e.g. dev.
# RAE_VENV names another folder than .venv; RAE_PYTHON another interpreter.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

find_python() {
    for name in "${RAE_PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$name" ] && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; install it, or name it in RAE_PYTHON" >&2
    return 2
}

set_up() {
    local extras=$1 venv=${RAE_VENV:-$root/.venv} python wanted stamp
    stamp=$venv/.rae-$extras
    wanted=$(cat pyproject.toml constraints.txt | sha256sum)
    if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
        python=$(find_python) || return
        echo "== setting up $venv (PyTorch is large: a few minutes, 6 GB)"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || {
            echo "error: $python -m venv failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
            return 2
        }
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" || {
            echo "error: the installation failed; see above (a package index and 6 GB of disk are needed)" >&2
            return 2
        }
        echo "$wanted" >"$stamp"
    fi
    export PATH="$venv/bin:$PATH"
}

# On a CPU: no more threads than cores, and loopback for processes that talk to each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
set_up "$1"
