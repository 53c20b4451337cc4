//! Checks the book in `docs/`: links and anchors lead somewhere, the summary has every page, what is
//! generated is up to date, snippets are what they claim to be, and names and messages of the driver are
//! those of its code. `just manifests` writes the generated parts.

// A test crate outside of its #[test] functions.
#![allow(clippy::panic, clippy::unwrap_used)]

mod pages;
mod reference;
mod snippets;
mod sources;

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use pages::{Page, exists, leads_to, repository};

/// Every link of the book, of the README and of its neighbours leads to a file, and its anchor to a
/// heading. Links of the book stay in it: others would lead nowhere once it is built.
#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    let mut checked = 0;
    for page in Page::of_the_book().into_iter().chain(Page::beside_it()) {
        for link in page.links() {
            checked += 1;
            if let Err(why) = leads_to(&page, &link) {
                wrong.push(format!("{}: {link}: {why}", page.path));
            }
        }
    }
    assert!(checked > 100, "{checked} links");
    assert_eq!(wrong, [""; 0]);
}

#[test]
fn the_summary_has_every_page_once() {
    let mut listed = Vec::new();
    for link in Page::read("docs/SUMMARY.md").links() {
        assert!(exists(&format!("docs/{link}")), "there is no docs/{link}");
        listed.push(format!("docs/{link}"));
    }
    let once: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(once.len(), listed.len(), "a page is listed twice");
    let pages = Page::of_the_book().into_iter().map(|page| page.path);
    let missing: Vec<String> = pages.filter(|path| !once.contains(path)).collect();
    assert_eq!(missing, [""; 0], "pages that docs/SUMMARY.md lacks");
}

/// Each message in the tables of the page is one of the driver.
#[test]
fn the_messages_of_the_page_about_trouble_are_the_drivers() {
    let sources = sources::texts();
    let page = Page::read("docs/troubleshooting.md");
    let (_, drivers) = page.text.split_once("\n## The pod and the class").unwrap();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for row in drivers.lines().filter(|line| line.starts_with("| ")) {
        let cell = row.split(" | ").next().unwrap();
        // A text of a store is not the driver's.
        if cell.starts_with("| a text of the store") {
            continue;
        }
        for message in pages::quoted(cell) {
            for piece in message.split('…').map(str::trim).filter(|p| p.len() > 3) {
                checked += 1;
                if !sources.contains(piece) {
                    wrong.push(piece.to_owned());
                }
            }
        }
    }
    assert!(checked > 50, "{checked} messages");
    assert_eq!(
        wrong, [""; 0],
        "docs/troubleshooting.md has what the driver does not say"
    );
}

/// Each alert has a section with what to do, and says where it is; each section has an alert.
#[test]
fn every_alert_has_its_section() {
    let rules = fs::read_to_string(repository("deploy/monitoring/rules.yaml")).unwrap();
    let rules: Value = serde_saphyr::from_str(&rules).unwrap();
    let page = Page::read("docs/monitoring.md");
    let (_, runbooks) = page.text.split_once("\n## Runbooks").unwrap();
    let sections = runbooks
        .lines()
        .filter_map(|line| line.strip_prefix("### "));
    let mut alerts = Vec::new();
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let alert = rule["alert"].as_str().unwrap();
        let runbook = format!("monitoring.md#{}", alert.to_lowercase());
        assert_eq!(rule["annotations"]["runbook"], runbook);
        alerts.push(alert);
    }
    assert_eq!(sections.collect::<Vec<_>>(), alerts);
}

/// Each check of the kubectl plugin is in the table of its command, and each name there is that of a check.
#[test]
fn the_page_about_the_plugin_has_every_check() {
    let page = Page::read("docs/plugin.md");
    for (section, command, at_least) in [("A pod", "explain", 30), ("A cluster", "doctor", 20)] {
        let start = format!("\n## {section}\n");
        let (_, text) = page
            .text
            .split_once(&start)
            .unwrap_or_else(|| panic!("{start}"));
        let (_, table) = text.split_once("\n| check | ").unwrap();
        let rows = table
            .lines()
            .skip(2)
            .take_while(|line| line.starts_with("| "));
        let cells = rows.filter_map(|row| row.split(" | ").next());
        let listed: Vec<&str> = cells.flat_map(pages::quoted).collect();
        let once: BTreeSet<&str> = listed.iter().copied().collect();
        assert_eq!(
            once.len(),
            listed.len(),
            "{section}: a check is there twice"
        );
        let code = sources::texts_below(&format!("driver/kubectl-plugin/src/{command}"));
        let checks = sources::checks(&code);
        assert!(checks.len() >= at_least, "{command}: {checks:?}");
        assert_eq!(once, checks, "docs/plugin.md, {section}");
    }
}

/// The reader of pages reads what is written here.
#[test]
fn the_reader_of_pages_reads_what_is_written_here() {
    let page = Page {
        path: "docs/x.md".to_owned(),
        text: "# A `b_c` and D!\n\n[one](two.md#x) `[no](link)` ![p](q.svg)\n\n## A b_c and D\n\
               ```yaml values\na: [1](2)\n```\n<!-- run: me -->\n```sh\ntrue\n```\n"
            .to_owned(),
    };
    assert_eq!(page.anchors(), ["a-b_c-and-d", "a-b_c-and-d-1"]);
    assert_eq!(page.links(), ["two.md#x", "q.svg"]);
    let fences = page.fences();
    assert_eq!(fences.len(), 2);
    assert_eq!(
        (fences[0].info.as_str(), fences[0].mark.as_str()),
        ("yaml values", "")
    );
    assert_eq!(fences[1].mark, "run: me");
    assert_eq!(fences[1].text, "true\n");
    assert!(repository("docs").is_dir());
}
