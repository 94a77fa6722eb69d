#!/usr/bin/env bash
# Fetches ptxas, NVIDIA's assembler, which judges every kernel of this repository: 37 MB from PyPI, no root, no GPU.
# Prints where it lies; does nothing if it is there already. Needs Python 3 with pip, on Linux (x86-64 or aarch64).
# The cache is $FLASHATTN_CACHE, else $XDG_CACHE_HOME/flashattn, else ~/.cache/flashattn: where crates/ptx looks.
set -euo pipefail
version=13.0.88 # also VERSION in crates/ptx/src/assemble.rs
cache=${FLASHATTN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/flashattn}/ptxas
ptxas=$cache/$version/ptxas
if [ ! -x "$ptxas" ]; then
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX") # in the cache's file system, so that the last step is one rename
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$work" "nvidia-cuda-nvcc==$version" >&2
    # Python unpacks what pip could fetch: unzip need not be installed.
    python3 - "$work" <<'PY'
import glob, os, sys, zipfile
work = sys.argv[1]
(wheel,) = glob.glob(os.path.join(work, "*.whl"))
with zipfile.ZipFile(wheel) as files:
    (name,) = [name for name in files.namelist() if name.endswith("/bin/ptxas")]
    os.mkdir(os.path.join(work, "new"))
    with open(os.path.join(work, "new", "ptxas"), "wb") as out:
        out.write(files.read(name))
PY
    chmod 755 "$work/new/ptxas" "$work/new"
    "$work/new/ptxas" --version >/dev/null
    # Another run may have been faster; its file is the same.
    mv -T "$work/new" "$cache/$version" 2>/dev/null || [ -x "$ptxas" ]
fi
echo "$ptxas"
