//! What the kernel says of this process (`/proc/self`), under the names Prometheus clients use.

use std::fs;

/// Ticks of `/proc/PID/stat` per second: 100 on every Linux that user space sees (`USER_HZ`).
const USER_HZ: f64 = 100.0;

/// One reading.
#[derive(Debug, Clone, PartialEq)]
pub struct ProcessStats {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub open_fds: u64,
    /// `None`: unlimited.
    pub max_fds: Option<u64>,
    pub threads: u64,
    /// Seconds since the Unix epoch.
    pub start_seconds: f64,
}

/// Reads it now; `None` where there is no `/proc`.
pub fn read() -> Option<ProcessStats> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    // The directory's own descriptor is one of those listed.
    let open_fds = (fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1);
    parse(&stat, &status, &boot, &limits, open_fds)
}

fn parse(
    stat: &str,
    status: &str,
    boot: &str,
    limits: &str,
    open_fds: u64,
) -> Option<ProcessStats> {
    // The name stands in parentheses and may contain anything; field 3 comes after the last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<f64>().ok();
    let boot_seconds = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse::<f64>()
        .ok()?;
    let resident_kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())?;
    let max_fds = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    Some(ProcessStats {
        cpu_seconds: (field(14)? + field(15)?) / USER_HZ,
        resident_bytes: resident_kib * 1024,
        virtual_bytes: field(23)? as u64,
        open_fds,
        max_fds,
        threads: field(20)? as u64,
        start_seconds: boot_seconds + field(22)? / USER_HZ,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_this_process() {
        let stats = read().unwrap();
        assert!(stats.resident_bytes > 100_000 && stats.virtual_bytes >= stats.resident_bytes);
        assert!(stats.open_fds >= 3 && stats.threads >= 1);
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let age = now.as_secs_f64() - stats.start_seconds;
        assert!((-5.0..3_600.0 * 24.0).contains(&age), "{age}");
    }

    #[test]
    fn a_name_with_parentheses_is_skipped() {
        let stat = "7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 250 150 0 0 20 0 3 0 4200 8192 2 0";
        let stats = parse(
            stat,
            "VmRSS:\t   12 kB\n",
            "cpu 1\nbtime 1000\n",
            "Max open files  unlimited unlimited files\n",
            4,
        )
        .unwrap();
        assert_eq!(
            stats,
            ProcessStats {
                cpu_seconds: 4.0,
                resident_bytes: 12 * 1024,
                virtual_bytes: 8192,
                open_fds: 4,
                max_fds: None,
                threads: 3,
                start_seconds: 1042.0,
            }
        );
    }
}
