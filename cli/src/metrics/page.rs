//! A page of metrics, in the text format that Prometheus reads.

use std::fmt;

use farpage_agent::latency::Histogram;
use prometheus_client::collector::Collector;
pub(super) use prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

/// What all names begin with.
const PREFIX: &str = "farpage";

/// A part's figures at one moment, as they are told.
pub(crate) trait Figures: fmt::Debug + Send + Sync + 'static {
    /// Writes all of them.
    fn tell(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// What a metric counts. The format derives the end of its name from it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Bytes at the moment: `_bytes`.
    Bytes,
    /// Things at the moment.
    Gauge,
    /// Events since the start: `_total`.
    Counter,
}

/// What tells a metric's series apart.
pub(crate) type Labels = Vec<(&'static str, String)>;

/// A page being written.
pub(crate) struct Page<'a>(DescriptorEncoder<'a>);

/// The text of a page. Each is made anew: what is gone is on no further one.
pub(crate) fn text<F: Figures>(figures: F) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Told(figures)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Told<F>(F);

impl<F: Figures> Collector for Told<F> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page(encoder);
        let version = vec![("version", env!("CARGO_PKG_VERSION").to_owned())];
        let help = "Which version of farpage this is; always 1.";
        page.each(Kind::Gauge, "build_info", help, [(version, 1)])?;
        self.0.tell(&mut page)
    }
}

impl Page<'_> {
    /// A metric of one series.
    pub(crate) fn one(&mut self, kind: Kind, name: &str, help: &str, value: u64) -> fmt::Result {
        self.each(kind, name, help, [(Labels::new(), value)])
    }

    /// A metric with a series for each of these labels.
    pub(crate) fn each(
        &mut self,
        kind: Kind,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = (Labels, u64)>,
    ) -> fmt::Result {
        let (unit, metric_type) = match kind {
            Kind::Bytes => (Some(&Unit::Bytes), MetricType::Gauge),
            Kind::Gauge => (None, MetricType::Gauge),
            Kind::Counter => (None, MetricType::Counter),
        };
        let mut metric = self.0.encode_descriptor(name, help, unit, metric_type)?;
        for (labels, value) in series {
            let mut one = metric.encode_family(&labels)?;
            match kind {
                Kind::Counter => one.encode_counter::<NoLabelSet, _, u64>(&value, None)?,
                // The format's integers are signed; nothing here counts that far.
                Kind::Bytes | Kind::Gauge => {
                    one.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX))?;
                }
            }
        }
        Ok(())
    }

    /// Durations, by how long they were: `_seconds`.
    pub(crate) fn durations(&mut self, name: &str, help: &str, told: &Histogram) -> fmt::Result {
        let seconds = Some(&Unit::Seconds);
        let mut metric = self
            .0
            .encode_descriptor(name, help, seconds, MetricType::Histogram)?;
        let count = told.buckets.iter().map(|(_, count)| count).sum();
        metric.encode_histogram::<NoLabelSet>(told.sum_seconds, count, &told.buckets, None)
    }
}
