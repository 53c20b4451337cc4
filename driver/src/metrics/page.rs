//! The two formats of the metrics page, and which of them a scraper gets.

use http::{HeaderMap, header::ACCEPT};
use prometheus_client::encoding::text;

use super::Metrics;

/// A format of the metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// The text format of Prometheus, version 0.0.4, which every scraper reads.
    Text,
    /// The text format of OpenMetrics, version 1.0.0.
    OpenMetrics,
}

impl Format {
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// Returns the format that a request gets ([RFC 9110](https://www.rfc-editor.org/rfc/rfc9110#name-accept)):
    /// OpenMetrics if its `Accept` fields name it and do not prefer plain text. A request that accepts
    /// neither gets plain text, as the existing driver answers it.
    pub(super) fn accepted(headers: &HeaderMap) -> Self {
        let mut openmetrics = 0.0_f32;
        // Of the ranges that match plain text, the most specific one counts.
        let mut plain = (0_u8, 0.0_f32);
        let fields = headers.get_all(ACCEPT).iter();
        let ranges = fields
            .filter_map(|field| field.to_str().ok())
            .flat_map(|field| field.split(','))
            .filter_map(Range::read);
        for Range {
            name,
            version,
            quality,
        } in ranges
        {
            let specific = match (name.as_str(), version) {
                ("application/openmetrics-text", None | Some("1.0.0")) => {
                    openmetrics = openmetrics.max(quality);
                    continue;
                }
                ("text/plain", None | Some("0.0.4")) => 2,
                ("text/*", _) => 1,
                ("*/*", _) => 0,
                _ => continue,
            };
            if specific > plain.0 || (specific == plain.0 && quality > plain.1) {
                plain = (specific, quality);
            }
        }
        if openmetrics > 0.0 && openmetrics >= plain.1 {
            Self::OpenMetrics
        } else {
            Self::Text
        }
    }
}

/// A media range of an `Accept` field.
struct Range<'a> {
    name: String,
    version: Option<&'a str>,
    quality: f32,
}

impl<'a> Range<'a> {
    /// Reads a range, or returns `None` if it is malformed.
    fn read(range: &'a str) -> Option<Self> {
        let mut parts = range.split(';').map(str::trim);
        let mut read = Self {
            name: parts.next()?.to_ascii_lowercase(),
            version: None,
            quality: 1.0,
        };
        for parameter in parts {
            let (key, value) = parameter.split_once('=')?;
            let value = value.trim().trim_matches('"');
            match key.trim().to_ascii_lowercase().as_str() {
                "version" => read.version = Some(value),
                "q" => {
                    let quality: f32 = value.parse().ok()?;
                    read.quality = (0.0..=1.0).contains(&quality).then_some(quality)?;
                }
                _ => {}
            }
        }
        Some(read)
    }
}

impl Metrics {
    /// Renders the page as a scraper gets it that asks for no format: in Prometheus text 0.0.4.
    pub fn render(&self) -> String {
        self.page(Format::Text)
    }

    /// Renders the page that `/metrics` serves.
    pub(super) fn page(&self, format: Format) -> String {
        let mut page = String::new();
        if let Err(error) = text::encode(&mut page, &self.0.registry) {
            tracing::error!(%error, "cannot render the metrics page");
        }
        match format {
            Format::Text => plain(&page),
            Format::OpenMetrics => page,
        }
    }
}

