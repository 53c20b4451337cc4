//! The command line.

use kube::Client;
use kubectl_secrets_store::cluster::Place;

pub(crate) const USAGE: &str = "\
Explains pods with volumes of the Secrets Store CSI driver, and finds mistakes in their manifests.

usage:
  kubectl secrets-store explain pod NAME   what is mounted, what is due, what is wrong, and what to do next;
                                           a deployment, replicaset, statefulset, daemonset, job or cronjob
                                           has one of its pods explained
  kubectl secrets-store doctor             what the cluster and its nodes lack, and what to do about it
  kubectl secrets-store lint FILE...       mistakes in SecretProviderClasses, pods and Helm values, offline

FILE is a YAML file, a directory of them, or - for standard input. Files are read together: give the classes and
the pods that use them in one call.

flags:
  -n, --namespace NAME       the pod's namespace; else that of the context
      --driver-namespace NAME   where the driver is installed, if you may not look for it
      --nodes NUMBER         how many nodes doctor asks, 20 if it is not given
      --context NAME         the context of the kubeconfig
      --kubeconfig FILE      the kubeconfig; else $KUBECONFIG or ~/.kube/config
  -o, --output json          for machines

exit codes: 0 nothing is wrong, 1 something is wrong, 2 it could not be found out";

/// What the command line says.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    pub(crate) place: Place,
    pub(crate) driver_namespace: Option<String>,
    /// The number of nodes that are asked.
    pub(crate) nodes: Option<usize>,
    pub(crate) json: bool,
    pub(crate) help: bool,
    /// What is no flag: the command, and its words.
    pub(crate) words: Vec<String>,
}

impl Arguments {
    /// Parses the arguments; the command is the first word.
    ///
    /// # Errors
    /// Names the flag that is wrong.
    pub(crate) fn parse(args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self::default();
        let mut args = args.peekable();
        while let Some(arg) = args.next() {
            let (flag, given) = match arg.split_once('=') {
                Some((flag, value)) if flag.starts_with('-') => {
                    (flag.to_owned(), Some(value.to_owned()))
                }
                _ => short(&arg),
            };
            let mut value = || {
                let value = given.clone().or_else(|| args.next());
                value.ok_or_else(|| format!("{flag} needs a value"))
            };
            match flag.as_str() {
                "-h" | "--help" => parsed.help = true,
                "-n" | "--namespace" => parsed.place.namespace = Some(value()?),
                "--driver-namespace" => parsed.driver_namespace = Some(value()?),
                "--nodes" => {
                    let number = value()?;
                    let parsed_number = number.parse();
                    parsed.nodes = Some(
                        parsed_number.map_err(|_| format!("--nodes {number} is not a number"))?,
                    );
                }
                "--context" => parsed.place.context = Some(value()?),
                "--kubeconfig" => parsed.place.kubeconfig = Some(value()?.into()),
                "-o" | "--output" => match value()?.as_str() {
                    "json" => parsed.json = true,
                    other => return Err(format!("-o {other} is not known; it is json")),
                },
                flag if flag.starts_with('-') && flag != "-" => {
                    return Err(format!("{flag} is not known"));
                }
                _ => parsed.words.push(arg),
            }
        }
        Ok(parsed)
    }

    /// Connects to the cluster and runs a command there.
    ///
    /// # Errors
    /// Says why there is no cluster to ask, or what the command says.
    pub(crate) fn run<T>(
        &self,
        command: impl AsyncFnOnce(&Client, &str) -> Result<T, String>,
    ) -> Result<T, String> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        runtime.block_on(async {
            let (client, namespace) = self.place.connect().await?;
            command(&client, &namespace).await
        })
    }
}

/// Splits a short flag from a value that follows without a space: `-nshop`.
fn short(arg: &str) -> (String, Option<String>) {
    for flag in ["-n", "-o"] {
        if let Some(value) = arg.strip_prefix(flag)
            && !value.is_empty()
        {
            return (flag.to_owned(), Some(value.to_owned()));
        }
    }
    (arg.to_owned(), None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, String> {
        Arguments::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn flags_are_those_of_kubectl() {
        for line in [
            "pod web -n shop -o json",
            "pod web -nshop -ojson",
            "--namespace=shop pod -o=json web",
        ] {
            let parsed = parse(line).unwrap();
            assert_eq!(parsed.words, ["pod", "web"], "{line}");
            assert_eq!(parsed.place.namespace.as_deref(), Some("shop"), "{line}");
            assert!(parsed.json, "{line}");
        }
        assert_eq!(parse("- a=b").unwrap().words, ["-", "a=b"]);
        for (line, why) in [
            ("web -n", "-n needs a value"),
            ("web --what", "--what is not known"),
            ("--nodes many", "--nodes many is not a number"),
            ("web -o yaml", "-o yaml is not known; it is json"),
        ] {
            assert_eq!(parse(line).unwrap_err(), why);
        }
    }
}
