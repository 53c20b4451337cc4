# A contributor's commands. Each recipe is one command that also works without just.

# List the recipes.
[private]
default:
    @just --list --unsorted

# Run the demo: mount a pod's secrets on an embedded cluster, show them, take everything down.
[group('start here')]
demo:
    cargo run --bin e2e

# Run all tests of all crates; the scenarios run on the embedded cluster.
[group('start here')]
test:
    cargo test --workspace

# Run all scenarios on a cluster: kind, local (real Kubernetes without Docker) or embedded.
[group('clusters')]
e2e cluster="kind":
    E2E_CLUSTER={{cluster}} cargo test --workspace --test scenarios

# Run all scenarios on kind with three nodes, so that pods can move between nodes.
[group('clusters')]
e2e-multi-node:
    KIND_NODES=3 just e2e kind

# Upgrade under running pods from $E2E_PREVIOUS (the last release, or else the last commit) and from the existing driver.
[group('clusters')]
e2e-upgrade cluster="kind":
    E2E_CLUSTER={{cluster}} \
    E2E_PREVIOUS="${E2E_PREVIOUS:-$(git describe --tags --match 'v*' --abbrev=0 HEAD^ 2>/dev/null || git rev-parse HEAD^)}" \
    cargo test --workspace --test scenarios upgrades

# Let faults of all kinds strike an embedded cluster (E2E_CLUSTER=local: a real one) for some minutes, with a seed of its own, and check the driver's promises.
[group('clusters')]
chaos minutes="10" *options:
    cargo run --bin e2e -- chaos --minutes {{minutes}} {{options}}

# Check formatting, lints and documentation, as the gate does.
[group('before a pull request')]
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Test the images in Docker.
[group('before a pull request')]
containers:
    cargo test --workspace --test containers

# Measure size, memory, requests and time of the release build, and fail when one exceeds its budget.
[group('before a pull request')]
budget:
    cargo run --bin e2e -- budget

# Measure this driver and the existing one side by side on a real API server, and write docs/benchmarks.*.
[group('before a pull request')]
bench *options:
    cargo run --release --bin e2e -- bench --docs docs {{options}}

# Run 300 drivers in front of one API server through rest, storms and outages, and write docs/scale.*.
[group('before a pull request')]
scale *options:
    cargo run --release --bin e2e -- scale --docs docs {{options}}

# Show where the memory of the release build is, and write it into docs/sizing.md.
[group('before a pull request')]
footprint *options:
    cargo run --bin e2e -- footprint --docs docs {{options}}

# Put load on the release build: storms, rotations, large answers, a provider that hangs.
[group('before a pull request')]
load:
    cargo run --bin e2e -- load

# Run the release build for long, and draw its memory, descriptors, threads and latency.
[group('before a pull request')]
soak minutes="60":
    cargo run --bin e2e -- soak --minutes {{minutes}}

# Search for inputs that break the driver: so many seconds for each target of driver/src/fuzz.rs, or for those named.
[group('before a pull request')]
fuzz seconds="60" *targets:
    .ci/fuzz {{seconds}} {{targets}}

# Write the generated files of deploy/ and docs/: the CRDs, the lean manifest, tables, copies.
[group('before a pull request')]
manifests:
    UPDATE_DEPLOY=1 cargo test --workspace --test manifests --test chart --test hardening
    UPDATE_DEPLOY=1 cargo test --workspace --test book
    @[ -f "${HELM:-}" ] || command -v helm >/dev/null || [ -f /var/cache/e2e-tools/helm ] || \
        echo "skipped: the chart and its snapshots were not rendered, because there is no Helm in \$HELM or on the path"

# Build the book of docs/ into target/book (mdBook).
[group('before a pull request')]
book:
    mdbook build docs

# Run all checks that a pull request has to pass.
[group('before a pull request')]
gate:
    .ci/run

# Run one step of a release: check, images, sbom, push, sign, chart, manifests, checksums or publish ($VERSION, $REGISTRY).
[group('releases')]
release step:
    .ci/release {{step}}