/// Turns OpenMetrics text into Prometheus text 0.0.4. There a family of counters has the name of its
/// series, which ends in `_total`, and neither a unit nor the end of the page is marked.
fn plain(page: &str) -> String {
    let mut plain = String::with_capacity(page.len() + 1024);
    let mut add = |parts: &[&str]| {
        plain.extend(parts.iter().copied());
        plain.push('\n');
    };
    let mut help = None;
    for line in page.lines() {
        if let Some(described) = line.strip_prefix("# HELP ") {
            help = described.split_once(' ');
        } else if let Some(typed) = line.strip_prefix("# TYPE ") {
            let counter = typed.strip_suffix(" counter");
            let suffix = counter.map_or("", |_| "_total");
            if let Some((name, text)) = help.take() {
                add(&["# HELP ", name, suffix, " ", text]);
            }
            match counter {
                Some(name) => add(&["# TYPE ", name, "_total counter"]),
                None => add(&[line]),
            }
        } else if !line.starts_with('#') {
            add(&[line]);
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::Duration;

    use jiff::Timestamp;
    use rstest::rstest;

    use super::*;

    const PROMETHEUS_2: &str = "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    const PROMETHEUS_3: &str = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";

    #[rstest]
    #[case::prometheus_2(&[PROMETHEUS_2], Format::OpenMetrics)]
    #[case::prometheus_3(&[PROMETHEUS_3], Format::OpenMetrics)]
    #[case::nothing(&[], Format::Text)]
    #[case::empty(&[""], Format::Text)]
    #[case::curl(&["*/*"], Format::Text)]
    #[case::browser(&["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], Format::Text)]
    #[case::only_openmetrics(&["application/openmetrics-text"], Format::OpenMetrics)]
    #[case::several_fields(&["text/plain;q=0.4", "Application/OpenMetrics-Text; Version=\"1.0.0\" ; Q=0.5"], Format::OpenMetrics)]
    #[case::plain_preferred(&["application/openmetrics-text;q=0.4, text/plain"], Format::Text)]
    #[case::anything_preferred(&["application/openmetrics-text;q=0.4, */*;q=0.5"], Format::Text)]
    #[case::the_specific_range_counts(&["application/openmetrics-text;q=0.4, text/plain;q=0.3, */*"], Format::OpenMetrics)]
    #[case::equally_good(&["text/plain, application/openmetrics-text"], Format::OpenMetrics)]
    #[case::refused(&["application/openmetrics-text;q=0"], Format::Text)]
    #[case::another_version(&["application/openmetrics-text;version=0.0.1"], Format::Text)]
    #[case::another_type(&["application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily"], Format::Text)]
    #[case::wrong_quality(&["application/openmetrics-text;q=2", "application/openmetrics-text;q=nan"], Format::Text)]
    #[case::malformed(&["application/openmetrics-text;q", ";;=,,="], Format::Text)]
    fn a_scraper_gets_what_it_accepts(#[case] fields: &[&str], #[case] format: Format) {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(ACCEPT, field.parse().unwrap());
        }
        assert_eq!(Format::accepted(&headers), format);
    }

    /// Returns metrics in which every series has a value.
    fn counted() -> Metrics {
        let metrics = Metrics::new();
        for provider in ["vault", "azure"] {
            metrics.provider_seen(provider, |_| true);
            let mut publish = metrics.publish();
            publish.provider(provider);
            publish.succeeded();
            metrics.refresh(provider).succeeded(true);
            drop(metrics.refresh(provider));
            metrics.success(provider, "csi-1", Timestamp::from_second(7).unwrap());
            metrics.secret_synced(provider, Duration::from_millis(150));
            metrics.secret_failed(provider, "Forbidden");
            let mut call = metrics.provider_call(provider);
            call.started();
            call.ended("OK");
        }
        drop(metrics.publish());
        metrics.unpublish().succeeded();
        metrics.unpublish().failed();
        metrics.memory(1, 2, 3);
        metrics
    }

    /// A family of a page in text 0.0.4.
    #[derive(Debug)]
    struct Family {
        kind: String,
        /// The values by name and labels.
        samples: BTreeMap<(String, String), f64>,
    }

    /// Reads a page as strictly as its [description](https://prometheus.io/docs/instrumenting/exposition_formats/)
    /// allows: each family is one block of help, type and samples.
    fn read(page: &str) -> BTreeMap<String, Family> {
        assert!(page.ends_with('\n'));
        let mut families = BTreeMap::<String, Family>::new();
        let (mut help, mut current) = (None, None);
        for line in page.lines() {
            if let Some(described) = line.strip_prefix("# HELP ") {
                let (name, text) = described.split_once(' ').unwrap();
                assert!(!text.is_empty() && help.replace(name).is_none(), "{line}");
            } else if let Some(typed) = line.strip_prefix("# TYPE ") {
                let (name, kind) = typed.split_once(' ').unwrap();
                assert_eq!(help.take(), Some(name), "a type stands after its help");
                let family = Family {
                    kind: kind.to_owned(),
                    samples: BTreeMap::new(),
                };
                assert!(families.insert(name.to_owned(), family).is_none(), "{line}");
                current = Some(name);
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let labels = labels.strip_suffix('}').unwrap();
                let family = current.unwrap();
                let samples = &mut families.get_mut(family).unwrap().samples;
                assert!(name.starts_with(family) && !line.starts_with('#'), "{line}");
                let key = (name[family.len()..].to_owned(), labels.to_owned());
                let value = value.parse().unwrap();
                assert!(samples.insert(key, value).is_none(), "twice: {line}");
            }
        }
        families
    }

    #[test]
    fn the_plain_page_is_prometheus_text() {
        let families = read(&counted().page(Format::Text));
        assert!(families.len() >= 20, "{families:#?}");
        for (name, family) in &families {
            assert!(!family.samples.is_empty(), "{name}");
            let suffixes: BTreeSet<&str> = family.samples.keys().map(|(s, _)| s.as_str()).collect();
            match family.kind.as_str() {
                "counter" => assert!(name.ends_with("_total"), "{name}"),
                "gauge" => assert!(!name.ends_with("_total"), "{name}"),
                "histogram" => {
                    assert_eq!(suffixes, BTreeSet::from(["_bucket", "_count", "_sum"]));
                    let all = |labels: &str| labels.replace("le=\"+Inf\",", "");
                    let with = |of: &str| -> BTreeMap<String, f64> {
                        let of = family.samples.iter().filter(|((s, _), _)| s == of);
                        of.map(|((_, labels), value)| (all(labels), *value))
                            .filter(|(labels, _)| !labels.contains("le=\""))
                            .collect()
                    };
                    assert_eq!(with("_bucket"), with("_count"), "{name}");
                    assert!(!with("_count").is_empty(), "{name}");
                    continue;
                }
                kind => panic!("{name}: {kind}"),
            }
            assert_eq!(suffixes, BTreeSet::from([""]), "{name}");
        }
    }

    /// A dashboard works with either format.
    #[test]
    fn both_formats_have_the_same_series() {
        let metrics = counted();
        // What the process uses changes between the two pages.
        let series = |format| -> BTreeSet<String> {
            let page = metrics.page(format);
            let lines = page.lines().filter(|line| !line.starts_with('#'));
            lines
                .map(|line| match line.rsplit_once(' ') {
                    Some((series, _)) if line.starts_with("process_") => series.to_owned(),
                    _ => line.to_owned(),
                })
                .collect()
        };
        let plain = series(Format::Text);
        assert_eq!(plain, series(Format::OpenMetrics));
        assert!(plain.len() > 30, "{plain:#?}");
        let page = metrics.page(Format::OpenMetrics);
        assert!(page.ends_with("# EOF\n"), "{page}");
        assert!(!metrics.page(Format::Text).contains("# EOF"));
    }
}
