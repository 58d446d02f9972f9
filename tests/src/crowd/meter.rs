//! What a process takes: processor time and memory, of /proc.

use std::fs;

use rustix::{param::clock_ticks_per_second, process::Pid};

#[derive(Clone, Copy, Debug)]
pub(super) struct Meter(Pid);

impl Meter {
    pub fn of(process: Pid) -> Self {
        Self(process)
    }

    /// User and system time so far.
    pub fn cpu_seconds(self) -> f64 {
        let stat = self.read("stat");
        // After the program's name, which may have spaces: utime is the 14th field of all, stime the 15th.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 =
            after_name.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum();
        ticks as f64 / clock_ticks_per_second() as f64
    }

    /// The most memory that it ever held, MiB.
    pub fn peak_mb(self) -> f64 {
        let status = self.read("status");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().unwrap_or(f64::NAN);
        kib / 1024.0
    }

    fn read(self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.0.as_raw_nonzero());
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }
}
