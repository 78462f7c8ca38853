//! The manifests of `examples/demo`, built in so that the binary alone is enough.

use std::path::Path;

use anyhow::Context;

const FILES: [(&str, &str); 5] = [
    (
        "services.yaml",
        include_str!("../../../examples/demo/services.yaml"),
    ),
    (
        "workloads.yaml",
        include_str!("../../../examples/demo/workloads.yaml"),
    ),
    (
        "traffic.yaml",
        include_str!("../../../examples/demo/traffic.yaml"),
    ),
    (
        "mtls.yaml",
        include_str!("../../../examples/demo/mtls.yaml"),
    ),
    (
        "telemetry.yaml",
        include_str!("../../../examples/demo/telemetry.yaml"),
    ),
];

/// Writes them into `folder`, which is made if need be.
pub fn write(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for (name, contents) in FILES {
        let path = folder.join(name);
        std::fs::write(&path, contents)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::topology::{MEMBERS, SERVICES};

    #[test]
    fn the_manifests_and_the_topology_say_the_same() {
        let all: String = FILES.iter().map(|(_, text)| *text).collect();
        for member in &MEMBERS {
            let object = all
                .split("---\n")
                .find(|o| {
                    o.contains("kind: Workload") && o.contains(&format!("name: {}\n", member.name))
                })
                .unwrap_or_else(|| panic!("{} is not in the manifests", member.name));
            for line in [
                format!("addresses: [\"{}\"]", member.address),
                format!("serviceAccount: {}", member.app),
                format!("app: {}\n", member.app),
            ] {
                assert!(object.contains(&line), "{}: no '{line}'", member.name);
            }
            if let Some(port) = member.port {
                assert!(
                    object.contains(&format!("port: {port}\n")),
                    "{}",
                    member.name
                );
            }
        }
        assert_eq!(all.matches("kind: Workload").count(), MEMBERS.len());
        for (name, address) in SERVICES {
            let line = format!("name: {name}\n  namespace: shop\nspec:\n  clusterIP: {address}\n");
            assert!(all.contains(&line), "no {line}");
        }
    }

    #[test]
    fn the_policy_that_the_script_changes_is_there_once() {
        let mtls = FILES
            .iter()
            .find(|(name, _)| *name == "mtls.yaml")
            .unwrap()
            .1;
        assert_eq!(mtls.matches("mode: PERMISSIVE").count(), 1);
    }
}
