//! Fast conversion of Python's sequences of integers.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyInt, PyList};
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
    let mut items = Vec::with_capacity(list.len().saturating_sub(start));
    for index in start..list.len() {
        // Nobody runs Python code in here, so a borrowed reference stays valid: reading a type does not, nor does the
        // conversion of an exact int, which reports what fits no C long by -1 and `overflow`, without an exception.
        // SAFETY: `list` is a list and `index` is not negative; PyList_GetItem checks the upper bound and returns null
        // with an exception set, or a reference that is valid until Python code runs.
        let value = unsafe {
            let item = ffi::PyList_GetItem(list.as_ptr(), index as ffi::Py_ssize_t);
            if item.is_null() {
                return Err(PyErr::fetch(list.py()));
            }
            if ffi::Py_TYPE(item) == &raw mut ffi::PyLong_Type {
                let mut overflow = 0;
                ffi::PyLong_AsLongAndOverflow(item, &raw mut overflow)
            } else {
                other_item(list, index)?
            }
        };
        items.push(u32::try_from(value).map_err(|_| not_in_range(index))?);
    }
    Ok(items)
}

/// An item that is not exactly an int: a subclass of int will do (True is 1, as everywhere in Python).
#[cold]
fn other_item(list: &Bound<'_, PyList>, index: usize) -> PyResult<std::ffi::c_long> {
    let item = list.get_item(index)?;
    if item.is_instance_of::<PyInt>() {
        return item.extract().map_err(|_| not_in_range(index));
    }
    Err(PyTypeError::new_err(format!(
        "item {index} is a {}, allowed: int",
        item.get_type().name()?
    )))
}

#[cold]
fn not_in_range(index: usize) -> PyErr {
    PyOverflowError::new_err(format!("item {index} is not in 0 to {}", u32::MAX))
}
