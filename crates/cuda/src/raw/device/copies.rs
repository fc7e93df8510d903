//! Copies on the device's streams: one by one, or all pieces in one launch of the kernel.

use std::ffi::c_uint;
use std::sync::atomic::Ordering;

use cudarc::driver::sys::CUstream;

use super::super::kernel::{BLOCKS_BETWEEN_DEVICES, BLOCKS_WITH_HOST, PieceList};
use super::{Device, Direction, Staging};
use crate::error::Result;
use crate::spans::{Piece, Span};

/// From how many pieces on one launch takes less time than as many copies of the driver. On an H100 a launch took 14 us, a copy
/// between devices 10 us alone and 6 us among many, one to or from the host 3.5 us among many.
pub(in crate::raw) const LAUNCHED_BETWEEN_DEVICES_MIN: usize = 3;
pub(in crate::raw) const LAUNCHED_WITH_HOST_MIN: usize = 4;

impl Device {
    /// Starts a copy from the device into `staging` at `offset_bytes`.
    ///
    /// # Safety
    /// `len_bytes` at `address` are memory of this device, and the buffer keeps still, until an event that was recorded
    /// behind the copy is over.
    unsafe fn start_out(
        &self,
        address: u64,
        staging: &Staging,
        offset_bytes: usize,
        len_bytes: usize,
    ) -> Result<()> {
        let target = staging.place(offset_bytes, len_bytes).cast();
        let stream = self.streams[Direction::Out as usize];
        let entered = self.enter()?;
        // SAFETY: the target is inside of the buffer, as just checked; the caller vouches for the rest.
        let code = unsafe { (entered.calls().cuMemcpyDtoHAsync_v2)(target, address, len_bytes, stream) };
        self.driver
            .check(code, "cuMemcpyDtoHAsync_v2", "starting a copy from the device")
    }

    /// Starts a copy from `staging` at `offset_bytes` to the device.
    ///
    /// # Safety
    /// As for [`start_out`](Self::start_out).
    unsafe fn start_in(
        &self,
        address: u64,
        staging: &Staging,
        offset_bytes: usize,
        len_bytes: usize,
    ) -> Result<()> {
        let source = staging.place(offset_bytes, len_bytes).cast_const().cast();
        let stream = self.streams[Direction::In as usize];
        let entered = self.enter()?;
        // SAFETY: the source is inside of the buffer, as just checked; the caller vouches for the rest.
        let code = unsafe { (entered.calls().cuMemcpyHtoDAsync_v2)(address, source, len_bytes, stream) };
        self.driver
            .check(code, "cuMemcpyHtoDAsync_v2", "starting a copy to the device")
    }

    /// Starts copies between places that the device can reach, without an order among them, behind the copies to it that
    /// were started before. An error: some of them may have been started.
    ///
    /// # Safety
    /// Sources and targets are memory that this device can reach until an event that was recorded behind the copies is over,
    /// and the targets are memory of this device. Until then the list keeps still.
    pub(in crate::raw) unsafe fn start_between(
        &self,
        pieces: &[Piece],
        list: Option<&mut PieceList>,
    ) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.start_between_on(self.streams[Direction::In as usize], pieces, list) }
    }

    /// # Safety
    /// As for [`start_between`](Self::start_between), on a stream of ours.
    pub(super) unsafe fn start_between_on(
        &self,
        stream: CUstream,
        pieces: &[Piece],
        list: Option<&mut PieceList>,
    ) -> Result<()> {
        if pieces.len() >= LAUNCHED_BETWEEN_DEVICES_MIN
            && let Some(list) = list
            // SAFETY: as the caller says.
            && unsafe { self.launch(stream, pieces.iter().copied(), list, BLOCKS_BETWEEN_DEVICES) }
        {
            return Ok(());
        }
        let entered = self.enter()?;
        for piece in pieces {
            // SAFETY: as the caller says.
            let code = unsafe {
                (entered.calls().cuMemcpyDtoDAsync_v2)(piece.to, piece.from, piece.len_bytes, stream)
            };
            self.driver
                .check(code, "cuMemcpyDtoDAsync_v2", "starting a copy between devices")?;
        }
        Ok(())
    }

    /// Starts copies between the device and a buffer. An error: some of them may have been started.
    ///
    /// # Safety
    /// The spans are memory of this device, or such as it can read if they go out, and the buffer and the list keep still,
    /// until an event that was recorded behind the copies is over.
    pub(in crate::raw) unsafe fn start_spans(
        &self,
        direction: Direction,
        spans: &[Span],
        staging: &Staging,
        list: Option<&mut PieceList>,
    ) -> Result<()> {
        let piece = |span: &Span| {
            let host = staging
                .place(span.offset_bytes, span.len_bytes)
                .expose_provenance() as u64;
            let (from, to) = match direction {
                Direction::Out => (span.address, host),
                Direction::In => (host, span.address),
            };
            Piece::new(from, to, span.len_bytes)
        };
        let stream = self.streams[direction as usize];
        if spans.len() >= LAUNCHED_WITH_HOST_MIN
            && let Some(list) = list
            // SAFETY: as the caller says; `place` has found the buffer's parts inside of it.
            && unsafe { self.launch(stream, spans.iter().map(piece), list, BLOCKS_WITH_HOST) }
        {
            return Ok(());
        }
        spans.iter().try_for_each(|span| {
            // SAFETY: as the caller says.
            unsafe {
                match direction {
                    Direction::Out => {
                        self.start_out(span.address, staging, span.offset_bytes, span.len_bytes)
                    }
                    Direction::In => self.start_in(span.address, staging, span.offset_bytes, span.len_bytes),
                }
            }
        })
    }

    /// Copies pieces in one launch, on a stream of ours. `false`: that is not possible, and nothing was started.
    ///
    /// # Safety
    /// Sources and targets are memory that this device can reach, and the list keeps still, until an event that was recorded
    /// behind the copies is over.
    unsafe fn launch(
        &self,
        stream: CUstream,
        pieces: impl Iterator<Item = Piece>,
        list: &mut PieceList,
        blocks_max: c_uint,
    ) -> bool {
        let Some(kernel) = self.kernel.as_ref().filter(|_| self.takes_lists()) else {
            return false;
        };
        let Some(count) = list.write(pieces) else {
            tracing::warn!("more pieces than a list has room for: each is a copy of its own");
            return false;
        };
        let launched = self.enter().and_then(|_entered| {
            // SAFETY: the context is entered, and the stream is one of it; the caller vouches for the rest.
            unsafe { kernel.launch(self.driver, list, count, blocks_max, stream) }
        });
        if let Err(error) = &launched {
            tracing::warn!(%error, "many pieces cannot be copied at once, so each is a copy of its own from now on");
            self.has_kernel_failed.store(true, Ordering::Relaxed);
        }
        launched.is_ok()
    }
}
