//! What the files of a folder say together: which object stands where, and which of two wins.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::manifest::Parsed;
use crate::finding::{Finding, Severity};
use crate::model::{Change, Object, ObjectRef};

/// All files, with the objects last read from each.
#[derive(Debug, Default)]
pub struct Files {
    files: BTreeMap<PathBuf, File>,
    /// Who says what an object is. The first wins: by path, then by place in the file.
    claims: BTreeMap<ObjectRef, BTreeMap<(PathBuf, u32), Object>>,
}

#[derive(Debug, Default)]
struct File {
    /// Objects with the lines of their documents.
    objects: Vec<(ObjectRef, u32)>,
    findings: Vec<Finding>,
}

/// What came out of reading a file.
pub type Outcome = Result<(Vec<Parsed>, Vec<Finding>), Vec<Finding>>;

impl Files {
    /// Takes what a file says now. A file that cannot be used keeps the objects it had.
    pub fn set(&mut self, path: &Path, outcome: Outcome) -> Vec<Change> {
        let file = self.files.entry(path.to_owned()).or_default();
        let (parsed, findings) = match outcome {
            Ok(read) => read,
            Err(findings) => {
                file.findings = findings;
                return Vec::new();
            }
        };
        file.findings = findings;
        let old = std::mem::take(&mut file.objects);
        file.objects = parsed
            .iter()
            .map(|parsed| (parsed.object.reference(), parsed.line))
            .collect();
        let touched: BTreeSet<ObjectRef> = old
            .iter()
            .chain(&file.objects)
            .map(|(reference, _)| reference.clone())
            .collect();
        let before = self.winners(&touched);
        for (reference, line) in &old {
            self.unclaim(reference, path, *line);
        }
        for Parsed { object, line } in parsed {
            self.claims
                .entry(object.reference())
                .or_default()
                .insert((path.to_owned(), line), object);
        }
        self.changes(&before)
    }

    /// The file is gone.
    pub fn remove(&mut self, path: &Path) -> Vec<Change> {
        let changes = self.set(path, Ok((Vec::new(), Vec::new())));
        self.files.remove(path);
        changes
    }

    /// Whether objects that the file had would be lost by what it says now.
    pub fn loses(&self, path: &Path, outcome: &Outcome) -> bool {
        let Some(file) = self.files.get(path) else {
            return false;
        };
        match outcome {
            Err(_) => false,
            Ok((parsed, _)) => file.objects.iter().any(|(old, _)| {
                !parsed
                    .iter()
                    .any(|parsed| parsed.object.reference() == *old)
            }),
        }
    }

    /// Files known, in order.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.files.keys()
    }

    /// Files under a folder (or the file itself).
    pub fn under(&self, folder: &Path) -> Vec<PathBuf> {
        self.files
            .keys()
            .filter(|path| path.starts_with(folder))
            .cloned()
            .collect()
    }

    /// What is wrong with the files: what they cannot be read for, and what is there twice.
    pub fn findings(&self) -> Vec<Finding> {
        let mut found: Vec<Finding> = self
            .files
            .values()
            .flat_map(|file| file.findings.iter().cloned())
            .collect();
        for (reference, claims) in &self.claims {
            let mut places = claims.keys();
            let Some((winner, winner_line)) = places.next() else {
                continue;
            };
            for (file, line) in places {
                found.push(Finding {
                    file: Some(file.clone()),
                    line: Some(*line),
                    severity: Severity::Error,
                    object: Some(reference.to_string()),
                    message: format!(
                        "the same object is also at {}:{winner_line}, which is used; this one is not",
                        winner.display()
                    ),
                    help: "remove or rename one of the two".to_owned(),
                });
            }
        }
        found.sort();
        found
    }

    /// Where an object that is used is written: the file and its document's line.
    pub fn place(&self, object: &ObjectRef) -> Option<(&Path, u32)> {
        let ((path, line), _) = self.claims.get(object)?.first_key_value()?;
        Some((path, *line))
    }

    fn unclaim(&mut self, reference: &ObjectRef, path: &Path, line: u32) {
        if let Some(claims) = self.claims.get_mut(reference) {
            claims.remove(&(path.to_owned(), line));
            if claims.is_empty() {
                self.claims.remove(reference);
            }
        }
    }

    fn winners(&self, touched: &BTreeSet<ObjectRef>) -> BTreeMap<ObjectRef, Option<Object>> {
        touched
            .iter()
            .map(|reference| (reference.clone(), self.winner(reference).cloned()))
            .collect()
    }

    fn winner(&self, reference: &ObjectRef) -> Option<&Object> {
        let (_, object) = self.claims.get(reference)?.first_key_value()?;
        Some(object)
    }

    fn changes(&self, before: &BTreeMap<ObjectRef, Option<Object>>) -> Vec<Change> {
        before
            .iter()
            .filter(|(reference, old)| old.as_ref() != self.winner(reference))
            .map(|(reference, _)| match self.winner(reference) {
                Some(object) => Change::Set(Box::new(object.clone())),
                None => Change::Remove(reference.clone()),
            })
            .collect()
    }
}
