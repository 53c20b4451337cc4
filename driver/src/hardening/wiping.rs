//! An allocator that wipes memory before it gives it back.
//!
//! What the driver itself keeps secrets in is wiped when it is dropped. The libraries for gRPC, HTTP, TLS
//! and JSON copy what they carry into buffers of their own, which only the allocator sees again.

#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr,
};

/// The system's allocator, with memory wiped when it is freed or moved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wiping;

// SAFETY: all memory comes from the system's allocator and goes back to it with the layout with which it
// was allocated. In between, only memory that is being freed is written to.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the memory is the caller's, and has the size of its layout. Unlike a plain write, the
        // compiler does not leave this one out.
        unsafe {
            libc::explicit_bzero(memory.cast(), layout.size());
            System.dealloc(memory, layout);
        }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The system's own would leave a copy behind where it moves the memory.
        // SAFETY: the caller promises that the size is valid with this alignment. The two regions do not
        // overlap, and both have at least the smaller size.
        unsafe {
            let moved = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !moved.is_null() {
                ptr::copy_nonoverlapping(memory, moved, layout.size().min(size));
                self.dealloc(memory, layout);
            }
            moved
        }
    }
}
