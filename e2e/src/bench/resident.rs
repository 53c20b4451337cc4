//! Says what a process's resident memory is for, by what the kernel says of its mappings.

use std::collections::BTreeSet;
use std::fs;

use super::{Process, failed};
use crate::cluster::Result;

/// The stack that the kernel has for each thread, in KiB (`THREAD_SIZE` on x86-64 and arm64).
const KERNEL_STACK: f64 = 16.0;

/// Resident memory by cause, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Resident {
    /// Pages of the executable and of libraries that can be executed.
    pub(crate) code: f64,
    /// Pages of them that can only be read: tables, strings, what the loader has relocated.
    pub(crate) constants: f64,
    /// Pages of them that can be written.
    pub(crate) variables: f64,
    /// Memory that was allocated: content under way, buffers of connections, what is remembered.
    pub(crate) heap: f64,
    pub(crate) stacks: f64,
    /// What the kernel maps into each process.
    pub(crate) other: f64,
    /// Page tables and the stacks of threads in the kernel, which are not resident memory.
    pub(crate) kernel: f64,
}

impl Resident {
    /// Returns the resident memory, which is all but what the kernel has for the process.
    pub(crate) fn sum(&self) -> f64 {
        self.code + self.constants + self.variables + self.heap + self.stacks + self.other
    }
}

impl Process {
    /// Returns the resident memory by cause.
    ///
    /// # Errors
    /// When the process is gone, or this one may not trace it.
    pub(crate) fn resident(self) -> Result<Resident> {
        let read = |name: &str| {
            let path = format!("/proc/{}/{name}", self.0);
            fs::read_to_string(&path).map_err(|error| failed(&path, &error))
        };
        let mut resident = by_cause(&read("smaps")?, &self.stack_pointers()?);
        let status = read("status")?;
        let tables = status.lines().find_map(|line| kib(line, "VmPTE:"));
        resident.kernel = tables.unwrap_or_default() + KERNEL_STACK * self.threads()?;
        Ok(resident)
    }

    /// Returns the addresses in the stacks of all threads but those that run now.
    fn stack_pointers(self) -> Result<BTreeSet<u64>> {
        let path = format!("/proc/{}/task", self.0);
        let threads = fs::read_dir(&path).map_err(|error| failed(&path, &error))?;
        let calls = threads.flatten().filter_map(|thread| {
            // The last but one field is the stack pointer (proc_pid_syscall(5)).
            let call = fs::read_to_string(thread.path().join("syscall")).ok()?;
            let pointer = call.split_whitespace().rev().nth(1)?;
            u64::from_str_radix(pointer.strip_prefix("0x")?, 16).ok()
        });
        Ok(calls.collect())
    }
}

/// Sorts the mappings that `/proc/PID/smaps` lists.
fn by_cause(smaps: &str, stack_pointers: &BTreeSet<u64>) -> Resident {
    let mut resident = Resident::default();
    let (mut cause, mut end_of_variables) = (Cause::Other, None);
    for line in smaps.lines() {
        if let Some(mapping) = Mapping::parse(line) {
            cause = mapping.cause(stack_pointers, end_of_variables);
            end_of_variables = (cause == Cause::Variables).then_some(mapping.end);
        } else if let Some(kib) = kib(line, "Rss:") {
            *match cause {
                Cause::Code => &mut resident.code,
                Cause::Constants => &mut resident.constants,
                Cause::Variables => &mut resident.variables,
                Cause::Heap => &mut resident.heap,
                Cause::Stack => &mut resident.stacks,
                Cause::Other => &mut resident.other,
            } += kib;
        }
    }
    resident
}

#[derive(Clone, Copy, PartialEq)]
enum Cause {
    Code,
    Constants,
    Variables,
    Heap,
    Stack,
    Other,
}

/// The first line of a mapping.
struct Mapping<'a> {
    begin: u64,
    end: u64,
    flags: &'a str,
    /// The path of a file, a name in brackets, or nothing.
    name: &'a str,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (begin, end) = fields.next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            begin: hex(begin)?,
            end: hex(end)?,
            flags: fields.next()?,
            name: fields.nth(3).unwrap_or_default(),
        })
    }

    fn cause(&self, stack_pointers: &BTreeSet<u64>, end_of_variables: Option<u64>) -> Cause {
        let is_stack = stack_pointers.range(self.begin..self.end).next().is_some();
        match self.name {
            "[stack]" => Cause::Stack,
            "[heap]" => Cause::Heap,
            path if path.starts_with('/') && self.flags.contains('x') => Cause::Code,
            path if path.starts_with('/') && self.flags.contains('w') => Cause::Variables,
            path if path.starts_with('/') => Cause::Constants,
            name if !name.is_empty() && !name.starts_with("[anon") => Cause::Other,
            // Variables that begin as zero follow the others.
            _ if end_of_variables == Some(self.begin) => Cause::Variables,
            _ if is_stack => Cause::Stack,
            _ => Cause::Heap,
        }
    }
}

/// Returns the value of a line `FIELD  VALUE kB`.
fn kib(line: &str, field: &str) -> Option<f64> {
    let value = line.strip_prefix(field)?.trim().strip_suffix(" kB")?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_sorted_by_what_they_are_for() {
        let smaps = "\
5000-6000 r--p 00000000 fe:01 1 /usr/bin/driver\nSize: 4 kB\nRss:                1 kB
6000-7000 r-xp 00001000 fe:01 1 /usr/bin/driver\nRss:                2 kB
7000-8000 rw-p 00002000 fe:01 1 /usr/bin/driver\nRss:                4 kB
8000-9000 rw-p 00000000 00:00 0 \nRss:                8 kB
a000-b000 rw-p 00000000 00:00 0                  [heap]\nRss:               16 kB
c000-d000 rw-p 00000000 00:00 0 \nRss:               32 kB
e000-f000 rw-p 00000000 00:00 0 \nRss:               64 kB
f0000-f1000 rw-p 00000000 00:00 0                [stack]\nRss:              128 kB
f2000-f3000 r-xp 00000000 00:00 0                [vdso]\nRss:              256 kB
";
        let resident = by_cause(smaps, &BTreeSet::from([0xe800]));
        let expected = Resident {
            code: 2.0,
            constants: 1.0,
            variables: 4.0 + 8.0,
            heap: 16.0 + 32.0,
            stacks: 64.0 + 128.0,
            other: 256.0,
            kernel: 0.0,
        };
        assert_eq!(resident, expected);
    }

    /// The sum is the resident memory that the kernel itself counts, and this thread has a stack.
    #[test]
    fn nothing_is_left_out() {
        let own = Process(std::process::id().cast_signed());
        // Other tests of this process use memory between the two readings.
        let readings = std::iter::repeat_with(|| {
            let (resident, rss) = (own.resident().unwrap(), own.rss().unwrap() * 1024.0);
            std::thread::sleep(std::time::Duration::from_millis(100));
            (resident, rss)
        });
        let mut readings = readings.take(100);
        let alike =
            |(resident, rss): &(Resident, f64)| (0.8..1.25).contains(&(resident.sum() / rss));
        let Some((resident, _)) = readings.find(alike) else {
            panic!("the parts never had the sum that the kernel counts");
        };
        assert!(resident.code > 0.0 && resident.heap > 0.0 && resident.stacks > 0.0);
        assert!(resident.kernel > KERNEL_STACK, "{resident:?}");
    }
}
