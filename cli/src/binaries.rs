//! Where the other programs of Weft are: beside this one, else on PATH.

use std::path::{Path, PathBuf};

use anyhow::Context;

pub const PROXY: &str = "weft-proxy";
pub const CONTROL_PLANE: &str = "weft-control-plane";

/// The path of `program`.
pub fn find(program: &str) -> anyhow::Result<PathBuf> {
    let own = own()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = own.parent().map(Path::to_path_buf);
    find_in(
        program,
        beside.into_iter().chain(std::env::split_paths(&path)),
    )
    .with_context(|| {
        format!(
            "{program} is neither beside {} nor on PATH. In a clone, `cargo build --release` makes \
             all three programs; an installation has them in one folder",
            own.display()
        )
    })
}

/// The path of the running program.
pub fn own() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find out where this program is")
}

fn find_in(program: &str, folders: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    folders.map(|folder| folder.join(program)).find(|path| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_first_that_can_be_run() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let folders = || [one.path().to_owned(), two.path().to_owned()].into_iter();
        assert_eq!(find_in(PROXY, folders()), None);
        // Not executable: not it.
        std::fs::write(one.path().join(PROXY), "").unwrap();
        let right = two.path().join(PROXY);
        std::fs::write(&right, "").unwrap();
        std::fs::set_permissions(&right, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_in(PROXY, folders()), Some(right));
    }
}
