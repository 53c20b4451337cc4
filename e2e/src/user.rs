//! The user of a container, from its pod's security contexts.

use k8s_openapi::api::core::v1::Pod;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use serde::{Deserialize, Serialize};

/// User, group and further groups of a process; root where a pod does not set them, as in our images.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl User {
    /// Returns the user of a pod's first container. Its own security context takes precedence over the
    /// pod's, and the pod's `fsGroup` is one of its groups, as with kubelet.
    ///
    /// # Errors
    /// When an id is not in the range of Linux.
    pub fn of(pod: &Pod) -> Result<Self, std::num::TryFromIntError> {
        let Some(spec) = &pod.spec else {
            return Ok(Self::default());
        };
        let whole = spec.security_context.clone().unwrap_or_default();
        let first = spec.containers.first();
        let own = first
            .and_then(|container| container.security_context.clone())
            .unwrap_or_default();
        let id = |own: Option<i64>, whole: Option<i64>| own.or(whole).unwrap_or_default();
        let groups = whole.supplemental_groups.into_iter().flatten();
        Ok(Self {
            uid: id(own.run_as_user, whole.run_as_user).try_into()?,
            gid: id(own.run_as_group, whole.run_as_group).try_into()?,
            groups: groups
                .chain(whole.fs_group)
                .map(u32::try_from)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Returns the arguments with which `probe` becomes this user; none for root.
    pub(crate) fn arguments(&self) -> Vec<String> {
        if *self == Self::default() {
            return Vec::new();
        }
        let ids: Vec<String> = [self.uid, self.gid]
            .iter()
            .chain(&self.groups)
            .map(u32::to_string)
            .collect();
        vec!["--as".to_owned(), ids.join(",")]
    }

    /// Parses the ids of `User::arguments`; returns `None` for other text.
    pub fn parse(text: &str) -> Option<Self> {
        let ids: Result<Vec<u32>, _> = text.split(',').map(str::parse).collect();
        let ids = ids.ok()?;
        let [uid, gid, ref groups @ ..] = ids[..] else {
            return None;
        };
        Some(Self {
            uid,
            gid,
            groups: groups.to_vec(),
        })
    }

    /// Makes this process run as this user for good. The process must have one thread.
    ///
    /// # Errors
    /// When this process is not permitted to.
    pub fn become_it(&self) -> nix::Result<()> {
        let groups: Vec<Gid> = self.groups.iter().map(|id| Gid::from_raw(*id)).collect();
        setgroups(&groups)?;
        setgid(Gid::from_raw(self.gid))?;
        setuid(Uid::from_raw(self.uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_containers_own_context_goes_first_and_the_fs_group_is_a_group() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "securityContext": {"runAsUser": 1, "runAsGroup": 2, "supplementalGroups": [3], "fsGroup": 4},
            "containers": [{"name": "main", "securityContext": {"runAsUser": 5}}],
        }}))
        .unwrap();
        let user = User::of(&pod).unwrap();
        let expected = User {
            uid: 5,
            gid: 2,
            groups: vec![3, 4],
        };
        assert_eq!(user, expected);
        assert_eq!(user.arguments(), ["--as", "5,2,3,4"]);
        assert_eq!(User::parse("5,2,3,4"), Some(user));
        assert_eq!(User::parse("5"), None);
        assert!(User::of(&Pod::default()).unwrap().arguments().is_empty());
    }
}
