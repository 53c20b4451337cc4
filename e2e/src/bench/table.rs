//! Prints measured values beside their bounds.

use crate::cluster::{Error, Result};

/// The measured values and their bounds.
#[derive(Default)]
pub(crate) struct Table(Vec<(String, f64, Option<Bound>)>);

#[derive(Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }
}

impl Table {
    pub(crate) fn at_most(&mut self, name: &str, value: f64, bound: f64) {
        self.0
            .push((name.to_owned(), value, Some(Bound::AtMost(bound))));
    }

    pub(crate) fn at_least(&mut self, name: &str, value: f64, bound: f64) {
        self.0
            .push((name.to_owned(), value, Some(Bound::AtLeast(bound))));
    }

    pub(crate) fn note(&mut self, name: &str, value: f64) {
        self.0.push((name.to_owned(), value, None));
    }

    pub(crate) fn print(&self) {
        for (name, value, bound) in &self.0 {
            let budget = match bound {
                None => String::new(),
                Some(Bound::AtMost(bound)) => format!("at most {bound}"),
                Some(Bound::AtLeast(bound)) => format!("at least {bound}"),
            };
            let verdict = match bound {
                Some(bound) if !bound.holds(*value) => "OVER",
                Some(_) => "ok",
                None => "",
            };
            println!("{name:<68} {value:>9.2}   {budget:<14} {verdict}");
        }
    }

    pub(crate) fn verdict(&self) -> Result<()> {
        let over: Vec<&str> = self
            .0
            .iter()
            .filter(|(_, value, bound)| bound.is_some_and(|bound| !bound.holds(*value)))
            .map(|(name, ..)| name.as_str())
            .collect();
        if over.is_empty() {
            return Ok(());
        }
        Err(Error::Impossible(format!(
            "over bounds: {}",
            over.join("; ")
        )))
    }
}
