//! Decides what has to be done about a Secret, from what the Secret says about itself.

use std::collections::BTreeMap;

use jiff::{Timestamp, ToSpan as _};
use kube::core::ObjectMeta;

use super::{
    ADOPT, ANNOTATIONS, CLASS, CLASS_UID, Data, DesiredSecret, GENERATION, LABELS, MANAGED, ORDER,
    Owner, REFUSED_TYPE, SINCE, SyncError,
    object::{Encoded, Existing, MergePatch, NewSecret, is_reserved},
    owners::{is_set_by_others, owners, owners_with_foreign_of},
    without_values,
};

/// The seconds by which the clocks of nodes may differ. A later time on a Secret counts as wrong, so
/// that a node whose clock is far ahead does not keep others from writing.
const MAX_CLOCK_DIFFERENCE: i64 = 300;

/// The action for an existing Secret.
pub(super) enum Decision<'a> {
    /// No action: it is as desired, or its content is newer by the clocks.
    Unchanged,
    /// No action: it has other content of a higher order, or content whose order is known while that
    /// of the desired content is not.
    Overtaken { order: u64 },
    /// No action: it is not the driver's.
    Unmanaged,
    /// No action: its content differs, and it is immutable.
    Immutable,
    /// No action as long as the class of this name makes it.
    OtherClass(String),
    /// No action as long as it is not certain that the desired one is of the class's present state.
    OtherState,
    /// Write this change.
    Write(MergePatch<'a>),
    /// Change its data, for which the values are needed and not only their digest.
    WriteData,
    /// Replace it by a new one.
    Replace,
}

/// Whether the class that a Secret names still makes it, and if it is the desired one's, in which state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NamedClass {
    /// It does, as far as is known, and the Secret may have been written with a later state of it.
    MayBeLater,
    /// It does, as far as is known, and the desired Secret is of its present state.
    IsPresent,
    /// It does not any more.
    HasReleasedIt,
}

/// Decides what has to be done about an existing Secret.
pub(super) fn decide<'a>(
    existing: &'a Existing,
    desired: &DesiredSecret<'a>,
    named: NamedClass,
) -> Decision<'a> {
    let may_be_adopted = existing.annotation(ADOPT).is_some_and(|yes| yes == "true");
    if !existing.is_managed() && !may_be_adopted {
        return Decision::Unmanaged;
    }
    let equal = existing.type_ == desired.type_ && existing.has(&desired.data);
    let mut change = MergePatch::of(existing);
    change.metadata.owner_references = owners(existing, desired.owners);
    let is_released = named == NamedClass::HasReleasedIt;
    if !is_released && let Some(other) = other_class(existing, desired) {
        // Two classes may share equal content: this one adds its owners only.
        if !equal {
            return Decision::OtherClass(other);
        }
        return write(change, None);
    }

    // Whatever came out of a volume, no content never replaces content.
    let is_empty = matches!(desired.data, Data::Values(data) if data.is_empty());
    let is_newer = !is_released && is_newer(existing, desired);
    let replaces_data = !equal && !is_newer && (!is_empty || existing.data.is_empty());
    let may_be_later = named == NamedClass::MayBeLater && is_of_another_state(existing, desired);
    if replaces_data && may_be_later {
        return Decision::OtherState;
    }
    if replaces_data && existing.type_ != desired.type_ {
        return Decision::Replace;
    }
    if replaces_data && existing.is_immutable() {
        return Decision::Immutable;
    }
    desired.change_metadata(existing, &mut change);
    if replaces_data {
        match desired.data {
            Data::Values(data) => change.replace_data(existing, data),
            Data::Digest(_) => return Decision::WriteData,
        }
    }
    let follows_class = change.is_of_class();
    let lacks_class = existing.annotation(CLASS_UID).is_none();
    let lacks_order = existing.annotation(ORDER).is_none() && desired.order.is_some();
    if replaces_data || lacks_class || is_released || equal && lacks_order {
        for (key, value) in desired.origin() {
            change.annotate(existing, key, value);
        }
    } else if existing.annotation(CLASS_UID) != Some(&desired.class.uid) {
        // The class was deleted and created again under its name.
        change.annotate(existing, CLASS_UID, Some(desired.class.uid.clone()));
        change.annotate(existing, CLASS, Some(desired.class.name.clone()));
        change.annotate(existing, GENERATION, desired.generation());
    } else if follows_class
        || named == NamedClass::IsPresent && is_of_another_state(existing, desired)
    {
        change.annotate(existing, GENERATION, desired.generation());
    }
    if may_be_later && change.is_of_class() {
        return Decision::OtherState;
    }
    if equal && existing.annotation(REFUSED_TYPE).is_some() {
        change.metadata.annotations.insert(REFUSED_TYPE, None);
    }
    write(change, order(existing).filter(|_| !equal && is_newer))
}

