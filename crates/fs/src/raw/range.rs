//! The two ends of a copy: ranges of bytes with a checked length and a lifetime.

use std::marker::PhantomData;

/// A range that a copy reads, valid for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct ByteSource<'a> {
    pointer: *const u8,
    len: usize,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> ByteSource<'a> {
    /// # Safety
    /// `len` bytes at `pointer` stay readable for `'a`. Others may write them.
    pub(super) unsafe fn from_raw(pointer: *const u8, len: usize) -> Self {
        Self {
            pointer,
            len,
            owner: PhantomData,
        }
    }

    /// Bytes of the range.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn pointer(&self) -> *const u8 {
        self.pointer
    }
}

impl<'a> From<&'a [u8]> for ByteSource<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self {
            pointer: bytes.as_ptr(),
            len: bytes.len(),
            owner: PhantomData,
        }
    }
}

/// A range that a copy writes, valid for `'a`.
#[derive(Debug)]
pub struct ByteTarget<'a> {
    pointer: *mut u8,
    len: usize,
    owner: PhantomData<&'a mut [u8]>,
}

impl<'a> ByteTarget<'a> {
    /// # Safety
    /// `len` bytes at `pointer` stay writable for `'a`, and no reference to them is used meanwhile.
    pub(super) unsafe fn from_raw(pointer: *mut u8, len: usize) -> Self {
        Self {
            pointer,
            len,
            owner: PhantomData,
        }
    }

    /// Bytes of the range.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn pointer(&self) -> *mut u8 {
        self.pointer
    }
}

impl<'a> From<&'a mut [u8]> for ByteTarget<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Self {
            pointer: bytes.as_mut_ptr(),
            len: bytes.len(),
            owner: PhantomData,
        }
    }
}
