//! The checksum of a layer.

use crc32fast::Hasher;

use super::kernel::LINE_BYTES;

/// CRC-32 (ISO-HDLC, as in zlib) of one layer of one block, seeded with the block's key and the layer's number.
///
/// The seed makes a payload that lies in the wrong slot, or in the wrong layer of the right slot, fail its check.
#[derive(Clone, Debug)]
pub struct LayerCrc(Hasher);

impl LayerCrc {
    /// Starts the checksum of layer `layer` of the block named `key`.
    pub fn new(key: &[u8; 32], layer: u32) -> Self {
        let mut seed = [0_u8; 36];
        seed[..32].copy_from_slice(key);
        seed[32..].copy_from_slice(&layer.to_le_bytes());
        let mut hasher = Hasher::new();
        hasher.update(&seed);
        Self(hasher)
    }

    /// Appends bytes that nobody else writes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The checksum of everything so far.
    pub fn value(self) -> u32 {
        self.0.finalize()
    }

    /// The register of the checksum: its value before the final inversion.
    pub(super) fn register(&self) -> u32 {
        !self.0.clone().finalize()
    }

    /// Goes on as if everything so far, the register included, were the message `remainder`.
    pub(super) fn resume(&mut self, remainder: &[u8; LINE_BYTES]) {
        // The inverse of all ones is an empty register.
        self.0 = Hasher::new_with_initial(!0);
        self.0.update(remainder);
    }
}
