//! The end of a run: the state that is compared with that of an undisturbed one, and what may not be left.

use serde_json::json;
use tokio::time::{Duration, sleep};

use super::{Meanwhile, Operation, Run, Then};
use crate::{
    node::until,
    state::{State, node_state, state, wrong_mount},
};

/// The socket by which a driver registers itself.
const REGISTRATION: &str = "entry secrets-store.csi.k8s.io-reg.sock";

impl Run {
    /// Returns what is on the node and would not be there without the volume.
    pub(super) fn left(&self) -> Vec<String> {
        let is_right = |name: &String| name == "entry csi.sock" || name == REGISTRATION;
        let left = node_state(&self.node).into_keys();
        left.filter(|name| !is_right(name)).collect()
    }

    /// Keeps of a state what has to be the same whether or not the driver was stopped.
    fn comparable(&self, mut state: State) -> State {
        if self.operation == Operation::RefusedPublish && self.then == Then::Again {
            // A mount of an attempt that did not end stays until the next unpublish, because a
            // container might use it.
            state.retain(|name, _| {
                !["mount", "entry mount", "volume", "file /..unfinished"]
                    .iter()
                    .any(|of| name.starts_with(of))
            });
        }
        let recovers = match self.operation {
            Operation::RefusedRefresh => self.then == Then::Changed,
            operation => matches!(
                operation,
                Operation::RecoveredRefresh | Operation::AskedAfterFailure
            ),
        };
        if recovers {
            // What the driver did not live to see is not announced.
            state.retain(|name, _| !name.starts_with("event MountRotation"));
        }
        if self.operation == Operation::RefreshWithOtherType {
            state.remove("event SecretRecreated");
        }
        if self.then == Then::Meanwhile(Meanwhile::StatusDeleted) {
            // The count of contents goes with the pod status that had it, and a Secret that lives with it has to wait.
            state.retain(|name, _| {
                !name.starts_with("pod status ") && name != "event FailedToCreateSecret"
            });
        }
        let is_away = matches!(self.then, Then::Meanwhile(meanwhile) if meanwhile.is_trouble());
        // It is told, and a moment later that it is over. A provider that writes files again disturbs a check, too.
        let has_trouble = is_away || self.was_cut_off || self.operation.is_written();
        let is_over = has_trouble && !self.is_refused();
        if is_over {
            let is_told = ["event FailedToCreateSecret", "event SecretSynced"];
            state.retain(|name, _| !is_told.contains(&name.as_str()));
        }
        for (name, text) in &mut state {
            if name.starts_with("pod status ") {
                *text = lines(text, is_over);
            }
        }
        if (self.has_failed || is_away) && !self.operation.is_refused() {
            // The failure is announced.
            state.retain(|name, _| !name.starts_with("event MountRotation"));
        }
        // The driver is ready before it registers itself.
        state.remove(REGISTRATION);
        state
    }

