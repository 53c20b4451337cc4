//! A pod that reads its volume over and over, as its container sees it: by the mount that was there
//! when it started.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{self, File},
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::history::History;

/// The files of a volume, by their paths.
pub(crate) type Tree = BTreeMap<String, Vec<u8>>;

/// The pause between two looks. What a driver leaves when it is stopped is there for longer.
const PAUSE: Duration = Duration::from_millis(3);
/// The time after which a look counts for nothing: a driver keeps replaced content for readers that
/// are quicker than two seconds.
const TOO_SLOW: Duration = Duration::from_secs(1);

/// A running pod.
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Reader {
    /// Starts a pod that has a volume.
    pub(crate) fn start(target: &Path, history: Arc<Mutex<History<Tree>>>) -> io::Result<Self> {
        let root = File::open(target)?;
        let stop = Arc::<AtomicBool>::default();
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let path = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
            let mut looks = 0;
            let mut shown = Shown::default();
            while !stopped.load(Ordering::Relaxed) {
                look_at_all(&path, &history);
                look_by_name(&path, &history);
                shown.look(&path, &history);
                looks += 1;
                thread::sleep(PAUSE);
            }
            looks
        });
        Ok(Self { stop, thread })
    }

    /// Ends the pod. Returns how often it has looked.
    pub(crate) fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// Reads the whole content, as a program does that opens the directory once.
fn look_at_all(root: &Path, history: &Mutex<History<Tree>>) {
    let started = Instant::now();
    let tree = File::open(root.join("..data")).and_then(|data| {
        let path = PathBuf::from(format!("/proc/self/fd/{}", data.as_raw_fd()));
        read_all(&path)
    });
    if started.elapsed() > TOO_SLOW {
        return;
    }
    let mut history = history.lock().unwrap();
    match tree {
        Ok(tree) => history.see("the volume's content", &shown(&tree), |state| {
            *state == tree
        }),
        Err(error) => history.problem(format!("the volume's content cannot be read: {error}")),
    }
}

/// Reads each file by its name, as most programs do. The name of a file that only newer content has
/// appears a moment after that content, as with the volumes of kubelet itself.
fn look_by_name(root: &Path, history: &Mutex<History<Tree>>) {
    let names: Vec<String> = {
        let history = history.lock().unwrap();
        let states = history.all();
        let names = states.first().into_iter().flat_map(BTreeMap::keys);
        let stays = |name: &&String| states.iter().all(|state| state.contains_key(*name));
        names.filter(stays).cloned().collect()
    };
    for name in names {
        let started = Instant::now();
        let read = fs::read(root.join(&name));
        if started.elapsed() > TOO_SLOW {
            continue;
        }
        let mut history = history.lock().unwrap();
        match read {
            Ok(bytes) => history.see(&name, &short(&bytes), |state| {
                state.get(&name) == Some(&bytes)
            }),
            Err(error) => history.problem(format!("{name} cannot be read: {error}")),
        }
    }
}

/// The names that one content has shown at the root of the volume.
#[derive(Default)]
struct Shown {
    /// What `..data` led to.
    content: PathBuf,
    names: BTreeSet<OsString>,
}

impl Shown {
    /// Looks that no name goes while the content stays. New content shows its names a moment after it has
    /// come, and takes others away only then: a name that leads nowhere is one of content from before.
    fn look(&mut self, root: &Path, history: &Mutex<History<Tree>>) {
        let leads = || fs::read_link(root.join("..data"));
        let Ok(content) = leads() else {
            return;
        };
        let names = fs::read_dir(root.join(&content)).and_then(|entries| {
            let names = entries.map(|entry| Ok(entry?.file_name()));
            names.collect::<io::Result<Vec<_>>>()
        });
        let shown = |name: &OsString| fs::metadata(root.join(name)).is_ok();
        let names: BTreeSet<_> = names
            .unwrap_or_default()
            .into_iter()
            .filter(shown)
            .collect();
        let nowhere = leads_nowhere(root);
        if leads().ok().as_ref() != Some(&content) {
            return;
        }
        for name in nowhere {
            let mut history = history.lock().unwrap();
            let begins = |file: &String| file.split('/').next() == Some(&name);
            if !history.so_far().iter().any(|tree| tree.keys().any(begins)) {
                history.problem(format!(
                    "the name {name} leads nowhere, and never led to a file"
                ));
            }
        }
        if self.content == content
            && let Some(gone) = self.names.difference(&names).next()
        {
            let gone = gone.to_string_lossy();
            let mut history = history.lock().unwrap();
            history.problem(format!(
                "the name {gone} has gone, and its content is still there"
            ));
        }
        (self.content, self.names) = (content, names);
    }
}

/// Returns the names at the root of a volume that lead nowhere.
fn leads_nowhere(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let entries = entries.filter(|entry| fs::metadata(entry.path()).is_err());
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| !name.starts_with("..")).collect()
}

/// Reads all files below a directory.
pub(crate) fn read_all(directory: &Path) -> io::Result<Tree> {
    let mut tree = Tree::new();
    read_below(directory, "", &mut tree)?;
    Ok(tree)
}

fn read_below(directory: &Path, prefix: &str, tree: &mut Tree) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            read_below(&entry.path(), &format!("{name}/"), tree)?;
        } else {
            tree.insert(name, fs::read(entry.path())?);
        }
    }
    Ok(())
}

fn shown(tree: &Tree) -> BTreeMap<&String, String> {
    let files = tree.iter();
    files.map(|(name, bytes)| (name, short(bytes))).collect()
}

fn short(bytes: &[u8]) -> String {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(24)]);
    format!("{head}… ({} bytes)", bytes.len())
}
