//! Checks which module of a crate uses which, and which modules of the driver use the crates for
//! protobuf, Kubernetes, HTTP and system calls. Each crate's `src/lib.rs` lists its modules.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use rstest::rstest;

/// The modules of a crate from the top to the bottom, each with exactly the modules that it uses.
type Modules = &'static [(&'static str, &'static [&'static str])];

const DRIVER: Modules = &[
    (
        "fuzz",
        &[
            "cluster",
            "csi",
            "metrics",
            "mount",
            "provider",
            "record",
            "registration",
            "sync",
        ],
    ),
    (
        "csi",
        &[
            "config", "error", "files", "metrics", "quoted", "record", "secret", "socket", "volume",
        ],
    ),
    ("registration", &["socket"]),
    (
        "status",
        &["config", "files", "memory", "mount", "provider", "record"],
    ),
    ("logging", &["config"]),
    ("hardening", &["config"]),
    (
        "volume",
        &[
            "cluster", "config", "error", "files", "memory", "metrics", "mount", "provider",
            "quoted", "record", "secret", "sync",
        ],
    ),
    ("adopted", &["memory", "metrics", "record", "sync"]),
    (
        "sync",
        &[
            "cluster", "error", "files", "metrics", "mount", "quoted", "record", "secret", "turns",
        ],
    ),
    ("memory", &["files", "mount"]),
    (
        "provider",
        &["error", "files", "metrics", "quoted", "record", "secret"],
    ),
    (
        "cluster",
        &[
            "config", "error", "hex", "quoted", "record", "secret", "turns",
        ],
    ),
    ("metrics", &["config", "socket"]),
    ("mount", &["files", "hex"]),
    ("files", &["hex", "quoted", "secret"]),
    ("record", &["hex", "quoted"]),
    ("config", &[]),
    ("socket", &[]),
    ("error", &[]),
    ("secret", &[]),
    ("turns", &[]),
    ("hex", &[]),
    ("quoted", &[]),
];

const FAKE_PROVIDER: Modules = &[
    ("check", &["server"]),
    ("fake", &["server"]),
    ("server", &[]),
];

const EMBEDDED: Modules = &[
    (
        "cluster",
        &[
            "api",
            "apply",
            "control",
            "controllers",
            "error",
            "exchange",
            "kubelet",
            "namespaces",
            "node",
            "processes",
        ],
    ),
    (
        "node",
        &[
            "api",
            "control",
            "daemonsets",
            "kubelet",
            "namespaces",
            "processes",
        ],
    ),
    ("controllers", &["daemonsets", "kubelet", "processes"]),
    ("daemonsets", &["kubelet", "processes"]),
    ("control", &["exchange", "namespaces", "processes"]),
    ("processes", &["api", "namespaces"]),
    ("apply", &["error"]),
    ("api", &[]),
    ("kubelet", &[]),
    ("namespaces", &[]),
    ("exchange", &[]),
    ("error", &[]),
];

