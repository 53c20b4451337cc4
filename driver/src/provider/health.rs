//! Asks the providers for their version periodically, and logs changes
//! (`--provider-health-check`).
//!
//! No publish depends on the answers or waits for them. All providers are asked at once, and a
//! health check takes none of the places that calls need.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use proto::provider::{VersionRequest, csi_driver_provider_client::CsiDriverProviderClient};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::Request;

use super::{Providers, Trusted, refusal, wire};
use crate::quoted::quoted;

/// The time in which a provider must answer, as in upstream's `HealthCheck`
/// (`pkg/secrets-store/provider_client.go`).
const PATIENCE: Duration = Duration::from_secs(5);

/// The shortest time between two rounds, in case the interval was set too short by mistake.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);

/// The version of the provider interface that the driver speaks.
const VERSION: &str = "v1alpha1";

/// The result of the last health check of a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ProviderHealth {
    /// It answered with its name and version.
    Well { runtime: String, version: String },
    /// It did not answer well, for this reason.
    Unwell(String),
}

impl Providers {
    /// Asks every provider once in each `interval`, until `stop`.
    pub async fn watch_health(&self, interval: Duration, stop: CancellationToken) {
        let mut known = BTreeMap::new();
        let watching = async {
            loop {
                let now = self.ask_all().await;
                report(&known, &now);
                known = now;
                tokio::time::sleep(interval.max(SHORTEST_INTERVAL)).await;
            }
        };
        stop.run_until_cancelled(watching).await;
    }

    async fn ask_all(&self) -> BTreeMap<String, ProviderHealth> {
        let mut asking = JoinSet::new();
        for (name, socket) in self.sockets.all() {
            let trusted = self.trusted.clone();
            asking.spawn(async move { (name, ask(socket, &trusted).await) });
        }
        asking.join_all().await.into_iter().collect()
    }
}

async fn ask(socket: PathBuf, trusted: &Trusted) -> ProviderHealth {
    let mut client = match wire::channel(&socket, trusted) {
        Ok(channel) => CsiDriverProviderClient::new(channel),
        Err(error) => return ProviderHealth::Unwell(error.to_string()),
    };
    let request = Request::new(VersionRequest {
        version: VERSION.to_owned(),
    });
    match timeout(PATIENCE, client.version(request)).await {
        Err(_) => ProviderHealth::Unwell(format!("no answer within {PATIENCE:?}")),
        Ok(Err(status)) => ProviderHealth::Unwell(refusal::in_short(&status)),
        Ok(Ok(answer)) => {
            let answer = answer.into_inner();
            if answer.version != VERSION {
                return ProviderHealth::Unwell(format!(
                    "it speaks version {} of the provider interface, not {VERSION:?}",
                    quoted(&answer.version, 60)
                ));
            }
            ProviderHealth::Well {
                runtime: refusal::clipped(&answer.runtime_name),
                version: refusal::clipped(&answer.runtime_version),
            }
        }
    }
}

/// Logs each change, and at the debug level each provider that has not changed.
fn report(before: &BTreeMap<String, ProviderHealth>, now: &BTreeMap<String, ProviderHealth>) {
    for (provider, health) in now {
        match health {
            health if before.get(provider) == Some(health) => {
                tracing::debug!(provider, ?health, "the provider has not changed");
            }
            ProviderHealth::Well { runtime, version } => {
                tracing::info!(provider, runtime, version, "the provider is healthy");
            }
            ProviderHealth::Unwell(reason) => {
                tracing::warn!(
                    provider,
                    reason,
                    "the provider is not healthy; pods that need it may not start"
                );
            }
        }
    }
    for provider in before.keys().filter(|name| !now.contains_key(*name)) {
        tracing::warn!(provider, "the provider's socket is gone");
    }
}
