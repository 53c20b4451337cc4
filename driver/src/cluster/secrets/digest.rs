//! Tells contents apart without keeping them.

use std::sync::OnceLock;

use ring::hmac;

/// What a content is told by, for as long as this process lives: its key is random, so that nothing
/// can be guessed from the digest of a short secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Returns the digest of some parts. A part is never mistaken for a piece of another.
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
    fn parts_are_told_apart() {
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