const E2E: Modules = &[
    (
        "chaos",
        &[
            "binaries",
            "cluster",
            "embedded",
            "install",
            "local",
            "manifest",
            "namespace",
            "tree",
        ],
    ),
    (
        "demo",
        &[
            "binaries",
            "cluster",
            "embedded",
            "install",
            "manifest",
            "namespace",
            "tree",
        ],
    ),
    (
        "comparison",
        &[
            "bench", "binaries", "cluster", "install", "previous", "real",
        ],
    ),
    ("scale", &["bench", "binaries", "cluster"]),
    ("budget", &["bench", "cluster", "embedded"]),
    ("footprint", &["bench", "binaries", "cluster", "embedded"]),
    ("soak", &["bench", "cluster", "embedded"]),
    ("load", &["bench", "cluster", "embedded", "install"]),
    (
        "bench",
        &[
            "binaries",
            "cluster",
            "embedded",
            "install",
            "isolated",
            "local",
            "manifest",
            "namespace",
            "previous",
            "real",
        ],
    ),
    ("openbao", &["providers"]),
    (
        "providers",
        &[
            "binaries",
            "cluster",
            "embedded",
            "images",
            "install",
            "namespace",
            "stores",
        ],
    ),
    (
        "previous",
        &["binaries", "cluster", "images", "install", "manifest"],
    ),
    (
        "embedded",
        &[
            "binaries",
            "cluster",
            "host",
            "install",
            "manifest",
            "namespace",
            "tree",
            "user",
        ],
    ),
    (
        "local",
        &[
            "binaries",
            "cluster",
            "guard",
            "host",
            "images",
            "install",
            "namespace",
            "real",
            "tree",
        ],
    ),
    (
        "kind",
        &[
            "binaries", "cluster", "guard", "host", "images", "install", "real", "tree",
        ],
    ),
    ("real", &["cluster", "install"]),
    ("guard", &["cluster"]),
    (
        "install",
        &["binaries", "cluster", "images", "manifest", "namespace"],
    ),
    ("images", &["binaries", "tree"]),
    ("namespace", &["cluster"]),
    ("manifest", &["cluster"]),
    ("cluster", &["reader", "tree"]),
    ("tree", &[]),
    ("reader", &[]),
    ("binaries", &[]),
    ("host", &[]),
    ("isolated", &[]),
    ("skipped", &[]),
    ("stores", &[]),
    ("user", &[]),
];

/// Crates that only some modules of the driver use, each with exactly those modules.
const CONFINED: [(&str, &[&str]); 10] = [
    ("proto", &["csi", "metrics", "provider", "registration"]),
    ("prost", &["provider"]),
    ("kube", &["cluster"]),
    ("k8s_openapi", &["cluster"]),
    ("hyper", &["cluster", "metrics", "provider"]),
    ("prometheus_client", &["metrics"]),
    ("procfs_core", &["metrics"]),
    ("tonic_types", &["provider"]),
    ("nix", &["files", "hardening", "metrics", "mount", "socket"]),
    ("libc", &["hardening", "metrics", "mount", "provider"]),
];

/// Returns the code of each module of a crate, without tests and comments.
fn modules(sources: &Path) -> BTreeMap<String, String> {
    fn read(sources: &Path, directory: &Path, modules: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(sources, &path, modules);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let relative = path.strip_prefix(sources).unwrap().with_extension("");
            let names: Vec<_> = relative.iter().map(|n| n.to_str().unwrap()).collect();
            if matches!(names[0], "main" | "lib" | "bin") || names.contains(&"tests") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let code = modules.entry(names[0].to_owned()).or_default();
            code.push_str(&without_tests_and_comments(&text));
        }
    }
    let mut modules = BTreeMap::new();
    read(sources, sources, &mut modules);
    modules
}

/// Returns the directory of a crate's sources.
fn sources(of: &str) -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    workspace.join(of).join("src")
}

fn without_tests_and_comments(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut kept = String::new();
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if line == "#[cfg(any(test, fuzzing))]" {
            // The item ends with a brace of its own, or is one line.
            let is_last =
                |line: &&str| *line == "}" || line.ends_with(';') && !line.starts_with(' ');
            lines.find(is_last);
        } else if !line.trim_start().starts_with("//") {
            kept += line;
            kept += "\n";
        }
    }
    kept
}

/// Returns what follows each mention of a path that begins with `name`.
fn after<'a>(code: &'a str, name: &str) -> Vec<&'a str> {
    let start = format!("{name}::");
    let is_whole = |at: usize| {
        let before = code[..at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':')
    };
    code.match_indices(&start)
        .filter(|(at, _)| is_whole(*at))
        .map(|(at, _)| &code[at + start.len()..])
        .collect()
}

/// Returns the modules that some code names: `crate::x`, and each `x` of `crate::{...}`.
fn used(code: &str) -> BTreeSet<&str> {
    fn first_name(path: &str) -> &str {
        let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
        &path[..end.unwrap_or(path.len())]
    }
    let mut used = BTreeSet::new();
    for path in after(code, "crate") {
        let Some(group) = path.strip_prefix('{') else {
            used.insert(first_name(path));
            continue;
        };
        let mut depth = 0;
        let mut starts = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => starts = true,
                _ if starts && !c.is_whitespace() => {
                    used.insert(first_name(&group[at..]));
                    starts = false;
                }
                _ => {}
            }
        }
    }
    used
}

