//! The cluster's network: a bridge, and rules that keep the cluster's packets on this machine.
//!
//! The bridge and the chains have names of their own, and are removed whoever made them: a program
//! that saves all rules of the machine and restores them later brings ours back as well.

use std::fmt::Display;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use super::layout::{API_PORT, BRIDGE, NODE_ADDRESS, PODS, SERVICE_ADDRESS, SERVICES};
use crate::cluster::{Error, Result};

const SERVICE: Chain = Chain {
    table: "nat",
    name: "E2E-LOCAL-SERVICE",
    hooks: &["PREROUTING", "OUTPUT"],
};
const FORWARD: Chain = Chain {
    table: "filter",
    name: "E2E-LOCAL-FORWARD",
    hooks: &["FORWARD"],
};
const OUTPUT: Chain = Chain {
    table: "filter",
    name: "E2E-LOCAL-OUTPUT",
    hooks: &["OUTPUT"],
};

/// Empty while nothing keeps pods from the API server.
const INPUT: Chain = Chain {
    table: "filter",
    name: "E2E-LOCAL-INPUT",
    hooks: &["INPUT"],
};

/// iptables fails while another program changes rules, as a Docker engine does that starts or
/// stops.
const ATTEMPTS: u32 = 20;
const BETWEEN: Duration = Duration::from_millis(100);

/// How pods fail to reach the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Their packets vanish.
    Silent,
    /// Their connections are refused, and those that there are break.
    Refused,
}

/// A chain of this cluster, with the chains that jump to it.
struct Chain {
    table: &'static str,
    name: &'static str,
    hooks: &'static [&'static str],
}

/// Makes the bridge and the rules; removes those that exist first.
///
/// # Errors
/// What `ip` or `iptables` writes to standard error.
pub(super) fn make() -> Result<()> {
    remove()?;
    let address = format!("{NODE_ADDRESS}/16");
    run("ip", &["link", "add", BRIDGE, "type", "bridge"])?;
    run("ip", &["address", "add", &address, "dev", BRIDGE])?;
    run("ip", &["link", "set", BRIDGE, "up"])?;
    // Without it, a machine without a default route does not reach services.
    run("ip", &["route", "add", SERVICES, "dev", BRIDGE])?;
    for chain in [&SERVICE, &FORWARD, &OUTPUT, &INPUT] {
        chain.iptables(&["-N", chain.name])?;
        for hook in chain.hooks {
            chain.iptables(&["-I", hook, "-j", chain.name])?;
        }
    }
    // There is no kube-proxy; this is the only service that is used.
    let api = format!("{NODE_ADDRESS}:{API_PORT}");
    let port = ["-p", "tcp", "--dport", "443"];
    SERVICE.append(
        &["-d", SERVICE_ADDRESS],
        &port,
        &["DNAT", "--to-destination", &api],
    )?;
    // Pods reach each other and, without forwarding, the node.
    FORWARD.append(&["-i", BRIDGE], &["-o", BRIDGE], &["ACCEPT"])?;
    FORWARD.append(&["-i", BRIDGE], &[], &["REJECT"])?;
    FORWARD.append(&["-o", BRIDGE], &[], &["REJECT"])?;
    // Packets to addresses that no pod or service has.
    OUTPUT.append(&["-d", SERVICES], &[], &["REJECT"])?;
    let elsewhere = [
        "!",
        "-o",
        BRIDGE,
        "-m",
        "addrtype",
        "!",
        "--dst-type",
        "LOCAL",
    ];
    OUTPUT.append(&["-d", PODS], &elsewhere, &["REJECT"])
}

/// Removes the bridge and the rules, as far as they exist.
///
/// # Errors
/// When one of them cannot be removed.
pub(super) fn remove() -> Result<()> {
    // Each is tried, even if another one fails.
    let removed = [
        SERVICE.remove(),
        FORWARD.remove(),
        OUTPUT.remove(),
        INPUT.remove(),
        remove_bridge(),
    ];
    removed.into_iter().collect()
}

/// Keeps pods, and nobody else, from the API server.
///
/// # Errors
/// What `iptables` writes to standard error.
pub(super) fn cut_api(how: Cut) -> Result<()> {
    let port = API_PORT.to_string();
    let target: &[&str] = match how {
        Cut::Silent => &["DROP"],
        Cut::Refused => &["REJECT", "--reject-with", "tcp-reset"],
    };
    INPUT.append(&["-i", BRIDGE], &["-p", "tcp", "--dport", &port], target)
}

/// Undoes [`cut_api`]; returns the number of packets that did not arrive.
///
/// # Errors
/// As of [`cut_api`].
pub(super) fn mend_api() -> Result<u64> {
    let rules = INPUT.iptables(&["-nvx", "-L", INPUT.name]);
    INPUT.iptables(&["-F", INPUT.name])?;
    Ok(lost_packets(&rules?))
}

