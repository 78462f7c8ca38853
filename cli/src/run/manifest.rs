//! What a folder says: the program's own Workload, written and taken away, and the Services that
//! the program finds by their names.

use std::fmt::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use weft_control_plane::model::{Change, Object};
use weft_control_plane::sources::folder::Folder;

/// `--port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub name: Option<String>,
    pub port: u16,
}

impl std::str::FromStr for Port {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let (name, port) = match given.split_once(':') {
            Some((name, port)) => (Some(name), port),
            None => (None, given),
        };
        let is_name = |name: &str| {
            let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            !name.is_empty() && name.len() <= 15 && name.chars().all(allowed)
        };
        match port.parse() {
            Ok(port) if port != 0 && name.is_none_or(is_name) => Ok(Self {
                name: name.map(str::to_owned),
                port,
            }),
            _ => Err("write a port such as 8080, or with a name, http:8080".to_owned()),
        }
    }
}

/// `--label`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    pub key: String,
    pub value: String,
}

impl std::str::FromStr for Label {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, Self::Err> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
        match given.split_once('=') {
            Some((key, value))
                if !key.is_empty() && key.chars().chain(value.chars()).all(allowed) =>
            {
                Ok(Self {
                    key: key.to_owned(),
                    value: value.to_owned(),
                })
            }
            _ => Err("write a label as KEY=VALUE, such as app=cart".to_owned()),
        }
    }
}

/// What is told of the program.
#[derive(Debug)]
pub struct Workload<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub service_account: &'a str,
    pub labels: &'a [Label],
    pub ports: &'a [Port],
    pub addresses: &'a [IpAddr],
}

impl Workload<'_> {
    /// As YAML. Strings are quoted, so that none is read as something else.
    fn yaml(&self) -> String {
        let mut out = String::new();
        let quoted = |text: &str| serde_json::Value::from(text).to_string();
        let _ = writeln!(
            out,
            "# Written by `weft run`; taken away when the program ends.\n\
             apiVersion: policy.weft.dev/v1alpha1\n\
             kind: Workload\n\
             metadata:\n  name: {}\n  namespace: {}\n  labels:",
            quoted(self.name),
            quoted(self.namespace)
        );
        if !self.labels.iter().any(|label| label.key == "app") {
            let _ = writeln!(out, "    app: {}", quoted(self.name));
        }
        for Label { key, value } in self.labels {
            let _ = writeln!(out, "    {}: {}", quoted(key), quoted(value));
        }
        let addresses: Vec<String> = self
            .addresses
            .iter()
            .map(|a| quoted(&a.to_string()))
            .collect();
        let _ = writeln!(
            out,
            "spec:\n  addresses: [{}]\n  serviceAccount: {}",
            addresses.join(", "),
            quoted(self.service_account)
        );
        if !self.ports.is_empty() {
            out.push_str("  ports:\n");
        }
        for Port { name, port } in self.ports {
            let _ = writeln!(out, "    - port: {port}");
            if let Some(name) = name {
                let _ = writeln!(out, "      name: {}", quoted(name));
            }
        }
        out
    }
}

/// A manifest in a folder, for as long as this value lives.
#[derive(Debug)]
pub struct Manifest {
    path: PathBuf,
}

impl Manifest {
    /// Writes it.
    pub fn write(folder: &Path, workload: &Workload<'_>) -> anyhow::Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
        for part in [workload.name, workload.namespace] {
            ensure!(
                !part.is_empty() && part.chars().all(plain),
                "'{part}' is not a name: letters, digits, dashes and dots"
            );
        }
        let path = folder.join(format!(
            "weft-run.{}.{}.yaml",
            workload.namespace, workload.name
        ));
        // In one step, so that nobody reads half of it.
        let new = path.with_extension("new");
        std::fs::write(&new, workload.yaml())
            .and_then(|()| std::fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for Manifest {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            eprintln!(
                "weft: {} could not be taken away ({e}); remove it, or others go on calling the program",
                self.path.display()
            );
        }
    }
}

/// Addresses and names of a folder's Services, as seen from `namespace`.
pub fn services(folder: &Path, namespace: &str) -> anyhow::Result<Vec<(IpAddr, String)>> {
    let (changes, _) = Folder::open(folder)
        .with_context(|| format!("{} cannot be read", folder.display()))?
        .load();
    let mut names = Vec::new();
    for change in changes {
        let Change::Set(object) = change else {
            continue;
        };
        let Object::Service(service) = *object else {
            continue;
        };
        let own = &service.name;
        let mut known = vec![
            format!("{}.{}", own.name, own.namespace),
            format!("{}.{}.svc", own.name, own.namespace),
            format!("{}.{}.svc.cluster.local", own.name, own.namespace),
        ];
        if own.namespace == namespace {
            known.insert(0, own.name.clone());
        }
        for address in &service.vips {
            names.extend(known.iter().map(|name| (*address, name.clone())));
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use weft_control_plane::check::check_folder;

    use super::*;

    #[test]
    fn flags() {
        let port = |name: Option<&str>, port| Port {
            name: name.map(str::to_owned),
            port,
        };
        assert_eq!("8080".parse(), Ok(port(None, 8080)));
        assert_eq!("http:8080".parse(), Ok(port(Some("http"), 8080)));
        for bad in ["", "0", "http", ":80", "A:80", "http:99999", "1:2:3"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
        assert!("app=cart".parse::<Label>().is_ok());
        for bad in ["app", "=x", "a=b c", "a=\"b"] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_manifest_is_right_and_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        let workload = Workload {
            name: "cart",
            namespace: "shop",
            service_account: "true",
            labels: &["version=1".parse().unwrap()],
            ports: &["http:8080".parse().unwrap(), "9000".parse().unwrap()],
            addresses: &["10.210.0.2".parse().unwrap(), "fd77::2".parse().unwrap()],
        };
        let manifest = Manifest::write(folder.path(), &workload).unwrap();
        let report = check_folder(folder.path()).unwrap();
        assert_eq!((report.objects, report.findings), (1, vec![]));
        drop(manifest);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let outside = Workload {
            name: "../cart",
            ..workload
        };
        assert!(Manifest::write(folder.path(), &outside).is_err());
    }

    #[test]
    fn services_are_found_by_their_names() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/demo");
        let names = services(folder.as_ref(), "shop").unwrap();
        let address = |name: &str| {
            names
                .iter()
                .find(|(_, n)| n == name)
                .map(|(a, _)| a.to_string())
        };
        assert_eq!(address("catalog").as_deref(), Some("10.96.0.20"));
        assert_eq!(
            address("catalog.shop.svc.cluster.local").as_deref(),
            Some("10.96.0.20")
        );
        let elsewhere = services(folder.as_ref(), "default").unwrap();
        assert!(!elsewhere.iter().any(|(_, n)| n == "catalog"));
    }
}
