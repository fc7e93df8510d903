//! `Chain`: the chain hashes of one request.

use kvlane_core::{ChainRoot, ChainRootId, PrefixDigest};
use kvlane_fs::LookupCursor;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{config_error, core_error, guard};
use crate::ints::u32_items;

/// Chain hashes of one request's blocks. Feed tokens in order; only full blocks get a key.
#[pyclass(module = "kvlane._native")]
pub(crate) struct Chain {
    inner: kvlane_core::Chain,
    /// Where the last look-up of this chain stopped, and the number of the reader that was asked.
    cursor: (u64, LookupCursor),
}

impl Chain {
    /// The chain, and what reader `number` remembers of it.
    pub(crate) fn with_cursor(&mut self, number: u64) -> (&kvlane_core::Chain, &mut LookupCursor) {
        if self.cursor.0 != number {
            self.cursor = (number, LookupCursor::default());
        }
        (&self.inner, &mut self.cursor.1)
    }
}

/// The root of chains of blocks of `block_tokens` tokens.
fn chain_root(
    py: Python<'_>,
    block_tokens: u32,
    cache_salt: Option<String>,
    lora: Option<Vec<u8>>,
) -> PyResult<ChainRootId> {
    let mut root = ChainRoot::new(block_tokens).map_err(|error| core_error(py, &error))?;
    if let Some(salt) = cache_salt {
        root = root.with_cache_salt(salt);
    }
    if let Some(identity) = lora {
        root = root.with_lora(identity);
    }
    Ok(root.id())
}

impl Chain {
    fn from_root(root: ChainRootId) -> Self {
        Self {
            inner: kvlane_core::Chain::new(root),
            cursor: (0, LookupCursor::default()),
        }
    }

    /// A chain of its own with the first blocks of this one; None as [`kvlane_core::Chain::prefix`].
    fn begin(&self, block_count: usize) -> Option<Self> {
        // What a look-up remembers may be about blocks behind the cut.
        let cursor = if block_count == self.inner.block_count() {
            self.cursor
        } else {
            (0, LookupCursor::default())
        };
        let inner = self.inner.prefix(block_count)?;
        Some(Self { inner, cursor })
    }
}

#[pymethods]
impl Chain {
    #[new]
    #[pyo3(signature = (block_tokens, *, cache_salt = None, lora = None))]
    fn new(
        py: Python<'_>,
        block_tokens: u32,
        cache_salt: Option<String>,
        lora: Option<Vec<u8>>,
    ) -> PyResult<Self> {
        guard(py, || {
            chain_root(py, block_tokens, cache_salt, lora).map(Self::from_root)
        })
    }

    /// Appends ``token_ids[start:]`` and returns the number of full blocks so far.
    #[pyo3(signature = (token_ids, start = 0))]
    fn extend(&mut self, token_ids: &Bound<'_, PyAny>, start: usize) -> PyResult<usize> {
        guard(token_ids.py(), || {
            Ok(self.inner.extend(u32_items(token_ids, start)?))
        })
    }

    /// A chain of its own with the first ``block_count`` blocks of this one, which stays as it is.
    fn prefix(&self, py: Python<'_>, block_count: usize) -> PyResult<Self> {
        guard(py, || {
            self.begin(block_count).ok_or_else(|| {
                let known = self.inner.block_count();
                config_error(
                    py,
                    format!("block_count is {block_count}, allowed: 1 to {known}, and no multimodal items"),
                )
            })
        })
    }

    /// Declares a multimodal item; must precede the ``extend`` that covers its first token.
    fn add_image(
        &mut self,
        py: Python<'_>,
        start_token: u64,
        length_tokens: u64,
        identifier: String,
    ) -> PyResult<()> {
        guard(py, || {
            self.inner
                .add_image(start_token, length_tokens, identifier)
                .map_err(|error| core_error(py, &error))
        })
    }

