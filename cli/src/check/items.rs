//! What a check of a cluster has found, line by line.

use std::fmt::Write;

use serde::Serialize;

use crate::output::{Paint, Tone};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Ok,
    Warning,
    Error,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Item {
    pub level: Level,
    /// What was looked at.
    pub what: String,
    /// What was found.
    pub message: String,
    /// What to do about it; empty when all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub help: String,
}

/// All lines, in the order they were found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Items(pub Vec<Item>);

/// The document of `--output json`.
#[derive(Serialize)]
pub struct Document<'a> {
    pub errors: usize,
    pub warnings: usize,
    pub checks: &'a [Item],
}

impl Items {
    pub fn ok(&mut self, what: &str, message: impl Into<String>) {
        self.add(Level::Ok, what, message, "");
    }

    pub fn warning(&mut self, what: &str, message: impl Into<String>, help: impl Into<String>) {
        self.add(Level::Warning, what, message, help);
    }

    pub fn error(&mut self, what: &str, message: impl Into<String>, help: impl Into<String>) {
        self.add(Level::Error, what, message, help);
    }

    fn add(
        &mut self,
        level: Level,
        what: &str,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        self.0.push(Item {
            level,
            what: what.to_owned(),
            message: message.into(),
            help: help.into(),
        });
    }

    /// It could not be found out.
    pub fn unseen(&mut self, what: &str, error: &dyn std::fmt::Display) {
        self.warning(
            what,
            format!("cannot be looked at: {error}"),
            "ask for the right to read it, or have somebody check who has it",
        );
    }

    pub fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|item| item.level == level).count()
    }

    pub fn document(&self) -> Document<'_> {
        Document {
            errors: self.count(Level::Error),
            warnings: self.count(Level::Warning),
            checks: &self.0,
        }
    }

    pub fn render(&self, paint: Paint) -> String {
        let mut out = String::new();
        let width = self.0.iter().map(|item| item.what.chars().count()).max();
        let width = width.unwrap_or_default();
        for item in &self.0 {
            let (tone, level) = match item.level {
                Level::Ok => (Tone::Good, "ok"),
                Level::Warning => (Tone::Warning, "warning"),
                Level::Error => (Tone::Bad, "error"),
            };
            let pad = 7 - level.len();
            let _ = writeln!(
                out,
                "{}{:pad$}  {:width$}  {}",
                paint.paint(tone, level),
                "",
                item.what,
                item.message
            );
            if !item.help.is_empty() {
                let _ = writeln!(
                    out,
                    "         {} {}",
                    paint.paint(Tone::Dim, "do:"),
                    item.help
                );
            }
        }
        let number = |n: usize, of: &str| format!("{n} {of}{}", if n == 1 { "" } else { "s" });
        let (errors, warnings) = (self.count(Level::Error), self.count(Level::Warning));
        let tone = match (errors, warnings) {
            (0, 0) => Tone::Good,
            (0, _) => Tone::Warning,
            _ => Tone::Bad,
        };
        let summary = format!(
            "{} ok, {}, {}.",
            self.count(Level::Ok),
            number(warnings, "warning"),
            number(errors, "error")
        );
        let _ = writeln!(out, "{}", paint.paint(tone, &summary));
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_and_what_to_do() {
        let mut items = Items::default();
        items.ok("control plane", "2 of 2 replicas are ready");
        items.warning("pods", "shop/old-1 has no proxy", "restart deploy/old");
        items.error("webhook", "its certificate has expired", "see its log");
        assert_eq!(
            items.render(Paint::NEVER),
            "\
ok       control plane  2 of 2 replicas are ready
warning  pods           shop/old-1 has no proxy
         do: restart deploy/old
error    webhook        its certificate has expired
         do: see its log
1 ok, 1 warning, 1 error.
"
        );
    }
}
