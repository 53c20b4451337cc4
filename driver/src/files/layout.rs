//! Names what lies at the root of a volume.
//!
//! The layout is the one that kubelet's own atomic writer makes, which readers know:
//!
//! ```text
//! password -> ..data/password
//! ..data   -> ..2026_11_23_16_19_05.123456789
//! ..2026_11_23_16_19_05.123456789/password
//! ```
//!
//! A directory whose name is a moment is a generation: the content of the volume from that moment
//! on. Every name that starts with `..` is hidden: no path of a payload has one.

use std::{ffi::CStr, io, os::fd::OwnedFd};

use nix::{errno::Errno, fcntl::readlinkat};

use super::tree::At as _;

/// The link that leads to the current generation.
pub(super) const DATA: &str = "..data";

/// Returns a name for a generation like kubelet's, which sorts by time.
pub(super) fn fresh_name() -> String {
    jiff::Timestamp::now()
        .strftime("..%Y_%m_%d_%H_%M_%S.%9f")
        .to_string()
}

/// Whether a name at the root is one that [`fresh_name`] makes.
pub(super) fn is_generation(name: &CStr) -> bool {
    name.to_bytes()
        .strip_prefix(b"..")
        .and_then(<[u8]>::first)
        .is_some_and(u8::is_ascii_digit)
}

/// Whether a name at the root is for the driver's own use.
pub(super) fn is_hidden(name: &CStr) -> bool {
    name.to_bytes().starts_with(b"..")
}

/// Returns where `..data` leads, if it leads to a directory beside it.
pub(super) fn current(root: &OwnedFd) -> io::Result<Option<String>> {
    match readlinkat(root, DATA) {
        Ok(target) => Ok(target
            .into_string()
            .ok()
            .filter(|name| name.starts_with("..") && name.len() > 2 && !name.contains('/'))),
        Err(Errno::ENOENT | Errno::EINVAL) => Ok(None),
        Err(errno) => Err(errno).at(DATA),
    }
}

/// Whether `name` at the root is a link to `..data/name`.
pub(super) fn is_link_of_ours(root: &OwnedFd, name: &str) -> bool {
    readlinkat(root, name).is_ok_and(|target| {
        target
            .to_str()
            .and_then(|target| target.strip_prefix(DATA)?.strip_prefix('/'))
            == Some(name)
    })
}
