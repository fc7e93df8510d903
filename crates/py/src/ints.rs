//! Fast conversion of Python's sequences of integers.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyList;
use pyo3::{ffi, intern};

/// Converts `sequence[start:]` to unsigned 32-bit numbers.
///
/// A list is read item by item without slicing it: prompts have a hundred thousand tokens, and they are converted
/// while the scheduler waits. Any other sequence is turned into a list first (vLLM wraps lists).
pub(crate) fn u32_items(sequence: &Bound<'_, PyAny>, start: usize) -> PyResult<Vec<u32>> {
    if let Ok(list) = sequence.cast::<PyList>() {
        return list_items(list, start);
    }
    let py = sequence.py();
    let slice = if start == 0 {
        sequence.clone()
    } else {
        let bounds = py.get_type::<pyo3::types::PySlice>().call1((start, py.None()))?;
        sequence.call_method1(intern!(py, "__getitem__"), (bounds,))?
    };
    let list = py.get_type::<PyList>().call1((slice,))?;
    list_items(list.cast::<PyList>()?, 0)
}

fn list_items(list: &Bound<'_, PyList>, start: usize) -> PyResult<Vec<u32>> {
    let py = list.py();
    let mut items = Vec::with_capacity(list.len().saturating_sub(start));
    for index in start..list.len() {
        // SAFETY: `list` is a list and `index` is not negative; PyList_GetItem checks the upper bound and returns null
        // with an exception set, or a borrowed reference. It stays valid until Python code runs, and none runs before
        // its last use: PyLong_Check reads a flag, and PyLong_AsLong of an int (or a subclass) calls no Python method.
        let value = unsafe {
            let item = ffi::PyList_GetItem(list.as_ptr(), index as ffi::Py_ssize_t);
            if item.is_null() {
                return Err(PyErr::fetch(py));
            }
            if ffi::PyLong_Check(item) == 0 {
                let item = list.get_item(index)?;
                return Err(PyTypeError::new_err(format!(
                    "item {index} is a {}, allowed: int",
                    item.get_type().name()?
                )));
            }
            ffi::PyLong_AsLong(item)
        };
        match u32::try_from(value) {
            Ok(value) => items.push(value),
            Err(_) => {
                // -1 may also mean that the number does not fit a C long; the exception that this sets is replaced.
                let _ = PyErr::take(py);
                return Err(PyOverflowError::new_err(format!(
                    "item {index} is not in 0 to {}",
                    u32::MAX
                )));
            }
        }
    }
    Ok(items)
}