#[rstest]
#[case::driver("driver", DRIVER)]
#[case::fake_provider("fake-provider", FAKE_PROVIDER)]
#[case::embedded("e2e/embedded", EMBEDDED)]
#[case::e2e("e2e", E2E)]
fn a_module_uses_the_modules_that_are_listed_here_and_all_of_them_are_below_it(
    #[case] of: &str,
    #[case] listed: Modules,
) {
    let modules = modules(&sources(of));
    let names: BTreeSet<_> = modules.keys().map(String::as_str).collect();
    assert_eq!(names, listed.iter().map(|(module, _)| *module).collect());
    for (at, (module, uses)) in listed.iter().enumerate() {
        let mut used = used(&modules[*module]);
        // A name that is no module is a function or a macro of `lib.rs`.
        used.retain(|name| name != module && names.contains(name));
        assert_eq!(used, uses.iter().copied().collect(), "{module} uses");
        for other in *uses {
            let below = listed[at + 1..].iter().any(|(module, _)| module == other);
            assert!(below, "{other} is not below {module}");
        }
    }
}

#[test]
fn crates_are_used_by_the_modules_of_the_driver_that_are_listed_here() {
    let modules = modules(&sources("driver"));
    for (name, said) in CONFINED {
        let found = modules
            .iter()
            .filter(|(_, code)| !after(code, name).is_empty());
        let found: Vec<_> = found.map(|(module, _)| module).collect();
        assert_eq!(found, said, "{name} is used by");
    }
}

/// The unit tests of a metric call the method that counts it. A method that nothing else calls counts nothing.
#[test]
fn the_driver_calls_each_method_that_counts() {
    let mut modules = modules(&sources("driver"));
    let metrics = modules.remove("metrics").unwrap();
    modules.remove("fuzz");
    let lib = fs::read_to_string(sources("driver").join("lib.rs")).unwrap();
    modules.insert("lib".to_owned(), without_tests_and_comments(&lib));
    // A call may be broken into lines anywhere.
    let callers: String = modules
        .values()
        .flat_map(|code| code.split_whitespace())
        .collect();
    let blocks = metrics.split("\nimpl Metrics {\n").skip(1);
    let lines = blocks.flat_map(|block| block.split("\n}\n").next().unwrap().lines());
    let names = lines.filter_map(|line| line.strip_prefix("    pub fn ")?.split(['(', '<']).next());
    // These count nothing.
    let counting: Vec<_> = names
        .filter(|name| !["new", "render"].contains(name))
        .collect();
    assert!(counting.len() >= 13, "{counting:?}");
    let idle = |name: &&&str| !callers.contains(&format!("metrics.{name}("));
    let idle: Vec<_> = counting.iter().filter(idle).collect();
    assert!(
        idle.is_empty(),
        "nothing outside of driver/src/metrics calls metrics.NAME() of {idle:?}"
    );
}

#[test]
fn the_documentation_of_the_driver_lists_the_modules_in_their_order() {
    let text = fs::read_to_string(sources("driver").join("lib.rs")).unwrap();
    let map = text.split("//! ```").nth(1).unwrap();
    let lines = map.lines().skip(1);
    let shown = lines.filter_map(|line| line.trim_start_matches("//!").split_whitespace().next());
    let shown: Vec<_> = shown.collect();
    let listed: Vec<_> = DRIVER.iter().map(|(module, _)| *module).collect();
    assert_eq!(shown, listed);
}

#[test]
fn the_reader_of_uses_reads_what_is_written_here() {
    let code = "use crate::{\n    config::{A, B},\n    error::{Error, Result},\n    record,\n};\nlet x = crate::files::File::new(crate::secret::S);\nlet y = metrics::http::serve(&mycrate::x);";
    assert_eq!(
        used(code),
        BTreeSet::from(["config", "error", "files", "record", "secret"])
    );
    assert!(after(code, "http").is_empty());
}
