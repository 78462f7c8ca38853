# The images of Weft: two static programs, each alone in an empty image; the proxy
# with the certificates its system trusts.
#
#   docker build --target control-plane -t weft-control-plane:0.1.0 .
#   docker build --target proxy -t weft-proxy:0.1.0 .
#
# Statically linked against glibc rather than musl: what was measured of the proxy (ARCHITECTURE.md) was
# measured with glibc's allocator, and it costs about 1 MB a program over linking dynamically. Neither
# program loads anything at run time: names are resolved by hickory in the proxy and by glibc's own
# files and dns in the control plane, both of which glibc has in itself since 2.34. The capture rules
# are spoken to the kernel over netlink; no program is needed for them.
FROM rust:1.95-bookworm AS build
WORKDIR /weft
COPY . .
# For the platform that is built for (--platform), which is the one that this runs on. It is named all
# the same: with --target the flag is not for build scripts and procedural macros, which cannot be static.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/weft/target \
    target=$(rustc --print host-tuple) \
    && RUSTFLAGS="-C target-feature=+crt-static" cargo build --locked --release --target "$target" \
        -p weft-proxy -p weft-control-plane \
    && cp "target/$target/release/weft-proxy" "target/$target/release/weft-control-plane" /

FROM scratch AS control-plane
COPY --from=build /weft-control-plane /weft-control-plane
USER 65532:65532
ENTRYPOINT ["/weft-control-plane"]

FROM scratch AS proxy
COPY --from=build /weft-proxy /weft-proxy
# Whom to trust outside the mesh (ExternalService with tls and without caCertificates).
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# weft-init, which sets the capture rules, is the same image run as root with NET_ADMIN.
USER 1337:1337
ENTRYPOINT ["/weft-proxy"]
