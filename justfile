# Short names for the commands of CONTRIBUTING.md; `just` alone lists them. None of this is needed
# to build Weft: Cargo does.

set positional-arguments

# What there is
default:
    @just --list

# The three programs, as released
build:
    cargo build --release

# A mesh on this machine, driven through failures
demo *arguments: build
    ./target/release/weft demo "$@"

# All tests; the end-to-end ones need network namespaces
test *arguments:
    cargo test --workspace "$@"

# Formatting, clippy, documentation links, dependencies
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items
    cargo deny --workspace check bans licenses sources

# Measures Weft, and Envoy with --envoy PATH (bench/README.md)
bench *arguments:
    cargo run --release -p weft-bench -- "$@"

# Every fuzz target for so many seconds, or only those named (fuzz/README.md)
fuzz *arguments:
    fuzz/run.sh "$@"

# Everything that must pass before a merge
ci:
    .ci/run
