//! `Chain`: the chain hashes of one request.

use kvlane_core::ChainRoot;
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
            let mut root = ChainRoot::new(block_tokens).map_err(|error| core_error(py, &error))?;
            if let Some(salt) = cache_salt {
                root = root.with_cache_salt(salt);
            }
            if let Some(identity) = lora {
                root = root.with_lora(identity);
            }
            Ok(Self {
                inner: kvlane_core::Chain::new(&root),
                cursor: (0, LookupCursor::default()),
            })
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
            let inner = self.inner.prefix(block_count).ok_or_else(|| {
                let known = self.inner.block_count();
                config_error(
                    py,
                    format!("block_count is {block_count}, allowed: 1 to {known}, and no multimodal items"),
                )
            })?;
            // What a look-up remembers may be about blocks behind the cut.
            let cursor = if block_count == self.inner.block_count() {
                self.cursor
            } else {
                (0, LookupCursor::default())
            };
            Ok(Self { inner, cursor })
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
