# What a contributor does here. Each recipe is a thin call that works without just, too.

# List the recipes.
default:
    @just --list --unsorted

# Run the main job: a pod's secrets, mounted end to end on an embedded cluster, shown and torn down.
demo:
    cargo run -p e2e

# Run all tests: the driver's, the provider's, and every scenario on the embedded cluster.
test:
    cargo test --workspace

# Run the scenarios on a cluster: embedded, local (real Kubernetes without Docker, as root) or kind.
e2e cluster="embedded":
    E2E_CLUSTER={{cluster}} cargo test -p e2e --test scenarios

# Test the images, in Docker.
containers:
    cargo test -p e2e --test containers

# Check formatting, lints and documentation as the gate does.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

# Measure memory, size, requests and latency of the release binary, and fail when over budget.
budget:
    cargo run --release -p e2e -- budget

# Write what is generated in deploy/ anew: the CRDs, the lean manifest, the chart's tables.
manifests:
    UPDATE_DEPLOY=1 cargo test -p driver --test manifests --test chart

# Run everything that a pull request has to pass.
gate:
    .ci/run
