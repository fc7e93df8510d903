//! `P2pPing`: tells proxies that this instance is there.

use std::sync::{Mutex, PoisonError};

use kvlane_p2p::discovery::{
    Discovery, DiscoveryError, DiscoverySettings, PING_INTERVAL, PingRole, PingValue,
};
use pyo3::prelude::*;

use crate::error::{config_error, guard, store_error};

/// The running ping; it ends with `close`.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct P2pPing {
    inner: Mutex<Option<Discovery>>,
}

#[pymethods]
impl P2pPing {
    #[new]
    #[pyo3(signature = (proxy_host, proxy_port, is_prefill, http_address, zmq_address, texts, numbers))]
    #[allow(clippy::too_many_arguments, reason = "the fields of one ping")]
    fn new(
        py: Python<'_>,
        proxy_host: String,
        proxy_port: u16,
        is_prefill: bool,
        http_address: String,
        zmq_address: String,
        texts: Vec<(String, String)>,
        numbers: Vec<(String, u64)>,
    ) -> PyResult<Self> {
        guard(py, || {
            crate::logs::forward(py);
            let texts = texts.into_iter().map(|(key, text)| (key, PingValue::Text(text)));
            let numbers = numbers
                .into_iter()
                .map(|(key, number)| (key, PingValue::Number(number)));
            let settings = DiscoverySettings {
                proxy_host,
                proxy_port,
                role: if is_prefill {
                    PingRole::Prefill
                } else {
                    PingRole::Decode
                },
                http_address,
                zmq_address,
                extra: texts.chain(numbers).collect(),
                interval: PING_INTERVAL,
            };
            match Discovery::start(&settings) {
                Ok(ping) => Ok(Self {
                    inner: Mutex::new(Some(ping)),
                }),
                Err(DiscoveryError::Start(error)) => {
                    Err(store_error(py, error.raw_os_error(), error.to_string()))
                }
                Err(error) => Err(config_error(py, error.to_string())),
            }
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(py, || {
            let ping = self.inner.lock().unwrap_or_else(PoisonError::into_inner).take();
            py.detach(|| drop(ping));
            Ok(())
        })
    }
}
