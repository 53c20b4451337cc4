//! The commands that a story ends with: what the person who asks types next, as far as they may.

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{Then, events::unregistered, ground};
use crate::{
    api_access::Cause,
    cluster::Read,
    explain::facts::{Facts, VolumeFacts, is_running},
    installation::{Installed, is_ready},
};

/// Returns the command that shows a pod of the driver.
pub(super) fn describe(installed: &Installed, pod: &Pod) -> String {
    let (namespace, pod) = (installed.namespace(), pod.name_any());
    format!("kubectl -n {namespace} describe pod {pod}")
}

/// Returns the name of the CronJob that made a Job, whose name ends with the minute for which it was made.
fn cron_job(job: &str) -> Option<&str> {
    let (name, minute) = job.rsplit_once('-')?;
    let is_minute = minute.len() >= 8 && minute.bytes().all(|digit| digit.is_ascii_digit());
    is_minute.then_some(name)
}

impl Facts {
    /// Returns the beginning of commands about the pod's namespace.
    pub(super) fn kubectl(&self) -> String {
        format!("kubectl -n {}", self.pod.namespace().unwrap_or_default())
    }

    /// Returns the command that shows the pod.
    pub(in crate::explain) fn describe(&self) -> String {
        format!("{} describe pod {}", self.kubectl(), self.pod.name_any())
    }

    /// Returns the command that shows the class of a volume; for someone who may not read it, what the pod says of
    /// it.
    pub(super) fn show_class(&self, volume: &VolumeFacts) -> String {
        if volume.class.unknown().is_some() {
            return self.describe();
        }
        if volume.class.is_missing() {
            return format!("{} get secretproviderclasses", self.kubectl());
        }
        format!(
            "{} get secretproviderclass {} -o yaml",
            self.kubectl(),
            volume.class_name
        )
    }

    /// Returns the command that edits the class of a volume.
    pub(super) fn edit_class(&self, volume: &VolumeFacts) -> String {
        format!(
            "{} edit secretproviderclass {}",
            self.kubectl(),
            volume.class_name
        )
    }

    /// Returns how to give the driver a right: a value of the chart, or a role of `deploy/`.
    pub(super) fn grant(&self, value: &str, role: &str) -> Then {
        match self.may_not_see_the_driver() {
            true => Then::Tell,
            false => Then::Do(format!(
                "kubectl apply -f deploy/{role} # or, of the chart, {value}=true"
            )),
        }
    }

    /// Returns what to do about a driver that cannot ask the API server.
    pub(super) fn access(&self, cause: Cause) -> Then {
        let Some((installed, pod)) = self.driver() else {
            return self.driver_pods();
        };
        match self.may_not_see_the_driver() {
            true => Then::Tell,
            false => Then::Do(cause.command(installed, Some(&pod.name_any()))),
        }
    }

    /// Returns what to do about somebody who refuses a request: to ask those who run it, whom the command shows.
    pub(super) fn ask(&self, who: &str, command: &str) -> Then {
        match self.may_not_see_the_driver() {
            true => Then::Ask(who.to_owned()),
            false => Then::Do(format!("{command} # then ask those who run {who}")),
        }
    }

    /// Returns the command that changes what the pod is made of. Most fields of a pod itself cannot be changed.
    pub(super) fn edit_workload(&self) -> String {
        let (kubectl, pod) = (self.kubectl(), self.pod.name_any());
        let mut owners = self.pod.owner_references().iter();
        let Some(owner) = owners.find(|owner| owner.controller == Some(true)) else {
            return format!(
                "{kubectl} get pod {pod} -o yaml > {pod}.yaml # change it there, then kubectl replace --force -f {pod}.yaml"
            );
        };
        let hash = self.pod.labels().get("pod-template-hash");
        let deployment = hash.and_then(|hash| owner.name.strip_suffix(&format!("-{hash}")));
        match (owner.kind.as_str(), deployment) {
            ("ReplicaSet", Some(deployment)) => format!("{kubectl} edit deployment {deployment}"),
            // The API server accepts no other template of a Job.
            ("Job", _) => match cron_job(&owner.name) {
                Some(cron_job) => format!(
                    "{kubectl} edit cronjob {cron_job} # its next Job has it; this one: {kubectl} delete job {}",
                    owner.name
                ),
                None => format!(
                    "{kubectl} delete job {} # then create it from its changed manifest: the template of a Job cannot be changed",
                    owner.name
                ),
            },
            ("StatefulSet", _) if !is_ready(&self.pod) => format!(
                "{kubectl} edit statefulset {} # then {}: it replaces no pod that is not ready",
                owner.name,
                self.new_pod()
            ),
            (kind, _) => format!("{kubectl} edit {} {}", kind.to_lowercase(), owner.name),
        }
    }