/// Adds up the packets of the rules in what `iptables -nvx -L` prints: two lines of titles, and a line
/// for each rule that begins with its number.
fn lost_packets(rules: &str) -> u64 {
    let counts = rules
        .lines()
        .skip(2)
        .filter_map(|rule| rule.split_whitespace().next());
    counts.filter_map(|count| count.parse::<u64>().ok()).sum()
}

fn remove_bridge() -> Result<()> {
    match run("ip", &["link", "show", BRIDGE]) {
        Ok(_) => run("ip", &["link", "delete", BRIDGE]).map(drop),
        Err(_not_there) => Ok(()),
    }
}

impl Chain {
    fn append(&self, from: &[&str], matches: &[&str], target: &[&str]) -> Result<()> {
        let rule = [&["-A", self.name], from, matches, &["-j"], target].concat();
        self.iptables(&rule).map(drop)
    }

    fn remove(&self) -> Result<()> {
        for _ in 1..ATTEMPTS {
            if self.try_to_remove().is_ok() {
                return Ok(());
            }
            sleep(BETWEEN);
        }
        self.try_to_remove()
    }

    fn try_to_remove(&self) -> Result<()> {
        let rules = self.iptables(&["-S"])?;
        let declared = format!("-N {}", self.name);
        if !rules.lines().any(|rule| rule == declared) {
            return Ok(());
        }
        for hook in self.hooks {
            let jump = format!("-A {hook} -j {}", self.name);
            for _ in rules.lines().filter(|rule| *rule == jump) {
                self.iptables(&["-D", hook, "-j", self.name])?;
            }
        }
        self.iptables(&["-F", self.name])?;
        self.iptables(&["-X", self.name]).map(drop)
    }

    fn iptables(&self, args: &[&str]) -> Result<String> {
        run("iptables", &[&["-w", "-t", self.table], args].concat())
    }
}

/// Runs a program of the system and returns its output.
fn run(program: &str, args: &[&str]) -> Result<String> {
    let failed =
        |reason: &dyn Display| Error::Start(format!("{program} {}: {reason}", args.join(" ")));
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(&error))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(failed(&String::from_utf8_lossy(&output.stderr).trim()))
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// Runs a test in a network of its own, where there can be one.
    fn in_a_network_of_its_own(test: fn()) {
        let run = move || {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                return crate::skipped::skip(&format!("no network of its own: {error}"));
            }
            for (program, list) in [("ip", "link"), ("iptables", "-S")] {
                if let Err(error) = super::run(program, &[list]) {
                    return crate::skipped::skip(&error.to_string());
                }
            }
            test();
        };
        // The list of skipped tests names the thread.
        let name = std::thread::current().name().unwrap().to_owned();
        let thread = std::thread::Builder::new().name(name).spawn(run);
        thread.unwrap().join().unwrap();
    }

    fn rules() -> String {
        ["nat", "filter"]
            .map(|table| run("iptables", &["-t", table, "-S"]).unwrap())
            .concat()
    }

    fn is_bridge_there() -> bool {
        run("ip", &["link"]).unwrap().contains(BRIDGE)
    }

    #[test]
    fn bridge_and_rules_are_removed_again() {
        in_a_network_of_its_own(|| {
            let before = rules();
            make().unwrap();
            assert!(is_bridge_there());
            assert!(rules().contains("-A E2E-LOCAL-FORWARD -i e2e0 -o e2e0 -j ACCEPT"));
            remove().unwrap();
            assert!(!is_bridge_there());
            assert_eq!(before, rules());
            remove().unwrap();
        });
    }

    #[test]
    fn pods_are_kept_from_the_api_server_for_a_while() {
        in_a_network_of_its_own(|| {
            make().unwrap();
            let made = rules();
            for (how, target) in [(Cut::Silent, "DROP"), (Cut::Refused, "tcp-reset")] {
                cut_api(how).unwrap();
                let cut = rules();
                let added: Vec<&str> = cut.lines().filter(|rule| !made.contains(rule)).collect();
                assert!(
                    matches!(added[..], [rule] if rule.contains("-i e2e0") && rule.contains(target)),
                    "{added:?}"
                );
                assert_eq!(mend_api().unwrap(), 0);
                assert_eq!(made, rules());
            }
        });
    }

    #[test]
    fn lost_packets_are_added_up() {
        let rules = "Chain E2E-LOCAL-INPUT (1 references)\n    pkts      bytes target\n      12      720 DROP  tcp\n       3      180 REJECT  tcp\n";
        assert_eq!(lost_packets(rules), 15);
    }

    /// As when another program restores all rules after the cluster is gone.
    #[test]
    fn rules_that_came_back_are_replaced() {
        in_a_network_of_its_own(|| {
            make().unwrap();
            let made = rules();
            run("ip", &["link", "delete", BRIDGE]).unwrap();
            run("iptables", &["-I", "FORWARD", "-j", FORWARD.name]).unwrap();
            make().unwrap();
            assert_eq!(made, rules());
        });
    }
}
