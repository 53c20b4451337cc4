//! What a scenario wants otherwise than `deploy/` installs it: flags of the driver, and tokens.

use k8s_openapi::api::{apps::v1::DaemonSet, storage::v1::CSIDriver};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};

use crate::target::Needs;

/// The line of the driver's manifest after which flags are put. Of a flag that comes twice the
/// last one counts.
const BEHIND: &str = "            - --provider-health-check-interval=2m\n";
/// The same of the CSIDriver's.
const REPUBLISH: &str = "  requiresRepublish: true\n";
/// How the driver's mounts spread.
const SPREAD: &str = "mountPropagation: Bidirectional";
/// Where the arguments that the driver was installed with are kept while it has others.
const INSTALLED: &str = "e2e/installed-args";

/// A manifest with the settings in it, for a cluster that is not there yet.
pub fn of_manifest(manifest: &str, needs: &Needs) -> String {
    let flags = needs.driver_flags.iter();
    let flags: String = flags
        .map(|flag| format!("            - {flag:?}\n"))
        .collect();
    let mut tokens = String::new();
    if !needs.audiences.is_empty() {
        let (requests, place) = (token_requests(needs), needs.tokens_in_secrets);
        tokens = format!("  tokenRequests: {requests}\n  serviceAccountTokenInSecrets: {place}\n");
    }
    let spread = needs.propagation.unwrap_or("Bidirectional");
    manifest
        .replace(SPREAD, &SPREAD.replace("Bidirectional", spread))
        .replace(BEHIND, &format!("{BEHIND}{flags}"))
        .replace(REPUBLISH, &format!("{REPUBLISH}{tokens}"))
}

/// Gives a cluster that runs the settings, and takes away those of an earlier scenario. The
/// driver's pods are replaced after that.
pub async fn change(client: &kube::Client, needs: &Needs) {
    change_flags(client, needs.driver_flags).await.unwrap();
    let (requests, place) = match needs.audiences {
        [] => (Value::Null, Value::Null),
        _ => (token_requests(needs), needs.tokens_in_secrets.into()),
    };
    let spec = json!({"tokenRequests": requests, "serviceAccountTokenInSecrets": place});
    Api::<CSIDriver>::all(client.clone())
        .patch(
            "secrets-store.csi.k8s.io",
            &PatchParams::default(),
            &Patch::Merge(json!({"spec": spec})),
        )
        .await
        .unwrap();
}

fn token_requests(needs: &Needs) -> Value {
    let request = |audience: &&str| json!({"audience": audience, "expirationSeconds": 600});
    needs.audiences.iter().map(request).collect()
}

async fn change_flags(client: &kube::Client, flags: &[&str]) -> kube::Result<()> {
    let sets = Api::<DaemonSet>::namespaced(client.clone(), "kube-system");
    let mut set = sets.get("csi-secrets-store").await?;
    let annotations = set.metadata.annotations.get_or_insert_default();
    let kept = annotations.get(INSTALLED);
    let kept: Option<Vec<String>> = kept.map(|kept| serde_json::from_str(kept).unwrap());
    if kept.is_none() && flags.is_empty() {
        return Ok(());
    }
    let pod = set.spec.template.spec.as_mut().unwrap();
    let mut containers = pod.containers.iter_mut();
    let driver = containers.find(|c| c.name == "secrets-store").unwrap();
    let installed = kept.unwrap_or_else(|| driver.args.take().unwrap_or_default());
    let flags = flags.iter().map(|flag| (*flag).to_owned());
    driver.args = Some(installed.iter().cloned().chain(flags).collect());
    annotations.insert(
        INSTALLED.to_owned(),
        serde_json::to_string(&installed).unwrap(),
    );
    sets.replace("csi-secrets-store", &Default::default(), &set)
        .await
        .map(drop)
}
