# What a contributor does here. Each recipe is a thin call that works without just, too.

# List the recipes.
[private]
default:
    @just --list --unsorted

# Run the main job on an embedded cluster: a pod's secrets, mounted, shown and taken down.
[group('start here')]
demo:
    cargo run --bin e2e

# Run all tests: the driver's, the provider's, and every scenario on the embedded cluster.
[group('start here')]
test:
    cargo test --workspace

# Run every scenario on a cluster: kind, local (real Kubernetes without Docker) or embedded.
[group('clusters')]
e2e cluster="kind":
    E2E_CLUSTER={{cluster}} cargo test --workspace --test scenarios

# Run every scenario on kind with three nodes, where pods move between nodes.
[group('clusters')]
e2e-multi-node:
    KIND_NODES=3 just e2e kind

# Upgrade under pods that run, from $E2E_PREVIOUS (the last release, else the last commit) and from the existing driver.
[group('clusters')]
e2e-upgrade cluster="kind":
    E2E_CLUSTER={{cluster}} \
    E2E_PREVIOUS="${E2E_PREVIOUS:-$(git describe --tags --match 'v*' --abbrev=0 HEAD^ 2>/dev/null || git rev-parse HEAD^)}" \
    cargo test --workspace --test scenarios upgrades

# Check formatting, lints and documentation as the gate does.
[group('before a pull request')]
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Test the images, in Docker.
[group('before a pull request')]
containers:
    cargo test --workspace --test containers

# Measure memory, size, requests and latency of the release binary; fail when over budget.
[group('before a pull request')]
budget:
    cargo run --bin e2e -- budget

# Write what is generated in deploy/ anew: the CRDs, the lean manifest, the chart's tables.
[group('before a pull request')]
manifests:
    UPDATE_DEPLOY=1 cargo test -p driver --test manifests --test chart

# Run everything that a pull request has to pass.
[group('before a pull request')]
gate:
    .ci/run

# Take one step of a release: images, sbom, push, sign, chart, manifests or publish ($VERSION, $REGISTRY).
[group('releases')]
release step:
    .ci/release {{step}}
