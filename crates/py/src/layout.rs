//! `Layout`: the block map of a worker's KV tensors. `namespace_id`: the id of named facts.

use std::sync::Arc;

use kvlane_core::{BlockMap, Device, NamespaceParts, TensorView};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{config_error, core_error, guard};

/// Block map of one worker's KV tensors, from strides alone.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct Layout {
    map: Arc<BlockMap>,
}

impl Layout {
    /// The map itself.
    pub(crate) fn map(&self) -> &BlockMap {
        &self.map
    }
}

/// (layer name, data_ptr, device, element bytes, shape, strides in elements)
type Tensor = (String, u64, String, u32, Vec<u64>, Vec<i64>);

#[pymethods]
impl Layout {
    #[new]
    #[pyo3(signature = (tensors, block_count, block_dim = None))]
    fn new(
        py: Python<'_>,
        tensors: Vec<Tensor>,
        block_count: u32,
        block_dim: Option<usize>,
    ) -> PyResult<Self> {
        guard(py, || {
            let views = tensors
                .into_iter()
                .map(|(name, address, device, element_bytes, shape, strides)| {
                    let device = parse_device(&device).ok_or_else(|| {
                        config_error(
                            py,
                            format!("tensor '{name}' is on '{device}', allowed: cpu, cuda:N"),
                        )
                    })?;
                    Ok(TensorView {
                        name,
                        address,
                        device,
                        element_bytes,
                        shape,
                        strides,
                    })
                })
                .collect::<PyResult<Vec<_>>>()?;
            let map = BlockMap::from_tensors(views, block_count, block_dim)
                .map_err(|error| core_error(py, &error))?;
            Ok(Self { map: Arc::new(map) })
        })
    }

    #[getter]
    fn layer_names(&self) -> Vec<&str> {
        self.map.layer_names().collect()
    }

    fn layer_index(&self, name: &str) -> Option<usize> {
        self.map.layer_index(name)
    }

    #[getter]
    fn layer_count(&self) -> usize {
        self.map.layer_count()
    }

    /// Payload bytes of one block over all layers.
    #[getter]
    fn block_bytes(&self) -> usize {
        self.map.block_bytes()
    }

    /// 32 bytes that are equal exactly when two caches order a block's bytes in the same way.
    #[getter]
    fn fingerprint<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.map.fingerprint().as_slice())
    }
}

/// 32-byte id of a namespace from named facts. Their order does not matter, a repeated name is refused.
#[pyfunction]
pub(crate) fn namespace_id(py: Python<'_>, parts: Vec<(String, String)>) -> PyResult<Bound<'_, PyBytes>> {
    guard(py, || {
        let mut facts = NamespaceParts::new();
        for (name, value) in parts {
            facts.add(name, value).map_err(|error| core_error(py, &error))?;
        }
        Ok(PyBytes::new(py, facts.id().as_bytes()))
    })
}

fn parse_device(text: &str) -> Option<Device> {
    match text.split_once(':') {
        None if text == "cpu" => Some(Device::Host),
        None if text == "cuda" => Some(Device::Cuda(0)),
        Some(("cuda", ordinal)) => ordinal.parse().ok().map(Device::Cuda),
        _ => None,
    }
}
