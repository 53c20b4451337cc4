//! Collects the fields of events and spans, each with a bounded value.

use std::fmt::{self, Write as _};

use serde_json::Value;
use tracing::field::{Field, Visit};

/// The number of bytes of a value that are logged. A provider's answer may name thousands of
/// versions.
pub(super) const LONGEST_VALUE: usize = 8 * 1024;

/// The fields of an event or a span, in the order of the source.
#[derive(Default)]
pub(super) struct Fields {
    pub(super) message: String,
    pub(super) named: Vec<(&'static str, Value)>,
}

impl Fields {
    fn set(&mut self, field: &Field, value: Value) {
        match self
            .named
            .iter_mut()
            .find(|(name, _)| *name == field.name())
        {
            Some((_, old)) => *old = value,
            None => self.named.push((field.name(), value)),
        }
    }

    /// Adds the fields of an enclosing span that are not set yet.
    pub(super) fn inherit(&mut self, outer: &Fields) {
        for (name, value) in &outer.named {
            if !self.named.iter().any(|(known, _)| known == name) {
                self.named.push((name, value.clone()));
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = beginning(format_args!("{value:?}"));
        if field.name() == "message" {
            self.message = text;
        } else {
            self.set(field, text.into());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        let text = beginning(format_args!("{value}"));
        if field.name() == "message" {
            self.message = text;
        } else {
            self.set(field, text.into());
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value.into());
    }
}

/// Formats a text up to the length that is logged. The rest is not even formatted.
fn beginning(text: fmt::Arguments<'_>) -> String {
    let mut bounded = BoundedText(String::new());
    match bounded.write_fmt(text) {
        Ok(()) => bounded.0,
        Err(fmt::Error) => bounded.0 + "… (cut)",
    }
}

/// A text of at most [`LONGEST_VALUE`] bytes.
struct BoundedText(String);

impl fmt::Write for BoundedText {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        let room = LONGEST_VALUE - self.0.len();
        let fits = &part[..part.floor_char_boundary(room)];
        self.0.push_str(fits);
        if fits.len() == part.len() {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}
