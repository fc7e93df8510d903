//! The exceptions of the module, and the edge that no panic crosses.

use std::panic::{AssertUnwindSafe, catch_unwind};

use kvlane_cuda::CudaError;
use kvlane_fs::FsError;
use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// The three classes. Two of them have a builtin as second base, which `create_exception!` cannot express.
struct Classes {
    base: Py<PyType>,
    config: Py<PyType>,
    store: Py<PyType>,
}

static CLASSES: PyOnceLock<Classes> = PyOnceLock::new();

/// Creates the exception classes and puts them into the module.
pub(crate) fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let classes = classes(module.py())?;
    module.add("KvlaneError", &classes.base)?;
    module.add("ConfigError", &classes.config)?;
    module.add("StoreError", &classes.store)
}

/// The call was refused: an argument or option cannot work.
pub(crate) fn config_error(py: Python<'_>, message: impl Into<String>) -> PyErr {
    match classes(py) {
        Ok(classes) => PyErr::from_type(classes.config.bind(py).clone(), (message.into(),)),
        Err(error) => error,
    }
}

/// The folder cannot be used; `errno` becomes the exception's errno.
pub(crate) fn store_error(py: Python<'_>, errno: Option<i32>, message: impl Into<String>) -> PyErr {
    let class = match classes(py) {
        Ok(classes) => classes.store.bind(py).clone(),
        Err(error) => return error,
    };
    match errno {
        Some(errno) => PyErr::from_type(class, (errno, message.into())),
        None => PyErr::from_type(class, (message.into(),)),
    }
}

/// Converts an error of the core: all of them refuse an argument.
pub(crate) fn core_error(py: Python<'_>, error: &kvlane_core::Error) -> PyErr {
    config_error(py, with_sources(error))
}

/// Converts an error of the filesystem backend.
pub(crate) fn fs_error(py: Python<'_>, error: &FsError) -> PyErr {
    match error {
        FsError::Option { .. } | FsError::CapacityMismatch { .. } | FsError::Core(_) => {
            config_error(py, with_sources(error))
        }
        FsError::Device(device) => cuda_error(py, device),
        other => store_error(py, other.errno(), with_sources(other)),
    }
}

/// Converts an error of a CUDA device: what cannot work on this machine is a refusal.
pub(crate) fn cuda_error(py: Python<'_>, error: &CudaError) -> PyErr {
    match error {
        CudaError::LibraryMissing { .. }
        | CudaError::SymbolMissing { .. }
        | CudaError::NoSuchDevice { .. }
        | CudaError::NotOneDevice { .. } => config_error(py, with_sources(error)),
        other => store_error(py, None, with_sources(other)),
    }
}

/// Converts an error of the P2P backend.
pub(crate) fn p2p_error(py: Python<'_>, error: &kvlane_p2p::Error) -> PyErr {
    use kvlane_p2p::Error;
    match error {
        Error::Listen { source, .. } | Error::Io { source, .. } => {
            store_error(py, source.raw_os_error(), with_sources(error))
        }
        _ => config_error(py, with_sources(error)),
    }
}

/// Converts an error that came through the transfer trait.
pub(crate) fn transfer_error(py: Python<'_>, error: &kvlane_core::Error) -> PyErr {
    match error {
        kvlane_core::Error::Backend { source, .. } => match source.downcast_ref::<FsError>() {
            Some(inner) => fs_error(py, inner),
            None => store_error(py, errno_of(error), with_sources(error)),
        },
        other => core_error(py, other),
    }
}

/// Runs `work`; a panic becomes a `StoreError` that asks for a report instead of unwinding into the interpreter.
///
/// The panic's message and place were printed by the panic hook already.
pub(crate) fn guard<T>(py: Python<'_>, work: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    // Unwind safety: what a panic leaves behind is either dropped with `work` or behind the crates' own locks,
    // under which nothing is left half done.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(panic) => {
            let what = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "without a message".to_owned());
            Err(store_error(
                py,
                None,
                format!("internal error in kvlane, please report it: {what}"),
            ))
        }
    }
}

/// The error and its causes in one line; causes that the text already tells are left out.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// The first system error number among an error's causes.
fn errno_of(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(current) = next {
        if let Some(errno) = current
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error)
        {
            return Some(errno);
        }
        next = current.source();
    }
    None
}

fn classes(py: Python<'_>) -> PyResult<&'static Classes> {
    CLASSES.get_or_try_init(py, || {
        let base = class(
            py,
            "KvlaneError",
            "Base of kvlane's exceptions.",
            &[py.get_type::<PyException>()],
        )?;
        let config = class(
            py,
            "ConfigError",
            "The call was refused: an argument or option cannot work. Nothing was changed.",
            &[base.clone(), py.get_type::<PyValueError>()],
        )?;
        let store = class(
            py,
            "StoreError",
            "The shared folder cannot be used; carries errno where there is one.",
            &[base.clone(), py.get_type::<PyOSError>()],
        )?;
        Ok(Classes {
            base: base.unbind(),
            config: config.unbind(),
            store: store.unbind(),
        })
    })
}

/// What a `class` statement in the module would make.
fn class<'py>(
    py: Python<'py>,
    name: &str,
    doc: &str,
    bases: &[Bound<'py, PyType>],
) -> PyResult<Bound<'py, PyType>> {
    let namespace = PyDict::new(py);
    namespace.set_item("__module__", "kvlane._native")?;
    namespace.set_item("__doc__", doc)?;
    let made = py
        .get_type::<PyType>()
        .call1((name, PyTuple::new(py, bases)?, namespace))?;
    Ok(made.cast_into::<PyType>()?)
}
