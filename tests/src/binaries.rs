//! The programs under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Where they are.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub proxy: PathBuf,
    pub control_plane: PathBuf,
    /// `weft`.
    pub cli: PathBuf,
}

/// The programs, found once. Called first in `main`, outside the namespaces.
pub fn binaries() -> anyhow::Result<&'static Binaries> {
    static FOUND: OnceLock<Binaries> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found);
    }
    let found = Binaries::find()?;
    Ok(FOUND.get_or_init(|| found))
}

impl Binaries {
    /// Those of the build that this test belongs to. Cargo builds another package's programs for
    /// a test only when they are asked for, so they are asked for: that takes a moment when they
    /// are up to date. `WEFT_TEST_BINARIES` names a folder to take them from instead.
    fn find() -> anyhow::Result<Self> {
        if let Some(folder) = std::env::var_os("WEFT_TEST_BINARIES") {
            return Self::in_folder(Path::new(&folder));
        }
        // target/<profile>/deps/e2e-<hash>
        let executable = std::env::current_exe()?;
        let folder = executable
            .ancestors()
            .nth(2)
            .ok_or_else(|| anyhow::anyhow!("{} is in no build folder", executable.display()))?;
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            // The whole workspace, as `cargo build` makes it: with fewer packages chosen, their
            // dependencies would have other features, and all be built once more.
            .args(["build", "--quiet", "--workspace", "--bins"])
            .arg("--manifest-path")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
        if folder.file_name().is_some_and(|name| name == "release") {
            command.arg("--release");
        }
        if let Some(target) = folder.parent() {
            command.arg("--target-dir").arg(target);
        }
        let status = command.status()?;
        anyhow::ensure!(status.success(), "the programs do not build");
        Self::in_folder(folder)
    }

    fn in_folder(folder: &Path) -> anyhow::Result<Self> {
        let find = |name: &str| {
            let path = folder.join(name);
            anyhow::ensure!(path.is_file(), "{} is missing", path.display());
            Ok(path)
        };
        Ok(Self {
            proxy: find("weft-proxy")?,
            control_plane: find("weft-control-plane")?,
            cli: find("weft")?,
        })
    }
}
