//! Names of transfers, and what makes two servers mean the same prompt.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Longest transfer key, in bytes. Request ids of the known proxies stay below 200.
pub const KEY_BYTES_MAX: usize = 512;

/// Names one request's KV on both servers: text that a proxy gave to both, or that both derive from its request id.
///
/// A key alone never decides which KV is used: [`Prompt`] must agree as well.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TransferKey(Arc<str>);

impl TransferKey {
    /// Refuses an empty text and one of more than [`KEY_BYTES_MAX`] bytes.
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self> {
        let text = text.into();
        if text.is_empty() || text.len() > KEY_BYTES_MAX {
            return Err(Error::InvalidArgument {
                argument: "key",
                found: format!("a text of {} bytes", text.len()),
                allowed: format!("1 to {KEY_BYTES_MAX} bytes"),
            });
        }
        Ok(Self(text))
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TransferKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "TransferKey({:?})", &*self.0)
    }
}

impl fmt::Display for TransferKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What the KV of a request is computed from. Equal values mean equal KV within a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Prompt {
    /// Number of its tokens.
    pub tokens: u32,
    /// Hash of all of them and of what else decides their KV, the partial last block included.
    pub digest: [u8; 32],
}

impl Prompt {
    /// Number of blocks that hold the prompt; the last one may be partial.
    pub fn block_count(&self, block_tokens: u32) -> u32 {
        self.tokens.div_ceil(block_tokens)
    }

    /// The blocks of `other_tokens` tokens that hold what `blocks` of `block_tokens` tokens do. Tokens behind the prompt are in
    /// nobody's blocks.
    pub(crate) fn blocks_of_other_size(
        &self,
        blocks: Range<u64>,
        block_tokens: u32,
        other_tokens: u32,
    ) -> Range<u64> {
        let (own, other) = (u64::from(block_tokens), u64::from(other_tokens.max(1)));
        let end_token = blocks.end.saturating_mul(own).min(u64::from(self.tokens));
        blocks.start.saturating_mul(own) / other..end_token.div_ceil(other)
    }
}
