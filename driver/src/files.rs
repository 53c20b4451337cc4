//! The files of a volume: checked paths, modes and contents, and their way to and from the disk.
//!
//! A [`Payload`] is the whole content of a volume as one value, checked before anything is
//! written: a provider cannot name a path outside the volume, one path twice, or a file where
//! a directory is needed. [`swap`] writes it, and [`read`] reads it back. [`layout`] says what lies
//! in a volume, and [`own`] changes files that a provider wrote itself. [`Stamp`] tells whether a file
//! has changed.

mod cached;
mod compare;
#[cfg(test)]
mod generated;
pub mod layout;
pub mod own;
pub mod read;
pub mod swap;
mod tree;
mod write;

use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::{quoted::quoted, secret::Secret};
pub use cached::{Stamp, open_cached};
pub use tree::{clear, open_root, remove_target};

/// The mode of a file for which neither the provider nor the pod gives one.
pub const DEFAULT_MODE: u32 = 0o644;

/// The limits of Linux for one name and for a whole path: `NAME_MAX` and `PATH_MAX` in `limits.h`.
const MAX_COMPONENT_BYTES: usize = 255;
const MAX_PATH_BYTES: usize = 4096;
/// The number of names that a path may have: more than any set of secrets needs, and few enough that
/// a walk through a volume is short.
const MAX_DEPTH: usize = 32;

/// A path inside a volume: relative, clean, and unable to leave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePath(String);

/// Orders by component, so that everything below a directory stands together: as text, `a-b` stands
/// between `a` and `a/b`.
impl Ord for FilePath {
    fn cmp(&self, other: &Self) -> Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for FilePath {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl FilePath {
    /// Returns the path's components, at least one.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }

    /// Returns the first component: the name that appears at the volume's root.
    pub fn first(&self) -> &str {
        self.0.split('/').next().unwrap_or(&self.0)
    }

    /// Returns the path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FilePath {
    type Error = InvalidFile;

    fn try_from(path: String) -> Result<Self, InvalidFile> {
        let refuse = |why| {
            Err(InvalidFile {
                path: quoted(&path, 80).to_string(),
                why,
            })
        };
        if path.is_empty() {
            return refuse("the path is empty");
        }
        if path.len() > MAX_PATH_BYTES {
            return refuse("the path is longer than 4096 bytes");
        }
        if path.contains('\0') {
            return refuse("the path contains a NUL byte");
        }
        if path.starts_with('/') {
            return refuse("the path is absolute; it must be relative to the volume");
        }
        if path.split('/').count() > MAX_DEPTH {
            return refuse("the path is deeper than 32 levels");
        }
        for component in path.split('/') {
            match component {
                "" => {
                    return refuse("the path has an empty component (\"//\" or a trailing \"/\")");
                }
                "." => return refuse("the path has a \".\" component"),
                ".." => return refuse("the path has a \"..\" component"),
                name if name.starts_with("..") => {
                    return refuse("a name starts with \"..\", which is reserved for the driver");
                }
                name if name.len() > MAX_COMPONENT_BYTES => {
                    return refuse("a name is longer than 255 bytes");
                }
                _ => {}
            }
        }
        Ok(Self(path))
    }
}

/// The mode and the group of files, as far as the provider does not choose them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The mode of files for which the provider gives none.
    pub default_mode: u32,
    /// The group that everything in the volume belongs to: the pod's fsGroup.
    pub group: Option<u32>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            default_mode: DEFAULT_MODE,
            group: None,
        }
    }
}

/// A file's mode and content.
#[derive(Clone, PartialEq, Eq)]
pub struct File {
    mode: Option<u32>,
    /// The content.
    pub contents: Secret,
}

impl File {
    /// Creates a file with the mode that a provider gave. 0 means that it gave none. Bits beyond the
    /// permissions (a set-user-ID bit, a file type) are dropped, as in the existing driver.
    pub fn new(provider_mode: i32, contents: impl Into<Secret>) -> Self {
        let mode = (provider_mode != 0).then_some(provider_mode.cast_unsigned() & 0o777);
        Self {
            mode,
            contents: contents.into(),
        }
    }

