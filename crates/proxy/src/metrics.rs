//! The proxy's own metrics, in the text form that Prometheus reads.

use std::time::Duration;

use http::StatusCode;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// What [`Metrics::text`] is written in.
pub(crate) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Code under which a request is counted whose client left before a status was sent (nginx's convention).
const CLIENT_LEFT: u16 = 499;

/// Part of the work on a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// Reading the client's request.
    Receive,
    /// Waiting for the prefill server.
    Prefill,
    /// Waiting for, or streaming from, the decode server.
    Decode,
}

/// Why decode worked without a prefill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fallback {
    /// No prefill server took a connection, or all were just found not to.
    Unreachable,
    /// Prefill did not answer in time.
    TimedOut,
    /// Prefill broke off its answer.
    Broken,
    /// Prefill answered that it cannot serve now.
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    code: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StageLabel {
    stage: Stage,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Fallback,
}

/// All metrics of one proxy.
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    stage_seconds: Family<StageLabel, Histogram, Seconds>,
    first_token_seconds: Histogram,
    fallbacks: Family<ReasonLabel, Counter>,
    cancelled: Family<StageLabel, Counter>,
    broken: Counter,
    pub(crate) in_flight: Gauge,
}

/// Buckets from a millisecond (a short prefill on an idle GPU) to ten minutes (a long generation).
#[derive(Clone)]
struct Seconds;

impl MetricConstructor<Histogram> for Seconds {
    fn new_metric(&self) -> Histogram {
        Histogram::new([
            0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
            300.0, 600.0,
        ])
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("kvlane_proxy"),
            requests: Family::default(),
            stage_seconds: Family::new_with_constructor(Seconds),
            first_token_seconds: Seconds.new_metric(),
            fallbacks: Family::default(),
            cancelled: Family::default(),
            broken: Counter::default(),
            in_flight: Gauge::default(),
        };
        let registry = &mut metrics.registry;
        registry.register(
            "requests",
            "Requests answered, by route and status",
            metrics.requests.clone(),
        );
        registry.register(
            "stage_seconds",
            "Time a completed request spent in a stage",
            metrics.stage_seconds.clone(),
        );
        registry.register(
            "time_to_first_token_seconds",
            "From a streaming request's head to the first byte of its answer",
            metrics.first_token_seconds.clone(),
        );
        registry.register(
            "fallbacks",
            "Requests that decode served without a prefill",
            metrics.fallbacks.clone(),
        );
        registry.register(
            "cancelled",
            "Requests whose client left before the end, by stage",
            metrics.cancelled.clone(),
        );
        registry.register(
            "broken",
            "Answers that broke off after their first byte",
            metrics.broken.clone(),
        );
        registry.register("in_flight", "Requests being worked on", metrics.in_flight.clone());
        // A series that appears only with its first event looks like a gap on a dashboard.
        for reason in [
            Fallback::Unreachable,
            Fallback::TimedOut,
            Fallback::Broken,
            Fallback::Failed,
        ] {
            drop(metrics.fallbacks.get_or_create(&ReasonLabel { reason }));
        }
        for stage in [Stage::Receive, Stage::Prefill, Stage::Decode] {
            drop(metrics.cancelled.get_or_create(&StageLabel { stage }));
        }
        metrics
    }

    pub(crate) fn answered(&self, route: &'static str, status: Option<StatusCode>) {
        let code = u32::from(status.map_or(CLIENT_LEFT, |status| status.as_u16()));
        self.requests.get_or_create(&RequestLabels { route, code }).inc();
    }

    pub(crate) fn stage_done(&self, stage: Stage, spent: Duration) {
        self.stage_seconds
            .get_or_create(&StageLabel { stage })
            .observe(spent.as_secs_f64());
    }

    pub(crate) fn first_token(&self, spent: Duration) {
        self.first_token_seconds.observe(spent.as_secs_f64());
    }

    pub(crate) fn fell_back(&self, reason: Fallback) {
        self.fallbacks.get_or_create(&ReasonLabel { reason }).inc();
    }

    pub(crate) fn cancelled(&self, stage: Stage) {
        self.cancelled.get_or_create(&StageLabel { stage }).inc();
    }

    pub(crate) fn broke_off(&self) {
        self.broken.inc();
    }

    /// The page for `GET /metrics`.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Receive => "receive",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

impl Fallback {
    /// The word used in labels, headers and logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::TimedOut => "timeout",
            Self::Broken => "broken",
            Self::Failed => "failed",
        }
    }
}

impl EncodeLabelValue for Stage {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.name(), encoder)
    }
}

impl EncodeLabelValue for Fallback {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        EncodeLabelValue::encode(&self.name(), encoder)
    }
}
