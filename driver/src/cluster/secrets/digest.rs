//! Compares contents without keeping them in memory.

use std::sync::OnceLock;

use ring::hmac;

/// A keyed hash of a content. Its key is random for each process, so that nothing can be guessed from
/// the digest of a short secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Returns the digest of some parts. Other boundaries between the parts give another digest.
    pub fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        static KEY: OnceLock<hmac::Key> = OnceLock::new();
        let key =
            KEY.get_or_init(|| hmac::Key::new(hmac::HMAC_SHA256, &rand::random::<[u8; 32]>()));
        let mut context = hmac::Context::with_key(key);
        for part in parts {
            context.update(&part.len().to_be_bytes());
            context.update(part);
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(context.sign().as_ref());
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_boundaries_between_parts_count() {
        let digests = [
            &[&b"ab"[..], b"c"][..],
            &[b"a", b"bc"],
            &[b"abc"],
            &[b"", b"abc"],
        ];
        let digests = digests.map(|parts| Digest::of(parts.iter().copied()));
        assert_eq!(HashSet::from(digests).len(), 4);
        assert_eq!(Digest::of([&b"a"[..]]), Digest::of([&b"a"[..]]));
    }
}
