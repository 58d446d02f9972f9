//! What a look at a machine found, before anything is started on it: for people, and for the program that put it
//! together from several.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub check: String,
    pub verdict: Condition,
    pub says: String,
    /// What to do about it; none where all is well.
    pub advice: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    Ok,
    /// It works, and not as it could.
    Warn,
    /// A run would not work.
    Fail,
}

impl Finding {
    pub fn ok(check: &str, says: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Condition::Ok, says: says.into(), advice: None }
    }

    pub fn warn(check: &str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Condition::Warn, says: says.into(), advice: Some(advice.into()) }
    }

    pub fn fail(check: &str, says: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { check: check.into(), verdict: Condition::Fail, says: says.into(), advice: Some(advice.into()) }
    }
}

/// One line each; what to do follows its finding.
pub fn as_text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    findings
        .iter()
        .map(|Finding { check, verdict, says, advice }| {
            let verdict = match verdict {
                Condition::Ok => "ok",
                Condition::Warn => "warn",
                Condition::Fail => "fail",
            };
            let advice = advice.as_ref().map_or(String::new(), |advice| format!(": {advice}"));
            format!("{verdict:<4}  {check:<width$}  {says}{advice}\n")
        })
        .collect()
}

pub fn has_failure(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.verdict == Condition::Fail)
}
