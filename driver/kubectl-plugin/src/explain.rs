//! Explains a pod: what is mounted since when, what is due when, what is wrong, and the next command to type.

mod checks;
mod facts;
mod story;
mod workload;

use kube::Client;

pub use checks::Trouble;
pub use story::Story;
pub use workload::Workload;

/// Explains a pod. `driver_namespace` is where the driver is installed, for someone who may not look for it.
///
/// # Errors
/// Says why nothing can be explained: there is no such pod, or it may not be read.
pub async fn explain(
    client: &Client,
    namespace: &str,
    pod: &str,
    driver_namespace: Option<&str>,
) -> Result<Story, String> {
    let facts = facts::Facts::read(client, namespace, pod, driver_namespace).await?;
    Ok(Story::of(&facts))
}
