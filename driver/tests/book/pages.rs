//! Reads Markdown as far as these tests need it: headings, links, fenced blocks, included files.

use std::fs;
use std::path::{Component, Path, PathBuf};

/// Returns the path of a file of the repository.
pub(crate) fn repository(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file)
}

/// Returns whether the repository has a file or directory.
pub(crate) fn exists(file: &str) -> bool {
    repository(file).exists()
}

/// One file of Markdown.
pub(crate) struct Page {
    /// Its path in the repository.
    pub(crate) path: String,
    /// Its text, with the files that it includes.
    pub(crate) text: String,
}

/// A fenced block.
pub(crate) struct Fence {
    /// What follows the opening fence, such as `yaml values`.
    pub(crate) info: String,
    pub(crate) text: String,
    /// The HTML comment in the line before it, without its delimiters.
    pub(crate) mark: String,
    /// The number of its first line.
    pub(crate) line: usize,
}

impl Page {
    /// Reads a page. An `{{#include}}` of mdBook is replaced by the file.
    pub(crate) fn read(path: &str) -> Self {
        let file = repository(path);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{path}: {error}"));
        let directory = file.parent().unwrap();
        let lines = text.lines().map(|line| {
            let included = line.strip_prefix("{{#include ");
            match included.and_then(|rest| rest.strip_suffix("}}")) {
                Some(file) => fs::read_to_string(directory.join(file)).unwrap(),
                None => format!("{line}\n"),
            }
        });
        Self {
            path: path.to_owned(),
            text: lines.collect(),
        }
    }

    /// Reads all pages of the book.
    pub(crate) fn of_the_book() -> Vec<Self> {
        let mut pages = Vec::new();
        let mut open = vec!["docs".to_owned()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(repository(&directory)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let path = format!("{directory}/{name}");
                if repository(&path).is_dir() {
                    open.push(path);
                } else if name.ends_with(".md") && name != "SUMMARY.md" {
                    pages.push(Self::read(&path));
                }
            }
        }
        pages.sort_by(|a, b| a.path.cmp(&b.path));
        pages
    }

    /// Reads the pages beside the book that link to it.
    pub(crate) fn beside_it() -> Vec<Self> {
        let paths = [
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "SECURITY.md",
            "deploy/chart/README.md",
        ];
        paths.map(Self::read).into()
    }

    /// Returns the fenced blocks.
    pub(crate) fn fences(&self) -> Vec<Fence> {
        let mut fences = Vec::new();
        let mut open: Option<Fence> = None;
        let mut before = "";
        for (number, line) in self.text.lines().enumerate() {
            match (line.trim_start().strip_prefix("```"), &mut open) {
                (Some(info), None) => {
                    let mark = before.trim().strip_prefix("<!-- ");
                    let mark = mark.and_then(|rest| rest.strip_suffix(" -->"));
                    open = Some(Fence {
                        info: info.to_owned(),
                        text: String::new(),
                        mark: mark.unwrap_or_default().to_owned(),
                        line: number + 1,
                    });
                }
                (Some(_), Some(_)) => fences.extend(open.take()),
                (None, Some(fence)) => fence.text += &format!("{line}\n"),
                (None, None) => {}
            }
            before = line;
        }
        assert!(open.is_none(), "{}: a fence is not closed", self.path);
        fences
    }

    /// Returns the lines outside of fenced blocks.
    fn prose(&self) -> impl Iterator<Item = &str> {
        let mut inside = false;
        self.text.lines().filter(move |line| {
            let fence = line.trim_start().starts_with("```");
            inside ^= fence;
            !inside && !fence
        })
    }

    /// Returns the targets of links and images.
    pub(crate) fn links(&self) -> Vec<String> {
        let mut links = Vec::new();
        for line in self.prose() {
            let outside_of_code: String = line.split('`').step_by(2).collect();
            for (at, _) in outside_of_code.match_indices("](") {
                let rest = &outside_of_code[at + 2..];
                let end = rest
                    .find(')')
                    .unwrap_or_else(|| panic!("{}: {line}", self.path));
                links.push(rest[..end].to_owned());
            }
        }
        links
    }

    /// Returns the anchors of the headings, as mdBook and GitHub make them.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let mut anchors: Vec<String> = Vec::new();
        for line in self.prose().filter(|line| line.starts_with('#')) {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            let kept = heading.chars().filter_map(|c| match c {
                ' ' => Some('-'),
                c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
                _ => None,
            });
            let anchor: String = kept.collect();
            let same = anchors.iter().filter(|other| {
                let rest = other.strip_prefix(&anchor);
                rest.is_some_and(|rest| {
                    rest.trim_start_matches('-').parse::<u32>().is_ok() || rest.is_empty()
                })
            });
            anchors.push(match same.count() {
                0 => anchor,
                count => format!("{anchor}-{count}"),
            });
        }
        anchors
    }

    fn is_of_the_book(&self) -> bool {
        self.path.starts_with("docs/")
    }
}

/// Returns the texts between backticks.
pub(crate) fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Checks a link of a page.
///
/// # Errors
/// Returns what is wrong with it.
pub(crate) fn leads_to(page: &Page, link: &str) -> Result<(), String> {
    if link.starts_with("https://") || link.starts_with("http://") {
        return Ok(());
    }
    let (file, anchor) = match link.split_once('#') {
        Some((file, anchor)) => (file, Some(anchor)),
        None => (link, None),
    };
    let path = if file.is_empty() {
        page.path.clone()
    } else {
        let directory = Path::new(&page.path).parent().unwrap();
        normalized(&directory.join(file)).ok_or("it leaves the repository")?
    };
    if !exists(&path) {
        return Err(format!("there is no {path}"));
    }
    if page.is_of_the_book() && !path.starts_with("docs/") {
        return Err("it leaves the book: name the file in backticks".to_owned());
    }
    match anchor {
        Some(anchor) if !Page::read(&path).anchors().iter().any(|a| a == anchor) => {
            Err(format!("{path} has no heading #{anchor}"))
        }
        _ => Ok(()),
    }
}

/// Resolves `..` in a path of the repository; `None` if it leads out of it.
fn normalized(path: &Path) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for component in path.components() {
        match component {
            Component::ParentDir => drop(parts.pop()?),
            Component::Normal(part) => parts.push(part.to_str()?),
            _ => {}
        }
    }
    Some(parts.join("/"))
}
