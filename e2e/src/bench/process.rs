//! Measures a process by what the kernel says of it.

use std::fs;

use super::failed;
use crate::cluster::Result;

const KIB_PER_MIB: f64 = 1024.0;
/// The kernel's ticks in a second.
const TICKS: f64 = 100.0;

/// A process by its id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process(pub(crate) i32);

impl Process {
    /// Returns the CPU time that it has used, in seconds.
    pub(crate) fn cpu(self) -> Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0));
        let stat = stat.map_err(|error| failed("CPU time", &error))?;
        // The name in parentheses may contain spaces; after it, user and system time are the
        // twelfth and thirteenth field.
        let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let times: Vec<f64> = fields
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse().ok())
            .collect();
        match times[..] {
            [user, system] => Ok((user + system) / TICKS),
            _ => Err(failed("CPU time", &stat)),
        }
    }

    /// Returns its resident memory in MiB.
    pub(crate) fn rss(self) -> Result<f64> {
        self.memory("VmRSS:")
    }

    /// Returns its largest resident memory in MiB since [`Process::forget_peak`].
    pub(crate) fn peak(self) -> Result<f64> {
        self.memory("VmHWM:")
    }

    /// Makes the kernel forget the largest resident memory (proc_pid_clear_refs(5)).
    pub(crate) fn forget_peak(self) -> Result<()> {
        let forgotten = fs::write(format!("/proc/{}/clear_refs", self.0), "5");
        forgotten.map_err(|error| failed("peak memory", &error))
    }

    /// Returns the number of its open descriptors.
    pub(crate) fn descriptors(self) -> Result<f64> {
        self.count("fd")
    }

    /// Returns the number of its threads.
    pub(crate) fn threads(self) -> Result<f64> {
        self.count("task")
    }

    fn count(self, directory: &str) -> Result<f64> {
        let entries = fs::read_dir(format!("/proc/{}/{directory}", self.0));
        let entries = entries.map_err(|error| failed(directory, &error))?;
        Ok(f64::from(
            u32::try_from(entries.count()).unwrap_or(u32::MAX),
        ))
    }

    fn memory(self, field: &str) -> Result<f64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0));
        let status = status.map_err(|error| failed("memory", &error))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
        kib.map(|kib| kib / KIB_PER_MIB)
            .ok_or_else(|| failed("memory", &format!("no {field}")))
    }
}
