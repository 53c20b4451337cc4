//! Explains a pod: what is mounted since when, what is due when, what is wrong, and the next command to type.

mod checks;
mod facts;
mod state;
mod story;
mod workload;

use std::fmt;

use kube::Client;
use serde::Serialize;

pub(crate) use facts::time_of;

pub use checks::Trouble;
pub use story::Story;
pub use workload::{Chosen, Missing, NoPods, Workload};

/// What came of a question.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Explained {
    /// The story of a pod.
    Pod(Box<Story>),
    /// Why a workload has no pods.
    NoPods(NoPods),
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(story) => story.fmt(f),
            Self::NoPods(none) => none.fmt(f),
        }
    }
}

impl Explained {
    /// Returns what is wrong.
    pub fn trouble(&self) -> &[Trouble] {
        match self {
            Self::Pod(story) => &story.trouble,
            Self::NoPods(none) => &none.trouble,
        }
    }

    /// Returns whether enough is known to say that nothing is wrong.
    pub fn is_known(&self) -> bool {
        match self {
            Self::Pod(story) => story.known,
            Self::NoPods(_) => true,
        }
    }
}

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
