//! The findings, for people and for scripts.

use std::fmt;

use serde::Serialize;

/// What a finding means for farpage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// There.
    Ok,
    /// Not there; farpage works without it, more slowly or with a feature less.
    Optional,
    /// Not there, and programs cannot be run with far memory from this account.
    Missing,
}

/// One finding.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Check {
    /// A name that scripts can rely on.
    pub(crate) id: &'static str,
    pub(crate) level: Level,
    /// What was found.
    pub(crate) found: String,
    /// What it is for.
    pub(crate) purpose: &'static str,
    /// How to get what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

/// All findings, in the order in which they were made.
#[derive(Debug, Default)]
pub(crate) struct Report {
    checks: Vec<Check>,
}

/// The report as scripts see it.
#[derive(Debug, Serialize)]
pub(crate) struct JsonReport<'a> {
    /// True if nothing is missing that `farpage run` needs.
    ready: bool,
    checks: &'a [Check],
}

impl Report {
    /// Adds something that is there.
    pub(crate) fn ok(&mut self, id: &'static str, found: impl Into<String>, purpose: &'static str) {
        self.checks.push(Check {
            id,
            level: Level::Ok,
            found: found.into(),
            purpose,
            remedy: None,
        });
    }

    /// Adds something that farpage does without.
    pub(crate) fn optional(
        &mut self,
        id: &'static str,
        found: impl Into<String>,
        purpose: &'static str,
        remedy: impl Into<String>,
    ) {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        self.checks.push(Check {
            id,
            level: Level::Optional,
            found,
            purpose,
            remedy,
        });
    }

    /// Adds something that farpage needs and that is not there.
    pub(crate) fn missing(
        &mut self,
        id: &'static str,
        found: impl Into<String>,
        purpose: &'static str,
        remedy: impl Into<String>,
    ) {
        let (found, remedy) = (found.into(), Some(remedy.into()));
        self.checks.push(Check {
            id,
            level: Level::Missing,
            found,
            purpose,
            remedy,
        });
    }

    fn ready(&self) -> bool {
        self.checks
            .iter()
            .all(|check| check.level != Level::Missing)
    }

    /// The report as scripts see it.
    pub(crate) fn to_json(&self) -> JsonReport<'_> {
        JsonReport {
            ready: self.ready(),
            checks: &self.checks,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let mark = match check.level {
                Level::Ok => "ok      ",
                Level::Optional => "without ",
                Level::Missing => "MISSING ",
            };
            writeln!(f, "{mark}{:24} {}", check.id, check.found)?;
            writeln!(f, "{:33}for: {}", "", check.purpose)?;
            if let Some(remedy) = &check.remedy {
                writeln!(f, "{:33}do:  {remedy}", "")?;
            }
        }
        let verdict = if self.ready() {
            "This account can run programs with far memory on this machine."
        } else {
            "This account cannot run programs with far memory by itself; see what is MISSING above."
        };
        writeln!(f, "\n{verdict}")
    }
}
