#!/usr/bin/env bash
# Fuzzes each target for SECONDS_EACH (default 15) under AddressSanitizer, with the stable toolchain:
#
#     fuzz/run.sh                          # all targets
#     SECONDS_EACH=3600 fuzz/run.sh expr   # one, for an hour
#
# The flags are those of cargo-fuzz; `cargo fuzz run TARGET` works, too, where it and a nightly toolchain are installed.
# RUSTC_BOOTSTRAP=1 lets the stable compiler take -Zsanitizer; its runtime comes with every toolchain.
# A crash leaves its input in fuzz/artifacts/; run the target's binary with that file to see it again.
set -euo pipefail
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- attention expr problem tensor_file
seconds=${SECONDS_EACH:-15}
target=$(rustc -vV | sed -n 's/^host: //p')
flags=(--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares)
RUSTC_BOOTSTRAP=1 RUSTFLAGS="${flags[*]}" cargo build --quiet --release --target "$target"
for name in "$@"; do
    echo "fuzzing $name for $seconds s"
    mkdir -p "corpus/$name" "seeds/$name" "artifacts/$name"
    "${CARGO_TARGET_DIR:-target}/$target/release/$name" "corpus/$name" "seeds/$name" \
        -max_total_time="$seconds" -artifact_prefix="artifacts/$name/" -max_len=4096 -len_control=20 \
        -timeout=60 -rss_limit_mb=4096 -malloc_limit_mb=512 -print_funcs=0 -print_final_stats=1 2>&1 |
        { grep --line-buffered -vE '^(INFO|#|")' || true; }
done
