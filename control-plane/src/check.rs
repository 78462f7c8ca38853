//! `weft check`: what is wrong with manifests, in a folder or not, without a running control plane.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::compile::{Problem, problems};
use crate::finding::{Finding, Severity};
use crate::model::{Change, Dirty, World};
use crate::sources::Locate;
use crate::sources::folder::{Folder, FolderError, Text};

/// Everything found in a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Objects that are used.
    pub objects: usize,
    /// By file and line.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether anything is not honoured as it is written.
    pub fn has_errors(&self) -> bool {
        self.count(Severity::Error) > 0
    }

    /// Findings of a severity.
    pub fn count(&self, severity: Severity) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.severity == severity)
            .count()
    }
}

impl fmt::Display for Report {
    /// A line for each finding, then a summary.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            writeln!(f, "{finding}")?;
        }
        write!(
            f,
            "{} objects, {} errors, {} warnings",
            self.objects,
            self.count(Severity::Error),
            self.count(Severity::Warning)
        )
    }
}

/// Reads a folder as the control plane would and says what is wrong.
///
/// # Errors
/// The folder cannot be read at all.
pub fn check_folder(path: &Path) -> Result<Report, FolderError> {
    let mut folder = Folder::open(path)?;
    let (changes, findings) = folder.load();
    Ok(report(changes, findings, &folder.locator()))
}

/// The same of manifests that are in no file, under this name in what is said of them.
pub fn check_text(name: &Path, text: &str) -> Report {
    let (text, changes, findings) = Text::read(name, text);
    report(changes, findings, &text)
}

fn report(changes: Vec<Change>, mut findings: Vec<Finding>, locator: &dyn Locate) -> Report {
    let objects = changes.len();
    let mut world = World::default();
    for change in changes {
        world.apply(change, &mut Dirty::default());
    }
    let problems = problems(&world).into_iter();
    findings.extend(problems.map(|problem| located(problem, locator)));
    findings.sort();
    Report { objects, findings }
}

/// Says where a problem is.
pub(crate) fn located(problem: Problem, locator: &dyn Locate) -> Finding {
    let place = locator.locate(&problem.object, &problem.path);
    let (file, line) = match place {
        Some((file, line)) => (Some(file), line),
        None => (None, None),
    };
    Finding {
        file,
        line,
        severity: problem.severity,
        object: Some(problem.object.to_string()),
        message: problem.message,
        help: problem.help,
    }
}
