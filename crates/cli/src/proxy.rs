//! `kvlane proxy`: arguments, runtime and signals around the proxy library.

use std::io;
use std::num::NonZeroU64;
use std::time::Duration;

use clap::{Args, ValueEnum};
use kvlane_proxy::config::DEFAULT_KV_PORT;
use kvlane_proxy::{Dispatch, KvBackend, ProxyConfig, ServeError, UpstreamAddress, serve};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::exit::Exit;

/// Serve OpenAI requests by a prefill and a decode server that hand over KV.
///
/// Each request goes to a prefill server for its prompt and to a decode server, whose answer is streamed back. A server
/// is given as http://HOST:PORT, for the p2p backend optionally with the port of its connector: http://HOST:PORT=KV_PORT.
#[derive(Args, Debug)]
pub(crate) struct ProxyArguments {
    /// Prefill server; repeat it, or separate by commas, for several.
    #[arg(long, required = true, value_delimiter = ',', env = "KVLANE_PREFILL", value_name = "URL", value_parser = UpstreamAddress::parse)]
    prefill: Vec<UpstreamAddress>,
    /// Decode server; repeat it, or separate by commas, for several.
    #[arg(long, required = true, value_delimiter = ',', env = "KVLANE_DECODE", value_name = "URL", value_parser = UpstreamAddress::parse)]
    decode: Vec<UpstreamAddress>,
    /// How KV moves between the servers: through a shared folder, or from server to server.
    #[arg(long, env = "KVLANE_KV_BACKEND", value_name = "BACKEND")]
    kv_backend: Backend,
    /// Whether decode is called when prefill has answered, or together with it, which only the p2p backend can.
    #[arg(long, env = "KVLANE_DISPATCH", value_name = "DISPATCH", value_enum, default_value_t = Order::Sequential)]
    dispatch: Order,
    /// Port of the p2p connectors on servers that do not name one.
    #[arg(long, default_value_t = DEFAULT_KV_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    kv_port: u16,
    /// Address to listen on.
    #[arg(long, env = "KVLANE_HOST", default_value = "0.0.0.0")]
    host: String,
    /// Port to listen on; 0 lets the system choose, the log tells which.
    #[arg(long, env = "KVLANE_PORT", default_value_t = 8080)]
    port: u16,
    /// Longest wait for a connection to a server [default: 2000].
    #[arg(long, value_name = "MS", help_heading = "Bounds")]
    connect_timeout_ms: Option<NonZeroU64>,
    /// Longest wait for prefill; after it decode computes the prompt itself [default: 120000].
    #[arg(long, value_name = "MS", help_heading = "Bounds")]
    prefill_timeout_ms: Option<NonZeroU64>,
    /// Longest wait for the head of decode's answer, which without streaming is the whole answer [default: 3600000].
    #[arg(long, value_name = "MS", help_heading = "Bounds")]
    first_byte_timeout_ms: Option<NonZeroU64>,
    /// Longest silence within decode's answer [default: 300000].
    #[arg(long, value_name = "MS", help_heading = "Bounds")]
    idle_timeout_ms: Option<NonZeroU64>,
    /// How long a stop waits for requests in flight [default: 30000].
    #[arg(long, value_name = "MS", help_heading = "Bounds")]
    drain_timeout_ms: Option<NonZeroU64>,
    /// Largest request body [default: 33554432].
    #[arg(long, value_name = "BYTES", help_heading = "Bounds")]
    body_limit_bytes: Option<usize>,
    /// Most requests in flight; further ones are answered with 503 [default: 4096].
    #[arg(long, value_name = "COUNT", help_heading = "Bounds")]
    in_flight_limit: Option<usize>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    /// Through a shared folder.
    Fs,
    /// From server to server.
    P2p,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Order {
    /// Prefill first; decode when it has answered.
    Sequential,
    /// Both at once: decode takes layers while prefill computes others.
    Concurrent,
}

#[derive(Debug, thiserror::Error)]
enum ProxyFailure {
    #[error("cannot listen on {address}: {source}")]
    Listen { address: String, source: io::Error },
    #[error("the runtime cannot start: {0}")]
    Runtime(io::Error),
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Serves until SIGTERM or SIGINT, then finishes what was begun.
pub(crate) fn run(arguments: ProxyArguments) -> Exit {
    match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => report(runtime.block_on(listen_and_serve(arguments))),
        Err(error) => report(Err(ProxyFailure::Runtime(error))),
    }
}

async fn listen_and_serve(arguments: ProxyArguments) -> Result<(), ProxyFailure> {
    // Before anything else, so that a signal during start is not lost.
    let mut terminate = signal(SignalKind::terminate()).map_err(ProxyFailure::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ProxyFailure::Runtime)?;
    let address = (arguments.host.clone(), arguments.port);
    let failed = |source| ProxyFailure::Listen {
        address: format!("{}:{}", address.0, address.1),
        source,
    };
    let listener = TcpListener::bind((address.0.as_str(), address.1))
        .await
        .map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    let config = arguments.into_config();
    let names = |servers: &[UpstreamAddress]| {
        servers
            .iter()
            .map(UpstreamAddress::authority)
            .collect::<Vec<_>>()
            .join(",")
    };
    tracing::info!(
        address = %local,
        prefill = names(&config.prefill),
        decode = names(&config.decode),
        backend = ?config.backend,
        dispatch = ?config.dispatch,
        "listening"
    );
    let shutdown = async move {
        tokio::select! {
            _signal = terminate.recv() => tracing::info!("SIGTERM"),
            _signal = interrupt.recv() => tracing::info!("SIGINT"),
        }
    };
    Ok(serve(listener, config, shutdown).await?)
}

fn report(result: Result<(), ProxyFailure>) -> Exit {
    let Err(failure) = result else { return Exit::Ok };
    tracing::error!("{failure}");
    match failure {
        ProxyFailure::Serve(ServeError::Config(_)) => Exit::Usage,
        _ => Exit::Problem,
    }
}

impl ProxyArguments {
    fn into_config(self) -> ProxyConfig {
        let backend = match self.kv_backend {
            Backend::Fs => KvBackend::Fs,
            Backend::P2p => KvBackend::P2p,
        };
        let mut config = ProxyConfig::new(self.prefill, self.decode, backend);
        config.kv_port = self.kv_port;
        config.dispatch = match self.dispatch {
            Order::Sequential => Dispatch::Sequential,
            Order::Concurrent => Dispatch::Concurrent,
        };
        for (given, setting) in [
            (self.connect_timeout_ms, &mut config.connect_timeout),
            (self.prefill_timeout_ms, &mut config.prefill_timeout),
            (self.first_byte_timeout_ms, &mut config.first_byte_timeout),
            (self.idle_timeout_ms, &mut config.idle_timeout),
            (self.drain_timeout_ms, &mut config.drain_timeout),
        ] {
            if let Some(milliseconds) = given {
                *setting = Duration::from_millis(milliseconds.get());
            }
        }
        config.body_limit_bytes = self.body_limit_bytes.unwrap_or(config.body_limit_bytes);
        config.in_flight_limit = self.in_flight_limit.unwrap_or(config.in_flight_limit);
        config
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Alone {
        #[command(flatten)]
        proxy: ProxyArguments,
    }

    fn config(more: &[&str]) -> ProxyConfig {
        let needed = [
            "proxy",
            "--prefill",
            "http://a:1,http://b:2",
            "--decode",
            "http://c:3",
            "--kv-backend",
            "p2p",
        ];
        Alone::try_parse_from(needed.iter().chain(more))
            .unwrap()
            .proxy
            .into_config()
    }

    #[test]
    fn the_defaults_that_help_names_are_the_librarys() {
        use clap::CommandFactory;
        let help = Alone::command().render_long_help().to_string();
        let config = config(&[]);
        let milliseconds = [
            config.connect_timeout,
            config.prefill_timeout,
            config.first_byte_timeout,
            config.idle_timeout,
            config.drain_timeout,
        ]
        .map(|wait| wait.as_millis().to_string());
        let counts = [config.body_limit_bytes, config.in_flight_limit].map(|count| count.to_string());
        let named: Vec<&str> = help
            .split("[default: ")
            .skip(1)
            .filter_map(|rest| rest.split_once(']'))
            .map(|(value, _)| value)
            .filter(|value| !["0.0.0.0", "8080", "14579", "sequential"].contains(value))
            .collect();
        let expected: Vec<&str> = milliseconds.iter().chain(&counts).map(String::as_str).collect();
        assert_eq!(named, expected);
    }

    #[test]
    fn every_option_reaches_its_setting() {
        let config = config(&[
            "--kv-port=1",
            "--dispatch=concurrent",
            "--connect-timeout-ms=2",
            "--prefill-timeout-ms=3",
            "--first-byte-timeout-ms=4",
            "--idle-timeout-ms=5",
            "--drain-timeout-ms=6",
            "--body-limit-bytes=7",
            "--in-flight-limit=8",
        ]);
        assert_eq!(
            (config.prefill.len(), config.decode.len(), config.backend),
            (2, 1, KvBackend::P2p)
        );
        let waits = [
            config.connect_timeout,
            config.prefill_timeout,
            config.first_byte_timeout,
            config.idle_timeout,
            config.drain_timeout,
        ];
        assert_eq!((config.kv_port, config.dispatch), (1, Dispatch::Concurrent));
        assert_eq!(waits.map(|wait| wait.as_millis()), [2, 3, 4, 5, 6]);
        assert_eq!((config.body_limit_bytes, config.in_flight_limit), (7, 8));
    }
}
