#!/bin/sh
# Runs every fuzz target for so many seconds: fuzz/run.sh [SECONDS [TARGET...]]
# Needs `cargo install cargo-fuzz`. RUSTC_BOOTSTRAP lets the stable compiler use its sanitizers.
set -eu
cd "$(dirname "$0")"
seconds=${1:-60}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- http1_request http1_response sniff client_hello mux discovery
export RUSTC_BOOTSTRAP=1
host=$(rustc -vV | sed -n 's/^host: //p')
for target in "$@"; do
    mkdir -p "corpus/$target"
    # cargo-fuzz asks for a target of its own; the host's is what there is.
    cargo fuzz run --fuzz-dir . --target "$host" "$target" "corpus/$target" "seeds/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1
done
