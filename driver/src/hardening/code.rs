//! Gives back the memory that code takes which has not run lately.
//!
//! The kernel maps the pages around each piece of code that runs, and keeps them mapped: most of what the
//! driver starts with is code that ran once. These pages are copies of a file, so that nothing is lost.

#![allow(unsafe_code)]

use std::{
    ffi::{c_int, c_void},
    ptr,
};

/// Unmaps the pages of the program and of its libraries that cannot be written, which have no secrets.
/// What is still used is mapped again at its next use. Must be called while memory is unlocked.
pub fn unmap_code() {
    // SAFETY: the callback gets what dl_iterate_phdr(3) promises, and no data of its own.
    unsafe { libc::dl_iterate_phdr(Some(unmap_of), ptr::null_mut()) };
}

unsafe extern "C" fn unmap_of(object: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the object is valid during the callback, and so are its program headers.
    let (base, segments) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        if object.dlpi_phdr.is_null() {
            return 0;
        }
        let segments = std::slice::from_raw_parts(object.dlpi_phdr, count);
        (object.dlpi_addr as usize, segments)
    };
    // SAFETY: sysconf(3) takes a number.
    let Ok(page) = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }) else {
        return 0;
    };
    for segment in segments {
        // Segments that the loader has written to, to relocate them, have this flag as well.
        if segment.p_type != libc::PT_LOAD || segment.p_flags & libc::PF_W != 0 {
            continue;
        }
        let (Ok(at), Ok(size)) = (
            usize::try_from(segment.p_vaddr),
            usize::try_from(segment.p_memsz),
        ) else {
            continue;
        };
        let begin = (base + at) / page * page;
        let length = base + at + size - begin;
        // SAFETY: the pages are those of a file, and the kernel maps them again when they are used.
        // An error changes nothing.
        unsafe { libc::madvise(begin as *mut c_void, length, libc::MADV_DONTNEED) };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::alone::{Own, alone};

    /// Code, constants and variables are what they were.
    #[test]
    fn the_program_goes_on() {
        static TEXT: [&str; 3] = ["constants", "that are", "relocated"];
        let before = TEXT.concat();
        for _ in 0..3 {
            unmap_code();
            assert_eq!(TEXT.concat(), before);
            assert!(
                std::thread::spawn(|| "runs".len())
                    .join()
                    .is_ok_and(|length| length == 4)
            );
        }
    }

    /// The resident memory of code becomes smaller, at least after all of it was read. Other tests run
    /// other code meanwhile.
    #[test]
    fn less_of_it_is_resident() {
        alone(Own::Process, || {
            for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
                let mut fields = line.split_ascii_whitespace();
                let (range, flags) = (fields.next().unwrap(), fields.next().unwrap());
                if flags != "r-xp" || !line.contains('/') {
                    continue;
                }
                let (begin, end) = range.split_once('-').unwrap();
                let of_hex = |text| usize::from_str_radix(text, 16).unwrap();
                for page in (of_hex(begin)..of_hex(end)).step_by(4096) {
                    // SAFETY: the page is mapped and can be read.
                    unsafe { ptr::read_volatile(page as *const u8) };
                }
            }
            let before = pages_of_files();
            unmap_code();
            let after = pages_of_files();
            assert!(after < before / 2, "{after} of {before} pages");
        });
    }

    fn pages_of_files() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let shared = statm.split(' ').nth(2).unwrap();
        shared.parse().unwrap()
    }
}
