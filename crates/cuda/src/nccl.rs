//! What is known of NCCL before a communicator is made.

use crate::error::Result;
use crate::raw::Nccl;

/// A version of NCCL. Both ends of a communicator need the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NcclVersion(u32);

impl NcclVersion {
    /// From NCCL's own number, `NCCL_VERSION_CODE`.
    pub const fn from_code(code: u32) -> Self {
        Self(code)
    }

    /// NCCL's own number.
    pub const fn code(self) -> u32 {
        self.0
    }
}

impl std::fmt::Display for NcclVersion {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Since 2.9: two digits each for the minor version and the patch level.
        let (major, minor, patch) = (self.0 / 10_000, self.0 % 10_000 / 100, self.0 % 100);
        write!(formatter, "{major}.{minor}.{patch}")
    }
}

/// The NCCL of this process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct NcclInfo {
    /// The library that was loaded.
    pub library: String,
    /// Its version.
    pub version: NcclVersion,
}

impl NcclInfo {
    /// Finds and loads NCCL: the one that the process has already, or the one that PyTorch brought.
    ///
    /// # Errors
    /// There is none, or one that is too old.
    pub fn find() -> Result<Self> {
        let nccl = Nccl::installed()?;
        Ok(Self {
            library: nccl.library().to_owned(),
            version: nccl.version(),
        })
    }
}

/// The name of a communicator that is not made yet. Whoever has it can take part, so it goes to the one peer only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CommunicatorId(pub(crate) [u8; CommunicatorId::LEN_BYTES]);

impl CommunicatorId {
    /// Bytes of an id.
    pub const LEN_BYTES: usize = 128;

    /// A new one. NCCL listens for the two ends from now on, in a thread of its own.
    pub fn new() -> Result<Self> {
        Nccl::installed()?.unique_id()
    }

    /// One that a peer has made.
    pub const fn from_bytes(bytes: [u8; Self::LEN_BYTES]) -> Self {
        Self(bytes)
    }

    /// For the peer.
    pub const fn as_bytes(&self) -> &[u8; Self::LEN_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for CommunicatorId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("CommunicatorId").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_people_write_them() {
        assert_eq!(NcclVersion::from_code(22_907).to_string(), "2.29.7");
        assert_eq!(NcclVersion::from_code(21_800).to_string(), "2.18.0");
        assert!(NcclVersion::from_code(23_001) > NcclVersion::from_code(22_999));
    }
}
