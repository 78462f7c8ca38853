#!/usr/bin/env bash
# Makes the images of the Dockerfile from programs that are built already, without docker:
#
#   tests/images.sh PROGRAMS OUT [TAG]
#
# PROGRAMS is a target folder such as target/debug. In OUT come weft-control-plane.tar and
# weft-proxy.tar (OCI layout), named mesh.local/weft-control-plane:TAG and mesh.local/weft-proxy:TAG
# (dev by default). Programs that are not static get the libraries that they load, and nothing else.
#
# WEFT_CLUSTER is the tool with `image OUT NAME …`; by default that of the folder beside the
# repository's.
set -euo pipefail
programs=$1 out=$2 tag=${3:-dev}
repository=$(cd "$(dirname "$0")/.." && pwd)
for tool in "${WEFT_CLUSTER:-}" "$repository"/../shared/cluster/cluster "$repository"/../../shared/cluster/cluster; do
    [ -x "$tool" ] && break
done
mkdir -p "$out"
stripped=$(mktemp -d)
trap 'rm -rf "$stripped"' EXIT

image() {
    local program=$1 user=$2 libraries=() library
    strip -o "$stripped/$program" "$programs/$program"
    # "lib => /path (0x…)" and "/lib64/ld-linux… (0x…)"; a static program has none.
    while read -r library; do
        libraries+=("$library:$library")
    done < <(ldd "$stripped/$program" 2>/dev/null | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^[[:space:]]*\(\/[^ ]*\) .*/\1/p')
    "$tool" image "$out/$program.tar" "mesh.local/$program:$tag" --user "$user" \
        --entrypoint "/$program" "$stripped/$program:/$program" "${libraries[@]}"
    echo "mesh.local/$program:$tag: $(stat -c %s "$stripped/$program") bytes of program," \
        "${#libraries[@]} libraries, image $(stat -c %s "$out/$program.tar") bytes"
}

image weft-control-plane 65532
image weft-proxy 1337
# What runs in the pods of the tests.
if [ -x "$programs/weft-probe" ]; then
    image weft-probe 65532
fi
