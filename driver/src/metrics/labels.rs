//! Label values that come from outside: names of providers and their error codes.
//!
//! Anybody who may write a SecretProviderClass may name any provider, and a provider may answer
//! with any code. So a provider's name is a value only once its socket was seen, and each provider
//! has a bounded number of codes. Whatever else comes counts as [`OTHER`].

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Stands for values that are not admitted.
pub(super) const OTHER: &str = "other";
/// How many providers are values at a time, and how many there can have been.
const MOST_PROVIDERS: usize = 100;
const MOST_PROVIDERS_EVER: usize = 1000;
/// How many error codes of one provider are values.
const MOST_CODES: usize = 20;
/// How many characters of a value are kept.
const LONGEST_VALUE: usize = 64;

/// What the driver itself says of failures; never crowded out by a provider's codes.
const OWN_ERRORS: [&str; 7] = [
    super::FAILED_TO_MOUNT,
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
    /// The providers that were seen, and the codes of each.
    providers: BTreeMap<String, BTreeSet<String>>,
    /// How many providers have been admitted since the start.
    ever: usize,
}

impl Labels {
    /// A provider was seen. When there are too many, those that are not `still_there` give their
    /// places back.
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

    /// The value for a provider's name. No name has the empty value, as with the existing driver.
    pub(super) fn provider(&self, name: &str) -> String {
        let value = clean(name);
        match value.is_empty() || self.lock().providers.contains_key(&value) {
            true => value,
            false => OTHER.to_owned(),
        }
    }

    /// The value for an error: the driver's own, or a code of `provider`.
    pub(super) fn error_type(&self, provider: &str, error: &str) -> String {
        let value = clean(error);
        if OWN_ERRORS.contains(&value.as_str()) {
            return value;
        }
        let mut admitted = self.lock();
        let Some(codes) = admitted.providers.get_mut(&clean(provider)) else {
            return OTHER.to_owned();
        };
        if codes.contains(&value) {
            return value;
        }
        if codes.len() >= MOST_CODES {
            return OTHER.to_owned();
        }
        codes.insert(value.clone());
        value
    }

    fn lock(&self) -> MutexGuard<'_, Admitted> {
        // The sets are whole whoever panicked while holding them.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is left of a value in the length and the alphabet of a label.
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
            assert_eq!(labels.provider(&format!("bogus-{bogus}")), OTHER);
            let code = labels.error_type(&format!("bogus-{bogus}"), "ItsCode");
            assert_eq!(code, OTHER);
        }
        labels.seen("vault", |_| true);
        assert_eq!(labels.provider("vault"), "vault");
        assert_eq!(labels.provider(""), "");
    }

    #[test]
    fn providers_that_are_gone_give_their_places_back() {
        let labels = Labels::default();
        for name in 0..MOST_PROVIDERS + 5 {
            labels.seen(&format!("p{name}"), |_| true);
        }
        assert_eq!(labels.provider("p0"), "p0");
        assert_eq!(labels.provider("p102"), OTHER);
        labels.seen("vault", |name| name == "p0");
        assert_eq!(labels.provider("vault"), "vault");
        assert_eq!(
            (labels.provider("p0"), labels.provider("p1")),
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
        assert_eq!(labels.error_type("noisy", "code-0"), "code-0");
        assert_eq!(labels.error_type("noisy", "code-999"), OTHER);
        assert_eq!(labels.error_type("vault", "Sealed"), "Sealed");
        for own in OWN_ERRORS {
            assert_eq!(labels.error_type("noisy", own), own);
            assert_eq!(labels.error_type("bogus", own), own);
        }
    }

    proptest! {
        /// Whatever comes, a value is short, of a label's alphabet, and one of a bounded number.
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
                for value in [labels.provider(name), labels.error_type(name, code)] {
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
