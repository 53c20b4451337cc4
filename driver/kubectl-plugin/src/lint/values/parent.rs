//! Charts that this one is a part of: where their values have those of this chart.

use std::{collections::BTreeMap, path::Path};

use crate::lint::yaml::Node;

/// The chart's name, below which a parent chart has its values.
pub const CHART: &str = "secrets-store-csi-driver";

/// The charts whose `Chart.yaml` is among the files, by their directories.
pub(in crate::lint) struct Parents(BTreeMap<String, Parent>);

/// A chart that may have this one as a part.
#[derive(Debug, Default)]
pub(super) struct Parent {
    /// The names below which it has the values of this chart: the alias of a dependency, or the chart's name.
    pub(super) names: Vec<String>,
    /// The keys that switch the part on, by those names.
    conditions: Vec<(String, String)>,
    /// Whether it is this chart itself.
    is_this: bool,
}

impl Parents {
    /// Reads the charts among some documents, each with the name of its file.
    pub(in crate::lint) fn of(documents: &[(&str, Node)]) -> Self {
        let charts = documents.iter().filter(|(_, node)| is_chart(node));
        let charts = charts.map(|(file, node)| (directory(file), Parent::of(node)));
        Self(charts.collect())
    }

    /// Returns the chart to which a file of values belongs, if it is known.
    pub(super) fn of_file(&self, file: &str) -> Option<&Parent> {
        self.0.get(&directory(file))
    }
}

impl Parent {
    fn of(chart: &Node) -> Self {
        let mut parent = Self {
            is_this: chart.text_of("name") == Some(CHART),
            ..Self::default()
        };
        for dependency in chart.items_of("dependencies") {
            if dependency.text_of("name") != Some(CHART) {
                continue;
            }
            let name = dependency.text_of("alias").unwrap_or(CHART).to_owned();
            let conditions = dependency.text_of("condition").unwrap_or_default();
            for condition in conditions.split(',') {
                if let Some((below, key)) = condition.trim().split_once('.') {
                    parent.conditions.push((below.to_owned(), key.to_owned()));
                }
            }
            parent.names.push(name);
        }
        parent
    }

    /// Returns whether it is this chart itself, whose values are the defaults that others replace.
    pub(super) fn is_this(&self) -> bool {
        self.is_this
    }

    /// Returns whether the chart has this one as a part.
    pub(super) fn has_part(&self) -> bool {
        !self.names.is_empty()
    }

    /// Returns whether it has this one as a part of that name.
    pub(super) fn has_name(&self, name: &str) -> bool {
        self.names.iter().any(|other| other == name)
    }

    /// Returns whether a key below a name switches the part on.
    pub(super) fn is_condition(&self, name: &str, key: &str) -> bool {
        let mut all = self.conditions.iter();
        all.any(|(below, condition)| below == name && condition == key)
    }
}

/// Returns whether a document is a `Chart.yaml`.
pub(in crate::lint) fn is_chart(node: &Node) -> bool {
    let has = |name| node.text_of(name).is_some();
    !has("kind") && has("name") && matches!(node.text_of("apiVersion"), Some("v1" | "v2"))
}

fn directory(file: &str) -> String {
    let parent = Path::new(file).parent().unwrap_or_else(|| Path::new(""));
    parent.display().to_string()
}
