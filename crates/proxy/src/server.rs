//! Serving on a listener until told to stop, then finishing what was begun.

use std::io;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::config::{ConfigError, ProxyConfig};
use crate::routes::Proxy;

/// How often a silent client's machine is asked whether it is still there.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

/// Why serving could not begin, or did not end well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The settings cannot work.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Some requests were cut off because they outlasted the drain time.
    #[error("{connections} connections were still busy after {waited_ms} ms and were closed")]
    CutOff {
        /// How many connections were closed with a request on them.
        connections: usize,
        /// The drain time, in milliseconds.
        waited_ms: u128,
    },
}

/// Serves the proxy on `listener` until `shutdown` resolves. Then no further connection is taken, idle ones are closed, and
/// requests in flight get `drain_timeout` to finish.
pub async fn serve(
    listener: TcpListener,
    config: ProxyConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (drain_timeout, stall_timeout) = (config.drain_timeout, config.client_stall_timeout);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(config.client_head_timeout);
    let service = TowerToHyperService::new(Proxy::new(config)?.router());
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            stream = accept(&listener, stall_timeout) => {
                let connection = http.serve_connection(TokioIo::new(stream), service.clone());
                let connection = graceful.watch(connection);
                connections.spawn(async move {
                    if let Err(error) = connection.await {
                        tracing::debug!(%error, "a client connection ended early");
                    }
                });
            }
            Some(_ended) = connections.join_next() => {}
        }
    }
    drop(listener);
    tracing::info!(
        drain_timeout_ms = drain_timeout.as_millis(),
        "stopping: requests in flight are finished"
    );
    if tokio::time::timeout(drain_timeout, graceful.shutdown())
        .await
        .is_ok()
    {
        return Ok(());
    }
    while connections.try_join_next().is_some() {}
    let busy = connections.len();
    connections.shutdown().await;
    Err(ServeError::CutOff {
        connections: busy,
        waited_ms: drain_timeout.as_millis(),
    })
}

async fn accept(listener: &TcpListener, stall_timeout: Duration) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _peer)) => {
                // Tokens are small writes; waiting to merge them would delay each one.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "TCP_NODELAY was refused");
                }
                if let Err(error) = bound_stalls(&stream, stall_timeout) {
                    tracing::debug!(%error, "a client that stalls will not be noticed");
                }
                return stream;
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                // Most often the descriptor limit: others have to be closed first.
                tracing::error!(%error, "no connection can be accepted, trying again in 100 ms");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Has the kernel close a connection whose client takes no bytes, or is no longer there, for `timeout`. A request that waits
/// to write is not polled, so nothing here would notice.
fn bound_stalls(stream: &TcpStream, timeout: Duration) -> rustix::io::Result<()> {
    let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, millis)?;
    // For the time in which there is nothing to write: a peer that vanished without a word.
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)
}

fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
    )
}