/// Returns the decision to write a change, if there is any; otherwise whether the desired content is
/// overtaken, by content of which order.
fn write(change: MergePatch<'_>, overtaken: Option<u64>) -> Decision<'_> {
    match overtaken {
        _ if !change.is_empty() => Decision::Write(change),
        Some(order) => Decision::Overtaken { order },
        None => Decision::Unchanged,
    }
}

/// Returns the name of the class that a Secret names, if that is another than the desired one. A
/// class that was deleted and created again under its name is the same class.
fn other_class(existing: &Existing, desired: &DesiredSecret<'_>) -> Option<String> {
    let uid = existing.annotation(CLASS_UID)?;
    let name = existing.annotation(CLASS).cloned().unwrap_or_default();
    (*uid != desired.class.uid && name != desired.class.name).then_some(name)
}

/// Returns whether a Secret was written with another state of the desired one's class than the desired one, as far
/// as is known with a later one. The UIDs of a class that was deleted and created again have no order.
fn is_of_another_state(existing: &Existing, desired: &DesiredSecret<'_>) -> bool {
    let Some(uid) = existing.annotation(CLASS_UID) else {
        return false;
    };
    let there = existing.annotation(GENERATION);
    let there = there.and_then(|generation| generation.parse::<i64>().ok());
    *uid != desired.class.uid
        || matches!((there, desired.class.generation), (Some(there), Some(ours)) if there > ours)
}

/// Returns whether the content of a Secret is newer than the desired one. The documentation of the
/// parent module says which content is newer.
fn is_newer(existing: &Existing, desired: &DesiredSecret<'_>) -> bool {
    if let Some(there) = order(existing) {
        // Content without an order gets one with the next refresh of its volume.
        return desired.order.is_none_or(|ours| there > ours);
    }
    // The content is from elsewhere, and the time may be that of a pod here which is gone. After this, the order
    // is the driver's own.
    if desired.order.is_some() && is_set_by_others(existing, ORDER) {
        return false;
    }
    let latest = Timestamp::now().saturating_add(MAX_CLOCK_DIFFERENCE.seconds());
    let since = existing.annotation(SINCE);
    let since = since.and_then(|text| text.parse::<Timestamp>().ok());
    since.is_some_and(|since| since > desired.since && latest.is_ok_and(|latest| since <= latest))
}

/// Returns the order that a Secret says its content has, if that can be true: the pod status is
/// written before the Secret, so its resource version is the lower one, unless the Secret was
/// written in another cluster.
fn order(existing: &Existing) -> Option<u64> {
    let order: u64 = existing.annotation(ORDER)?.parse().ok()?;
    let written = existing.metadata.resource_version.as_ref();
    let written = written.and_then(|version| version.parse::<u64>().ok());
    written
        .is_none_or(|written| order < written)
        .then_some(order)
}

impl Existing {
    /// Returns the change that adds the foreign labels, annotations and owners of a former Secret to
    /// this one, which has taken its place. Returns `None` if there is nothing to add, or if this
    /// Secret is not the driver's.
    pub(super) fn with_foreign_of<'a>(&'a self, former: &'a Self) -> Option<MergePatch<'a>> {
        let mut change = MergePatch::of(self);
        let [labels, annotations] = former.foreign();
        let labels = labels.into_iter();
        let labels = labels.filter(|(key, _)| self.label(key).is_none());
        let annotations = annotations.into_iter();
        let annotations = annotations.filter(|(key, _)| self.annotation(key).is_none());
        let set = |(key, value): (&'a String, &String)| (key.as_str(), Some(value.clone()));
        change.metadata.labels.extend(labels.map(set));
        change.metadata.annotations.extend(annotations.map(set));
        change.metadata.owner_references = owners_with_foreign_of(self, former);
        (self.is_managed() && !change.is_empty()).then_some(change)
    }
}

impl<'a> DesiredSecret<'a> {
    /// Returns its namespace and name.
    pub(super) fn key(&self) -> (String, String) {
        (self.namespace.to_owned(), self.name.to_owned())
    }

    /// Returns the annotations that say where the content comes from; `None` for one that must not
    /// be there.
    fn origin(&self) -> [(&'static str, Option<String>); 5] {
        [
            (CLASS, Some(self.class.name.clone())),
            (CLASS_UID, Some(self.class.uid.clone())),
            (GENERATION, self.generation()),
            (SINCE, Some(self.since.to_string())),
            (ORDER, self.order.map(|order| order.to_string())),
        ]
    }

    fn generation(&self) -> Option<String> {
        self.class
            .generation
            .map(|generation| generation.to_string())
    }

    /// Returns the annotations that list the keys of the labels and annotations of the class.
    fn lists(&self) -> [(&'static str, Option<String>); 2] {
        [(LABELS, self.labels), (ANNOTATIONS, self.annotations)].map(|(list, map)| {
            let keys: Vec<&str> = map.keys().map(String::as_str).collect();
            (list, (!keys.is_empty()).then(|| keys.join(",")))
        })
    }

    /// Sets the labels and annotations that the class asks for, and removes those that it asked for
    /// before.
    fn change_metadata(&self, existing: &'a Existing, change: &mut MergePatch<'a>) {
        let listed = |list: &str| {
            let keys = existing.annotation(list).map_or("", String::as_str);
            keys.split(',')
        };
        let labels = &mut change.metadata.labels;
        for key in listed(LABELS) {
            if existing.label(key).is_some() && !self.labels.contains_key(key) && key != MANAGED {
                labels.insert(key, None);
            }
        }
        for (key, value) in self.labels {
            if key != MANAGED && existing.label(key) != Some(value) {
                labels.insert(key, Some(value.clone()));
            }
        }
        if existing.label(MANAGED).is_none_or(|value| value != "true") {
            labels.insert(MANAGED, Some("true".to_owned()));
        }
        for key in listed(ANNOTATIONS) {
            if !self.annotations.contains_key(key) {
                change.annotate(existing, key, None);
            }
        }
        for (key, value) in self.annotations {
            if !is_reserved(key) {
                change.annotate(existing, key, Some(value.clone()));
            }
        }
        for (list, keys) in self.lists() {
            change.annotate(existing, list, keys);
        }
    }

    /// Returns the whole Secret, with the labels, annotations and owners that others have put on a
    /// former one.
    ///
    /// # Errors
    /// Fails if its values were not computed.
    pub(super) fn object(&self, former: Option<&Existing>) -> Result<NewSecret<'a>, SyncError> {
        let Data::Values(data) = self.data else {
            return Err(without_values());
        };
        let mut labels = BTreeMap::new();
        let mut annotations = BTreeMap::new();
        let mut owner_references: Vec<_> = self.owners.iter().map(Owner::reference).collect();
        if let Some(former) = former {
            let [their_labels, their_annotations] = former.foreign();
            let owned = |(key, value): (&String, &String)| (key.clone(), value.clone());
            labels.extend(their_labels.into_iter().map(owned));
            annotations.extend(their_annotations.into_iter().map(owned));
            let changed = owners(former, self.owners);
            owner_references = changed.unwrap_or_else(|| former.owners().to_vec());
        }
        labels.extend(self.labels.clone());
        labels.insert(MANAGED.to_owned(), "true".to_owned());
        let asked_for = self.annotations.iter().filter(|(key, _)| !is_reserved(key));
        annotations.extend(asked_for.map(|(key, value)| (key.clone(), value.clone())));
        let ours = self.origin().into_iter().chain(self.lists());
        annotations.extend(ours.filter_map(|(key, value)| Some((key.to_owned(), value?))));
        let metadata = ObjectMeta {
            name: Some(self.name.to_owned()),
            namespace: Some(self.namespace.to_owned()),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: Some(owner_references),
            ..ObjectMeta::default()
        };
        let data = data.iter();
        let data = data.map(|(key, value)| (key.as_str(), Encoded(value)));
        Ok(NewSecret::new(metadata, self.type_, data))
    }
}

/// Decides about a Secret that is read from bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use super::owners::without_owner;
    use crate::{fuzz::assert_readable, record::ClassState, secret::Secret};

    let Ok(existing) = serde_json::from_slice::<Existing>(bytes) else {
        return;
    };
    let class = ClassState {
        name: "db".to_owned(),
        uid: "class-1".to_owned(),
        generation: Some(1),
        resource_version: "1".to_owned(),
        annotations: BTreeMap::new(),
    };
    let owner = Owner {
        api_version: "v1".to_owned(),
        kind: "Pod".to_owned(),
        name: "web".to_owned(),
        uid: "pod-1".to_owned(),
    };
    let data = BTreeMap::from([("password".to_owned(), Secret::from("hunter2".to_owned()))]);
    let map = BTreeMap::from([("app".to_owned(), "shop".to_owned())]);
    let desired = DesiredSecret {
        namespace: "shop",
        name: "creds",
        type_: "Opaque",
        labels: &map,
        annotations: &map,
        data: Data::Values(&data),
        class: &class,
        since: Timestamp::UNIX_EPOCH,
        order: Some(7),
        owners: &[owner],
    };
    for named in [
        NamedClass::MayBeLater,
        NamedClass::IsPresent,
        NamedClass::HasReleasedIt,
    ] {
        if let Decision::Write(change) = decide(&existing, &desired, named) {
            assert!(serde_json::to_vec(&change).is_ok());
            if let Some(owners) = &change.metadata.owner_references {
                assert!(owners.iter().any(|owner| owner.uid == "pod-1"));
            }
        }
    }
    match desired.object(Some(&existing)) {
        Ok(new) => assert!(serde_json::to_vec(&new).is_ok()),
        Err(error) => assert_readable(&error),
    }
    if let Some(change) = without_owner(&existing, "pod-1") {
        assert!(serde_json::to_vec(&change).is_ok());
    }
}
