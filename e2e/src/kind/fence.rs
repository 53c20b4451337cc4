//! The network of the test clusters, which nothing leaves.
//!
//! A pod that asks for an address nobody serves would have its packet follow the default route
//! off the machine. So the clusters get a Docker network of their own, and one rule that refuses
//! what comes from its bridge and is not for its bridge. A network that is internal in Docker's
//! sense would say the same, but publishes no port, and then kind cannot reach its own API
//! server. kind's usual network stays as it is: a contributor's own clusters live there.
//!
//! What the fence does not see are the questions that Docker's engine itself sends to the
//! machine's name server on behalf of a container. So the cluster's own DNS is off, and a pod's
//! question for a name goes nowhere.

use super::tools::{A_MOMENT, Tools};
use crate::cluster::{Error, Result};

/// The Docker network, and its bridge on the machine.
pub(super) const NETWORK: &str = "kind-e2e";

/// Arguments: -C, -I or -D. The rule is made from within a container, in the machine's network:
/// that needs no root here, and finds the very machine that Docker runs on. Which of the two
/// kinds of iptables the engine speaks shows in which of them has its chain.
const RULE: &str = r#"
for program in iptables iptables-nft iptables-legacy; do
  "$program" -w -n -L DOCKER-USER >/dev/null 2>&1 || continue
  exec "$program" -w "$1" DOCKER-USER -i "$2" ! -o "$2" -m comment --comment "e2e: nothing leaves the machine" -j REJECT
done
echo "there is no chain DOCKER-USER: does this Docker engine run with iptables switched off?" >&2
exit 1
"#;

/// Makes the network, if it is not there, and the fence.
///
/// # Errors
/// When Docker refuses either: without the fence there is no cluster.
pub(super) async fn put_up(tools: &Tools, node_image: &str) -> Result<()> {
    let failed = |reason: String| Error::Start(format!("Docker network {NETWORK}: {reason}"));
    let there = tools
        .docker(["network", "inspect", NETWORK], A_MOMENT)
        .await;
    if there.is_err() {
        let bridge = format!("com.docker.network.bridge.name={NETWORK}");
        tools
            .docker(
                [
                    "network", "create", "--driver", "bridge", "--opt", &bridge, NETWORK,
                ],
                A_MOMENT,
            )
            .await
            .map_err(failed)?;
    }
    if rule(tools, node_image, "-C").await.is_err() {
        rule(tools, node_image, "-I").await.map_err(failed)?;
    }
    Ok(())
}

/// Removes both, if they are there.
///
/// # Errors
/// When a container still uses the network.
pub(super) async fn take_down(tools: &Tools, node_image: &str) -> Result<()> {
    let failed = |reason: String| Error::Start(format!("Docker network {NETWORK}: {reason}"));
    let there = tools
        .docker(["network", "inspect", NETWORK], A_MOMENT)
        .await;
    if there.is_err() {
        // Whoever removes the network removes the rule; without the first there is no second.
        return Ok(());
    }
    tools
        .docker(["network", "rm", NETWORK], A_MOMENT)
        .await
        .map_err(failed)?;
    rule(tools, node_image, "-D").await.map_err(failed)?;
    Ok(())
}

async fn rule(
    tools: &Tools,
    node_image: &str,
    action: &str,
) -> std::result::Result<String, String> {
    let container = ["run", "--rm", "--network", "host", "--cap-add", "NET_ADMIN"];
    let program = [
        "--entrypoint",
        "sh",
        node_image,
        "-c",
        RULE,
        "sh",
        action,
        NETWORK,
    ];
    tools
        .docker(container.iter().chain(&program), A_MOMENT)
        .await
}