    /// 32 bytes that name the whole prompt, its last partial block included.
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.inner.digest().as_bytes())
    }

    #[getter]
    fn block_count(&self) -> usize {
        self.inner.block_count()
    }

    #[getter]
    fn token_count(&self) -> u64 {
        self.inner.token_count()
    }

    /// The keys of a span of blocks, 32 bytes each, concatenated.
    fn keys<'py>(
        &self,
        py: Python<'py>,
        first_block: usize,
        block_count: usize,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let all = self.inner.keys();
        let keys = first_block
            .checked_add(block_count)
            .and_then(|end| all.get(first_block..end))
            .ok_or_else(|| {
                let known = self.inner.block_count();
                config_error(
                    py,
                    format!("blocks {first_block} + {block_count} are not all known, the chain has {known}"),
                )
            })?;
        PyBytes::new_with(py, keys.len() * 32, |target| {
            for (place, key) in target.chunks_exact_mut(32).zip(keys) {
                place.copy_from_slice(key.as_bytes());
            }
            Ok(())
        })
    }
}

/// Chains of the last prompts, by the engine's own hashes of their blocks.
#[pyclass(module = "kvlane._native")]
pub(crate) struct RecentChains(kvlane_core::RecentChains<Py<Chain>>);

#[pymethods]
impl RecentChains {
    #[new]
    #[pyo3(signature = (limit_chains = 64, limit_blocks = 524_288))]
    fn new(limit_chains: usize, limit_blocks: usize) -> Self {
        Self(kvlane_core::RecentChains::new(limit_chains, limit_blocks))
    }

    /// The chain of a whole prompt. It begins with the longest one that is remembered and that it continues, is
    /// remembered itself, and must not be continued afterwards.
    ///
    /// ``block_hashes`` are the engine's. They are used if there is one for each full block of ``num_tokens`` (the
    /// prompt's tokens and those behind it), and if they are digests of 32 bytes.
    #[pyo3(signature = (token_ids, block_hashes, num_tokens, block_tokens, *, cache_salt = None, lora = None))]
    #[allow(clippy::too_many_arguments, reason = "all of them are named by the caller")]
    fn chain(
        &mut self,
        token_ids: &Bound<'_, PyAny>,
        block_hashes: Option<Bound<'_, PyAny>>,
        num_tokens: usize,
        block_tokens: u32,
        cache_salt: Option<String>,
        lora: Option<Vec<u8>>,
    ) -> PyResult<Py<Chain>> {
        let py = token_ids.py();
        guard(py, || {
            let root = chain_root(py, block_tokens, cache_salt, lora)?;
            let full_blocks = |tokens: usize| tokens / block_tokens as usize;
            // Another number of hashes means blocks of another size.
            let hashes = match block_hashes {
                Some(hashes) if hashes.len()? == full_blocks(num_tokens) => Some(hashes),
                _ => None,
            };
            let digest = |block: usize| digest(hashes.as_ref()?, block);
            let known = self
                .0
                .longest(root, full_blocks(token_ids.len()?), digest)
                .and_then(|(blocks, chain)| chain.borrow(py).begin(blocks));
            let mut chain = known.unwrap_or_else(|| Chain::from_root(root));
            let start = chain.inner.token_count() as usize;
            let blocks = chain.inner.extend(u32_items(token_ids, start)?);
            let chain = Py::new(py, chain)?;
            if let Some(digest) = blocks.checked_sub(1).and_then(digest) {
                self.0.remember(root, digest, blocks, chain.clone_ref(py));
            }
            Ok(chain)
        })
    }
}

/// The engine's digest of a block, if it is long enough to stand for the tokens. vLLM's default is SHA-256; its faster
/// functions have shorter digests, and do not promise that equal ones mean equal tokens.
fn digest(hashes: &Bound<'_, PyAny>, block: usize) -> Option<PrefixDigest> {
    let hash = hashes.get_item(block).ok()?;
    hash.cast::<PyBytes>().ok()?.as_bytes().try_into().ok()
}
