#!/usr/bin/env bash
# The Python package's tests and its benchmark on a machine with a GPU, PyTorch and perhaps JAX, but no network and no Rust.
#
#   bash tools/python_gpu.sh prepare DIR    here: the wheel and pytest, unpacked into DIR (10 MB), which travels
#   bash tools/python_gpu.sh test DIR [pytest's arguments]
#   bash tools/python_gpu.sh bench DIR [benches/peers/python.py's arguments]
set -euo pipefail
usage="usage: $0 prepare|test|bench DIR [arguments]"
mode=${1:?$usage}
dir=$(realpath -m "${2:?$usage}")
shift 2
cd "$(dirname "$0")/.."
package=crates/flashattn-python
case $mode in
prepare)
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    rm -rf "$dir"
    maturin build --quiet --release --locked -m "$package/Cargo.toml" -o "$wheels"
    python3 -m pip install --quiet --target "$dir" "$(grep ^pytest== "$package/requirements-test.txt")" "$wheels"/*.whl
    ;;
test)
    cd "$package"
    # Warnings are errors with the pinned libraries only.
    PYTHONPATH=$dir exec python3 -m pytest -p no:cacheprovider -o filterwarnings=default --quiet "$@"
    ;;
bench)
    PYTHONPATH=$dir exec python3 benches/peers/python.py --device cuda "$@"
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