    /// Returns the state in the end, and then takes the volume down and looks that nothing is left.
    pub(crate) async fn end(&mut self) -> Result<State, String> {
        self.node.look_at_secret();
        let status_was_gone = self.operation == Operation::DeletedPodStatus
            || self.then == Then::Meanwhile(Meanwhile::StatusDeleted);
        if status_was_gone && self.operation.is_bare() {
            let lives = || self.node.secret_lives_with_status();
            until("the Secret lives with the pod status", lives).await?;
            self.node.remove_absent_owners();
        }
        if self.has_failed && self.operation.is_bare() {
            // A first publish that failed has taken its pod status back.
            self.node.remove_absent_owners();
        }
        if let Some(owners) = &self.adorned
            && let Some(lacks) = self.node.lacks_adornment(owners)
        {
            return Err(lacks);
        }
        self.is_right().await?;
        let state = if self.is_to_go() {
            // No further call comes once kubelet was told that the volume is gone.
            let left = self.left();
            if !left.is_empty() {
                return Err(format!(
                    "the volume is said to be gone, and there are {left:?}"
                ));
            }
            node_state(&self.node)
        } else {
            let state = state(&self.node);
            if !self.is_refused() {
                self.refused_form_is_not_final().await?;
            }
            state
        };
        self.node.end_pod().await;
        self.unpublish().await?;
        self.node.is_ready().await?;
        if self.operation.is_bare() {
            self.see_secret_go().await?;
        }
        if self.operation == Operation::Start {
            // The driver is ready before it registers itself.
            let nothing = || self.left().is_empty();
            let gone = until("nothing is left in the directory of registration", nothing).await;
            gone.map_err(|why| format!("{why}; there are {:?}", self.left()))?;
        }
        let left = self.left();
        if !left.is_empty() {
            return Err(format!("after the unpublish there are {left:?}"));
        }
        let closed = until("no file of the volume is open", || {
            self.node.open_files().is_empty()
        });
        let closed = closed.await;
        closed.map_err(|why| format!("{why}; these are: {:?}", self.node.open_files()))?;
        let problems = [
            self.node.files.lock().unwrap().problems.clone(),
            self.node.secret.lock().unwrap().problems.clone(),
        ];
        match problems.concat() {
            problems if problems.is_empty() => Ok(self.comparable(state)),
            problems => Err(problems.join("\n")),
        }
    }

    /// Checks what has to be so in the end, also if an undisturbed run has it otherwise.
    async fn is_right(&self) -> Result<(), String> {
        let unreadable = self.node.unreadable_records();
        if !unreadable.is_empty() {
            return Err(format!("nobody can read {unreadable:?}"));
        }
        if self.node.has_failing_record() && !self.is_refused() {
            return Err("a record says that refreshes fail".to_owned());
        }
        if let Some(secret) = self.node.secret("creds") {
            let (labels, owners) = (&secret["metadata"]["labels"], self.node.owners_of_secret());
            let has_controller = owners.iter().any(|owner| owner == "rs");
            if owners.is_empty() || !has_controller && !self.operation.is_bare() {
                return Err(format!("the Secret has the owners {owners:?}"));
            }
            if labels["team"] != "shop" || labels["secrets-store.csi.k8s.io/managed"] != "true" {
                return Err(format!("the Secret has the labels {labels}"));
            }
        }
        if self.is_to_go() || self.is_refused() {
            return Ok(());
        }
        let wrong = self.with_wrong_modes();
        if !wrong.is_empty() {
            return Err(format!("{wrong:?} have other modes than in the store"));
        }
        if let Some(why) = wrong_mount(&self.node) {
            return Err(why);
        }
        let class = json!([
            format!("uid-db-{}", self.class.incarnation),
            self.class.generation
        ]);
        let recorded = self.node.recorded_classes();
        if recorded != [class.clone()] {
            return Err(format!(
                "the class has the UID and the generation {class}, and there are records of {recorded:?}"
            ));
        }
        if self.operation.is_written() {
            return Ok(());
        }
        let told = until("the pod status names what is mounted", || {
            self.tells_of_volume()
        });
        told.await
    }

    /// Removes the pod and what lives with it, and looks that the driver makes nothing of that again.
    async fn see_secret_go(&self) -> Result<(), String> {
        self.node.secret.lock().unwrap().add(None);
        if let Some(stays) = self.node.remove_pod() {
            return Err(stays);
        }
        // Longer than the interval in which the driver checks Secrets.
        sleep(Duration::from_millis(1_300)).await;
        match self.node.secret("creds") {
            None => Ok(()),
            Some(_) => Err("the Secret has come back after the pod has gone".to_owned()),
        }
    }
}

/// Returns the lines of a pod status, without the commas between them, and `without_trouble` that it tells of.
fn lines(text: &str, without_trouble: bool) -> String {
    let is_of_trouble = |line: &str| line.contains("-since\": ") || line.contains("-reason\": ");
    let lines = text
        .lines()
        .filter(|line| !without_trouble || !is_of_trouble(line));
    let lines: Vec<&str> = lines.map(|line| line.trim_end_matches(',')).collect();
    lines.join("\n")
}
