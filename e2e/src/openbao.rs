//! A real OpenBao server beside real providers: version 2 of the KV engine at `secret`, and logins with
//! service account tokens, of which the server asks the API server for a review.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use embedded::Options;

use crate::providers::Provider;

/// Names the server's executable.
pub const VARIABLE: &str = "OPENBAO";
/// The name of the DaemonSet and its container.
pub const NAME: &str = "openbao-server";
/// The port of the server.
pub const PORT: u16 = 8210;

/// The token of an administrator, as in the server's configuration.
const ADMINISTRATOR: &str = "administrator";
/// The server's program on the nodes.
pub const PROGRAM: &str = "bao";

/// Returns the path of the server's executable.
///
/// # Errors
/// Returns a sentence that says why there is none.
pub fn find() -> std::result::Result<PathBuf, String> {
    let path = std::env::var_os(VARIABLE).map(PathBuf::from);
    let path = path.ok_or_else(|| format!("${VARIABLE} names no executable of OpenBao"))?;
    if path.is_file() {
        Ok(path)
    } else {
        Err(format!("there is no executable {}", path.display()))
    }
}

/// Adds the server's executable to the options of an embedded cluster, if [`find`] finds it.
pub fn add(options: &mut Options) {
    if let Ok(path) = find() {
        options.programs.insert(PROGRAM.to_owned(), path);
    }
}

/// The settings of a server.
#[derive(Clone, Debug)]
pub struct Server {
    /// The address at which it listens.
    pub address: SocketAddr,
    /// The namespace whose service account `default` has the role `shop`.
    pub namespace: String,
    /// The provider whose audience tokens have to be for.
    pub provider: Provider,
}

impl Server {
    /// Returns the URL for providers.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the directory of configuration and content on a node.
    pub fn directory(&self) -> PathBuf {
        Path::new("/var/lib/kubelet/openbao").join(&self.namespace)
    }

    /// Returns the manifest of a DaemonSet.
    pub fn manifest(&self) -> String {
        let directory = self.directory();
        include_str!("../manifests/providers/openbao-server.yaml")
            .replace("DIRECTORY", &directory.to_string_lossy())
    }

    /// Writes the configuration into the server's directory, given as this process sees it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn configure(&self, directory: &Path) -> io::Result<()> {
        let text = include_str!("../manifests/providers/openbao-server.hcl")
            .replace("NAMESPACE", &self.namespace)
            .replace("AUDIENCE", self.provider.audience())
            .replace("ADDRESS", &self.address.to_string());
        fs::create_dir_all(directory)?;
        fs::write(directory.join("server.hcl"), text)
    }

    /// Returns the command line of an administrator's command, to be run where the address is reached.
    pub fn command_line<'a>(&'a self, program: &'a str, arguments: &[&'a str]) -> Vec<String> {
        let settings = [
            format!("BAO_ADDR={}", self.url()),
            format!("BAO_TOKEN={ADMINISTRATOR}"),
            // The client looks for more settings there.
            "HOME=/nonexistent".to_owned(),
        ];
        let words = std::iter::once("env".to_owned()).chain(settings);
        let rest = [program].into_iter().chain(arguments.iter().copied());
        words.chain(rest.map(str::to_owned)).collect()
    }
}
