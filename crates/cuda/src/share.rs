//! What a process tells another one of the same machine, so that it can map the cache.

/// Most allocations of an offer. A cache has one for all layers, or one for each.
pub(crate) const ALLOCATIONS_MAX: usize = 4096;

/// One allocation of device memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SharedAllocation {
    /// The driver's handle, as good as a key for the memory.
    pub handle: [u8; 64],
    /// Where it starts in the process that has it.
    pub address: u64,
    /// How long it is.
    pub len_bytes: u64,
}

impl std::fmt::Debug for SharedAllocation {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SharedAllocation")
            .field("address", &self.address)
            .field("len_bytes", &self.len_bytes)
            .finish_non_exhaustive()
    }
}

/// A cache that others may map.
#[derive(Clone, PartialEq, Eq)]
pub struct CacheOffer {
    /// All allocations that the cache and the token lie in.
    pub allocations: Vec<SharedAllocation>,
    /// Where the token is.
    pub token_address: u64,
    /// Random bytes in device memory: who reads them there has mapped the right memory.
    pub token: [u8; 16],
}

impl std::fmt::Debug for CacheOffer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("CacheOffer")
            .field("allocations", &self.allocations)
            .finish_non_exhaustive()
    }
}
