//! The network of the test clusters, and a rule that lets no packet leave it.
//!
//! Without the rule, a packet to an address that no one serves would follow the default route off
//! the machine. The clusters have a Docker network of their own, and the rule rejects packets from
//! its bridge that are not for its bridge. An internal network of Docker would have the same effect,
//! but publishes no port, and kind could not reach its API server. kind's usual network, which a
//! contributor's own clusters use, stays as it is.
//!
//! The rule does not apply to the requests that Docker's engine itself sends to the machine's name
//! server for a container. Therefore the cluster's DNS is off, and no pod can look up a name.

use super::tools::{A_MOMENT, NETWORK, Tools};
use crate::cluster::{Error, Result};

/// The script that checks (-C), inserts (-I) or deletes (-D) the rule for a bridge. It runs in a
/// container in the machine's network: this needs no root here, and finds the machine that Docker
/// runs on. The engine uses the kind of iptables that has its chain.
const RULE: &str = r#"
for program in iptables iptables-nft iptables-legacy; do
  "$program" -w -n -L DOCKER-USER >/dev/null 2>&1 || continue
  exec "$program" -w "$1" DOCKER-USER -i "$2" ! -o "$2" -m comment --comment "e2e: nothing leaves the machine" -j REJECT
done
echo "there is no chain DOCKER-USER: does this Docker engine run with iptables switched off?" >&2
exit 1
"#;

/// Makes the network and the rule, where they do not exist.
///
/// # Errors
/// When Docker refuses one of them; no cluster is made then.
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

/// Removes both, if they exist.
///
/// # Errors
/// When a container still uses the network.
pub(super) async fn take_down(tools: &Tools, node_image: &str) -> Result<()> {
    let failed = |reason: String| Error::Start(format!("Docker network {NETWORK}: {reason}"));
    let there = tools
        .docker(["network", "inspect", NETWORK], A_MOMENT)
        .await;
    if there.is_err() {
        // The rule is removed together with the network.
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
