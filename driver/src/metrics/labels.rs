//! The labels of series, and the values that come from outside: names of providers and their error
//! codes.
//!
//! Anybody who may write a SecretProviderClass can name any provider, and a provider can answer
//! with any code. A name therefore becomes a label value only once a socket of that provider was
//! found, and each provider has a bounded number of codes. All others are counted as [`OTHER`].

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// The name and the value of a label.
pub(super) type Label = (&'static str, Cow<'static, str>);
/// The labels of one series, in the order in which the page shows them.
pub(super) type LabelSet = Vec<Label>;

/// The operating system, in Go's spelling.
pub(super) const OS_TYPE: Label = ("os_type", Cow::Borrowed("linux"));
/// The value that stands for all values that are not admitted.
pub(super) const OTHER: &str = "other";
/// The `error_type` of a failure for which no reason was given.
pub(super) const FAILED_TO_MOUNT: &str = "FailedToMount";

/// The number of providers that are admitted at a time, and in the life of the process.
const MOST_PROVIDERS: usize = 100;
const MOST_PROVIDERS_EVER: usize = 1000;
/// The number of error codes that are admitted for one provider.
const MOST_CODES: usize = 20;
/// The number of characters of a value that are kept.
const LONGEST_VALUE: usize = 64;

/// The error types of the driver itself. The codes of providers never displace them.
const OWN_ERRORS: [&str; 7] = [
    FAILED_TO_MOUNT,
    "SecretProviderClassNotFound",
    "FailedToEnsureMountPoint",
    "GRPCProviderError",
    "FileWriteError",
    "FailedToLookupProviderGRPCClient",
    "",
];

/// The values that are admitted.
#[derive(Default)]
pub(super) struct Labels(Mutex<Admitted>);

#[derive(Default)]
struct Admitted {
    /// The admitted providers with the admitted codes of each.
    providers: BTreeMap<String, BTreeSet<String>>,
    /// The number of providers that have been admitted since the start.
    ever: usize,
}

impl Labels {
    /// Admits a provider. If too many are admitted already, removes those that are not
    /// `still_there` first.
    pub(super) fn seen(&self, provider: &str, still_there: impl Fn(&str) -> bool) {
        let value = clean(provider);
        let mut admitted = self.lock();
        if admitted.providers.contains_key(&value) || admitted.ever >= MOST_PROVIDERS_EVER {
            return;
        }
        if admitted.providers.len() >= MOST_PROVIDERS {
            admitted.providers.retain(|name, _| still_there(name));
        }
        if admitted.providers.len() < MOST_PROVIDERS {
            admitted.ever += 1;
            admitted.providers.insert(value, BTreeSet::new());
        }
    }

    /// Returns the label of a provider. An empty name keeps the empty value, as with the existing
    /// driver.
    pub(super) fn provider(&self, name: &str) -> Label {
        let value = clean(name);
        let admitted = value.is_empty() || self.lock().providers.contains_key(&value);
        let value = if admitted { value.into() } else { OTHER.into() };
        ("provider", value)
    }

    /// Returns the label of an error: the driver's own, or a code of `provider`.
    pub(super) fn error_type(&self, provider: &str, error: &str) -> Label {
        let value = clean(error);
        let admitted = OWN_ERRORS.contains(&value.as_str()) || self.admits_code(provider, &value);
        let value = if admitted { value.into() } else { OTHER.into() };
        ("error_type", value)
    }

    /// Returns whether `code` is admitted for a provider, and admits it if there is room.
    fn admits_code(&self, provider: &str, code: &str) -> bool {
        let mut admitted = self.lock();
        let Some(codes) = admitted.providers.get_mut(&clean(provider)) else {
            return false;
        };
        if codes.contains(code) {
            return true;
        }
        codes.len() < MOST_CODES && codes.insert(code.to_owned())
    }

    fn lock(&self) -> MutexGuard<'_, Admitted> {
        // A panic elsewhere leaves the sets whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Shortens a value and replaces the characters that labels may not have.
fn clean(raw: &str) -> String {
    let allowed = |c: char| {
        if c.is_ascii_alphanumeric() || "-._".contains(c) {
            c
        } else {
            '_'
        }
    };
    raw.chars().take(LONGEST_VALUE).map(allowed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_have_no_socket_use_nothing_up() {
        let labels = Labels::default();
        for bogus in 0..200 {
            assert_eq!(labels.provider(&format!("bogus-{bogus}")).1, OTHER);
            let code = labels.error_type(&format!("bogus-{bogus}"), "ItsCode");
            assert_eq!(code.1, OTHER);
        }
        labels.seen("vault", |_| true);
        assert_eq!(labels.provider("vault").1, "vault");
        assert_eq!(labels.provider("").1, "");
    }

    #[test]
    fn providers_that_are_gone_give_their_places_back() {
        let labels = Labels::default();
        for name in 0..MOST_PROVIDERS + 5 {
            labels.seen(&format!("p{name}"), |_| true);
        }
        assert_eq!(labels.provider("p0").1, "p0");
        assert_eq!(labels.provider("p102").1, OTHER);
        labels.seen("vault", |name| name == "p0");
        assert_eq!(labels.provider("vault").1, "vault");
        assert_eq!(
            (labels.provider("p0").1, labels.provider("p1").1),
            ("p0".into(), OTHER.into())
        );
        for name in 0..MOST_PROVIDERS_EVER * 2 {
            labels.seen(&format!("q{name}"), |_| false);
        }
        assert_eq!(labels.lock().ever, MOST_PROVIDERS_EVER);
    }

    #[test]
    fn one_providers_codes_take_no_place_of_anothers_and_none_of_ours() {
        let labels = Labels::default();
        labels.seen("noisy", |_| true);
        labels.seen("vault", |_| true);
        for code in 0..1000 {
            labels.error_type("noisy", &format!("code-{code}"));
        }
        assert_eq!(labels.error_type("noisy", "code-0").1, "code-0");
        assert_eq!(labels.error_type("noisy", "code-999").1, OTHER);
        assert_eq!(labels.error_type("vault", "Sealed").1, "Sealed");
        for own in OWN_ERRORS {
            assert_eq!(labels.error_type("noisy", own).1, own);
            assert_eq!(labels.error_type("bogus", own).1, own);
        }
    }

    proptest! {
        /// Values are short, in the alphabet of labels, and bounded in number, for any input.
        #[test]
        fn values_are_bounded(
            seen in proptest::collection::vec(".{0,80}", 0..150),
            said in proptest::collection::vec((".{0,80}", ".{0,200}"), 0..300),
        ) {
            let labels = Labels::default();
            for name in &seen {
                labels.seen(name, |_| true);
            }
            let (mut names, mut codes) = (BTreeSet::new(), BTreeSet::new());
            for (at, (name, code)) in said.iter().enumerate() {
                let name = seen.get(at).unwrap_or(name);
                for (_, value) in [labels.provider(name), labels.error_type(name, code)] {
                    prop_assert!(value.len() <= LONGEST_VALUE);
                    prop_assert!(value.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)));
                }
                names.insert(labels.provider(name));
                codes.insert((labels.provider(name), labels.error_type(name, code)));
            }
            prop_assert!(names.len() <= MOST_PROVIDERS + 2);
            prop_assert!(codes.len() <= (MOST_PROVIDERS + 2) * (MOST_CODES + OWN_ERRORS.len() + 1));
        }
    }
}