    /// Returns the permission bits, 0000 to 0777.
    pub fn mode(&self) -> u32 {
        self.mode.unwrap_or(DEFAULT_MODE)
    }
}

/// The whole content of a volume.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Payload {
    files: BTreeMap<FilePath, File>,
    directories: usize,
    group: Option<u32>,
}

impl Payload {
    /// Checks all files and the tree that they form.
    ///
    /// # Errors
    /// Names the first file that is wrong, and the reason.
    pub fn new(files: impl IntoIterator<Item = (String, File)>) -> Result<Self, InvalidFile> {
        let mut tree = BTreeMap::new();
        for (path, file) in files {
            let path = FilePath::try_from(path)?;
            if tree.contains_key(&path) {
                return Err(InvalidFile {
                    path: quoted(path.as_str(), 80).to_string(),
                    why: "the provider sent two files with this path",
                });
            }
            tree.insert(path, file);
        }
        let directories = count_directories(tree.keys())?;
        Ok(Self {
            files: tree,
            directories,
            group: None,
        })
    }

    /// Gives the files the default mode and the group, as far as their provider did not choose.
    #[must_use]
    pub fn accessible(mut self, access: Access) -> Self {
        for file in self.files.values_mut() {
            file.mode.get_or_insert(access.default_mode);
        }
        self.group = access.group;
        self
    }

    /// Returns the group that everything in the volume must belong to, if one is set.
    pub fn group(&self) -> Option<u32> {
        self.group
    }

    /// Returns the files in the order of their paths.
    pub fn files(&self) -> impl Iterator<Item = (&FilePath, &File)> {
        self.files.iter()
    }

    /// Returns the number of files.
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Returns whether there are no files: the provider writes its files itself.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    /// Returns the number of directories that the files need, without the root.
    pub fn directories(&self) -> usize {
        self.directories
    }

    /// Returns the names that appear at the volume's root.
    pub fn roots(&self) -> BTreeSet<&str> {
        self.files.keys().map(FilePath::first).collect()
    }
}

/// Fails if a payload has a file that would lie outside of its volume, or in the driver's own names.
#[cfg(any(test, fuzzing))]
pub(crate) fn assert_is_inside(payload: &Payload) {
    for (path, _) in payload.files() {
        let text = path.as_str();
        assert!(!text.starts_with('/') && text.len() <= MAX_PATH_BYTES);
        assert!(
            path.components()
                .all(|name| !name.starts_with("..") && !name.is_empty())
        );
    }
    assert!(payload.directories() <= payload.len() * MAX_DEPTH);
}

/// Counts the directories that the paths need. The paths must be in order.
fn count_directories<'a>(paths: impl Iterator<Item = &'a FilePath>) -> Result<usize, InvalidFile> {
    let mut count = 0;
    let mut before: Option<&FilePath> = None;
    for path in paths {
        let depth = path.components().count();
        let (shared, depth_before) = before.map_or((0, usize::MAX), |before| {
            let pairs = path.components().zip(before.components());
            let shared = pairs.take_while(|(a, b)| a == b).count();
            (shared, before.components().count())
        });
        if let Some(before) = before
            && shared == depth_before
        {
            return Err(InvalidFile {
                path: quoted(before.as_str(), 80).to_string(),
                why: "it is a file, and another file's path needs it to be a directory",
            });
        }
        count += depth - 1 - shared;
        before = Some(path);
    }
    Ok(count)
}

/// The error of a file that a provider may not send. It does not contain the file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidFile {
    /// The path, quoted and shortened.
    path: String,
    why: &'static str,
}

impl fmt::Display for InvalidFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "file {} is refused: {}", self.path, self.why)
    }
}

impl std::error::Error for InvalidFile {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rstest::rstest;

    #[rstest]
    #[case::plain("foo")]
    #[case::nested("db/creds/password")]
    #[case::hidden(".netrc")]
    #[case::dots_inside("a..b/c..")]
    #[case::spaces(" a b ")]
    #[case::longest_name(&"n".repeat(255))]
    #[case::not_ascii("pässword/😀")]
    #[case::deepest(&["n"; 32].join("/"))]
    fn accepts(#[case] path: &str) {
        assert!(FilePath::try_from(path.to_owned()).is_ok());
    }