    /// Returns the command that gets a pod like this one. A pod without a controller is not made again by itself.
    pub(super) fn new_pod(&self) -> String {
        let (kubectl, pod) = (self.kubectl(), self.pod.name_any());
        match self.has_controller() {
            true => format!("{kubectl} delete pod {pod}"),
            false => format!("{kubectl} get pod {pod} -o yaml | kubectl replace --force -f -"),
        }
    }

    /// Returns whether something makes a pod like this one once it is deleted.
    pub(super) fn has_controller(&self) -> bool {
        let mut owners = self.pod.owner_references().iter();
        owners.any(|owner| owner.controller == Some(true))
    }

    /// Returns the command that shows the log of the node's driver.
    pub(super) fn driver_log(&self) -> Then {
        let driver = self.node.as_ref().and_then(|node| node.driver.found());
        match driver.and_then(Option::as_ref) {
            // A container that was never started has no log.
            Some((installed, pod)) if !ground::has_log(pod, &installed.container) => {
                Then::Do(describe(installed, pod))
            }
            Some((installed, pod)) => Then::Do(format!(
                "kubectl -n {} logs {} -c {} --since=15m",
                installed.namespace(),
                pod.name_any(),
                installed.container
            )),
            None => self.driver_pods(),
        }
    }

    /// Returns the command that shows what the node's driver logged as it started.
    pub(super) fn driver_start(&self) -> Then {
        match self.driver_log() {
            Then::Do(command) => Then::Do(command.replace(" --since=15m", " | head -50")),
            other => other,
        }
    }

    /// Returns the command that shows the driver's pods.
    pub(super) fn driver_pods(&self) -> Then {
        if self.may_not_see_the_driver() {
            return Then::Tell;
        }
        let node = self
            .node
            .as_ref()
            .map(|node| format!(" --field-selector spec.nodeName={}", node.name));
        let node = node.unwrap_or_default();
        let command = match self.installed.found().and_then(|all| all.first()) {
            Some(installed) => format!(
                "kubectl -n {} get pods -l {} -o wide{node}",
                installed.namespace(),
                installed.selector()
            ),
            None => "kubectl get daemonsets -A".to_owned(),
        };
        Then::Do(command)
    }

    /// Returns whether it is known that no driver runs on the pod's node, or that kubelet does not know it.
    pub(in crate::explain) fn lacks_driver(&self) -> bool {
        let node = self.node.as_ref();
        node.is_some_and(|node| match &node.driver {
            Read::Is(Some((installed, pod))) => !is_running(pod, &installed.container),
            Read::Is(None) => true,
            _ => unregistered(self).is_some(),
        })
    }

    /// Returns whether the driver's DaemonSet or its pods could not be read.
    pub(super) fn may_not_see_the_driver(&self) -> bool {
        let node = self.node.as_ref();
        self.installed.unknown().is_some()
            || node.is_some_and(|node| node.driver.unknown().is_some())
    }

    /// Returns the command that shows all pods of the node, among them that of a provider.
    pub(super) fn pods_of_node(&self) -> Then {
        if self.may_not_see_the_driver() {
            return Then::Tell;
        }
        let node = self.node.as_ref().map_or("NODE", |node| node.name.as_str());
        Then::Do(format!(
            "kubectl get pods -A -o wide --field-selector spec.nodeName={node}"
        ))
    }

    /// Returns the DaemonSet and the pod of the node's driver.
    pub(super) fn driver(&self) -> Option<&(Installed, Pod)> {
        self.node.as_ref()?.driver.found()?.as_ref()
    }
}
