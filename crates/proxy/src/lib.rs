//! The prefill/decode proxy: one OpenAI request in, two vLLM requests out.
//!
//! The same prompt goes first to a prefill server, which answers one token and leaves its KV cache where decode finds it,
//! and then, unchanged, to a decode server, whose answer is streamed to the client byte for byte. With [`Dispatch::Concurrent`]
//! both are called at once. Both calls carry one `X-Request-Id` from which kvlane's connectors recognise the pair (see
//! [`request_id`]).
//!
//! What holds:
//!
//! - The decode server sees the client's body byte for byte, and the client sees decode's answer byte for byte.
//! - A prefill server that is down, slow or broken costs speed, never the request: decode recomputes.
//! - An answer that breaks off after its first byte breaks off for the client too; it never looks complete.
//! - A client that goes away takes its upstream request with it, in both phases.
//! - Bodies, requests in flight and every wait for a server or a client have a bound.
//!
//! [`serve`] runs it on a listener of the caller's; [`Proxy::router`] gives the axum router to embed elsewhere.

#![forbid(unsafe_code)]

pub mod config;
pub mod request_id;
pub mod rewrite;

mod beside;
mod client;
mod client_body;
mod error;
mod exchange;
mod headers;
mod health;
mod metrics;
mod routes;
mod server;
mod split;
mod upstream;

pub use config::{ConfigError, Dispatch, KvBackend, ProxyConfig, UpstreamAddress};
pub use headers::{CLIENT_REQUEST_ID, PREFILL_OUTCOME, TRANSFER_ID};
pub use routes::Proxy;
pub use server::{ServeError, serve};