    #[rstest]
    #[case::empty("", "empty")]
    #[case::absolute("/etc/passwd", "absolute")]
    #[case::parent("../x", "\"..\" component")]
    #[case::parent_inside("a/../../x", "\"..\" component")]
    #[case::parent_at_the_end("a/..", "\"..\" component")]
    #[case::here("./a", "\".\" component")]
    #[case::here_inside("a/./b", "\".\" component")]
    #[case::double_slash("a//b", "empty component")]
    #[case::trailing_slash("a/", "empty component")]
    #[case::reserved("..data", "reserved")]
    #[case::reserved_inside("a/..b", "reserved")]
    #[case::three_dots("...", "reserved")]
    #[case::nul("a\0b", "NUL")]
    #[case::long_name(&"n".repeat(256), "255 bytes")]
    #[case::long_path(&"n/".repeat(2049), "4096 bytes")]
    #[case::deep(&["n"; 33].join("/"), "32 levels")]
    fn refuses(#[case] path: &str, #[case] why: &str) {
        let error = FilePath::try_from(path.to_owned()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
        assert!(error.len() < 300, "{error}");
    }

    #[rstest]
    #[case::twice(&["a", "a"], "two files")]
    #[case::file_then_directory(&["a", "a/b"], "directory")]
    #[case::directory_then_file(&["a/b/c", "a/b"], "directory")]
    #[case::a_neighbour_sorts_between(&["a", "a-b", "a/c"], "directory")]
    fn refuses_trees_that_cannot_be(#[case] paths: &[&str], #[case] why: &str) {
        let files = paths
            .iter()
            .map(|path| ((*path).to_owned(), File::new(0, vec![])));
        let error = Payload::new(files).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }

    #[rstest]
    #[case::none(0, 0o644)]
    #[case::given(0o400, 0o400)]
    #[case::all(0o777, 0o777)]
    #[case::set_user_id(0o4755, 0o755)]
    #[case::with_file_type(0o100_640, 0o640)]
    fn modes(#[case] from_provider: i32, #[case] on_disk: u32) {
        assert_eq!(File::new(from_provider, vec![]).mode(), on_disk);
    }

    #[test]
    fn a_default_mode_is_for_files_without_one() {
        let access = Access {
            default_mode: 0o440,
            group: Some(7),
        };
        let files = [(0, "a"), (0o600, "b")].map(|(m, p)| (p.to_owned(), File::new(m, vec![])));
        let payload = Payload::new(files).unwrap().accessible(access);
        let modes: Vec<u32> = payload.files().map(|(_, file)| file.mode()).collect();
        assert_eq!(
            (modes.as_slice(), payload.group()),
            (&[0o440, 0o600][..], Some(7))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_payload_counts_its_roots_and_directories(files in generated::files()) {
            let payload = generated::payload(&files);
            let roots: BTreeSet<&str> = files.keys().filter_map(|p| p.split('/').next()).collect();
            let directories: BTreeSet<&str> = files
                .keys()
                .flat_map(|p| p.match_indices('/').map(|(slash, _)| &p[..slash]))
                .collect();
            prop_assert_eq!(payload.roots(), roots);
            prop_assert_eq!(payload.directories(), directories.len());
            // A file is refused at the path of each of these directories, whatever sorts between.
            for directory in directories.into_iter().take(8) {
                let mut files = files.clone();
                files.insert(directory.to_owned(), (Vec::new(), 0));
                let files = files.into_iter().map(|(path, (content, mode))| (path, File::new(mode, content)));
                prop_assert!(Payload::new(files).is_err(), "{directory:?}");
            }
        }

        #[test]
        fn an_accepted_path_never_leaves_the_volume(path in "[a./\0]{0,12}") {
            if let Ok(accepted) = FilePath::try_from(path.clone()) {
                let joined = std::path::Path::new("/volume").join(accepted.as_str());
                let mut depth = 0;
                for component in joined.components().skip(2) {
                    prop_assert!(matches!(component, std::path::Component::Normal(_)), "{path:?}");
                    depth += 1;
                }
                prop_assert!(depth >= 1);
                prop_assert_eq!(accepted.components().count(), depth);
            }
        }
    }
}
