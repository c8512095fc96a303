//! What a load run showed, as a table and as JSON under the names of `vllm bench serve`.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::load::client::{Counted, Failure, Measured};
use super::percentile::Percentile;

/// A latency that is reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Metric {
    /// Time to the first token.
    Ttft,
    /// Time per output token after the first.
    Tpot,
    /// Time between arrivals of tokens.
    Itl,
    /// Time to the last token.
    E2el,
}

impl Metric {
    const fn name(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2el => "e2el",
        }
    }

    /// The values of one request, in milliseconds.
    fn values(self, measured: &Measured, choices: u32) -> Vec<f64> {
        match self {
            Self::Ttft => vec![milliseconds(measured.ttft)],
            Self::Tpot => measured.tpot_ms(choices).into_iter().collect(),
            Self::Itl => measured.gaps.iter().copied().map(milliseconds).collect(),
            Self::E2el => vec![milliseconds(measured.latency)],
        }
    }
}

/// A latency that a good request stays within.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    metric: Metric,
    milliseconds: f64,
}

impl std::str::FromStr for Objective {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("wanted ttft:MS, tpot:MS or e2el:MS, got {text:?}");
        let (name, value) = text.split_once(':').ok_or_else(wanted)?;
        let metric = match name {
            "ttft" => Metric::Ttft,
            "tpot" => Metric::Tpot,
            "e2el" => Metric::E2el,
            _ => return Err(wanted()),
        };
        let milliseconds =
            value.parse().ok().filter(|ms: &f64| ms.is_finite() && *ms > 0.0).ok_or_else(wanted)?;
        Ok(Self { metric, milliseconds })
    }
}

/// Everything that a run brought.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) results: Vec<Result<Measured, Failure>>,
    pub(super) duration: Duration,
    /// Choices of each request (`n`).
    pub(super) choices: u32,
}

/// Which figures are wanted.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) metrics: Vec<Metric>,
    pub(super) percentiles: Vec<Percentile>,
    pub(super) objectives: Vec<Objective>,
}

/// Mean, deviation and percentiles of one metric, in milliseconds.
#[derive(Debug, Clone, PartialEq)]
struct Summary {
    mean: f64,
    median: f64,
    deviation: f64,
    percentiles: Vec<(String, f64)>,
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A count as a number to divide; exact below 2⁵³.
fn real(count: u64) -> f64 {
    count as f64
}

impl Measured {
    /// Mean time per output token of a choice after its first; `None` for a single token.
    fn tpot_ms(&self, choices: u32) -> Option<f64> {
        let tokens = real(self.output_tokens) / f64::from(choices.max(1));
        (tokens > 1.0)
            .then(|| milliseconds(self.latency.saturating_sub(self.ttft)) / (tokens - 1.0))
    }
}

impl Objective {
    fn is_met(self, measured: &Measured, choices: u32) -> bool {
        self.metric.values(measured, choices).iter().all(|value| *value <= self.milliseconds)
    }
}

impl Summary {
    fn of(mut values: Vec<f64>, percentiles: &[Percentile]) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let count = real(u64::try_from(values.len()).ok()?);
        let median = Percentile::MEDIAN.of(&values)?;
        let mean = values.iter().sum::<f64>() / count;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
        let percentiles =
            percentiles.iter().filter_map(|p| Some((p.to_string(), p.of(&values)?))).collect();
        Some(Self { mean, median, deviation: variance.sqrt(), percentiles })
    }
}

impl Outcome {
    fn measured(&self) -> impl Iterator<Item = &Measured> {
        self.results.iter().filter_map(|result| result.as_ref().ok())
    }

    /// Requests that ended well.
    pub(super) fn completed(&self) -> usize {
        self.measured().count()
    }

    /// How often each failure came.
    fn failures(&self) -> BTreeMap<String, u64> {
        let mut counts = BTreeMap::new();
        for failure in self.results.iter().filter_map(|result| result.as_ref().err()) {
            *counts.entry(failure.to_string()).or_insert(0) += 1;
        }
        counts
    }

    fn good(&self, objectives: &[Objective]) -> u64 {
        let is_good = |measured: &&Measured| {
            objectives.iter().all(|goal| goal.is_met(measured, self.choices))
        };
        self.measured().filter(is_good).count() as u64
    }

    fn summary(&self, metric: Metric, percentiles: &[Percentile]) -> Option<Summary> {
        Summary::of(
            self.measured().flat_map(|measured| metric.values(measured, self.choices)).collect(),
            percentiles,
        )
    }

    /// Every figure under the name that `vllm bench serve` writes it with, in milliseconds and per second.
    pub(super) fn figures(&self, wanted: &Wanted) -> Map<String, Value> {
        let seconds = self.duration.as_secs_f64().max(1e-9);
        let completed = self.completed() as u64;
        let prompt_tokens: u64 = self.measured().map(|measured| measured.prompt_tokens).sum();
        let output_tokens: u64 = self.measured().map(|measured| measured.output_tokens).sum();
        let by_arrivals =
            self.measured().filter(|measured| measured.counted == Counted::ByArrivals).count();
        let mut figures = Map::new();
        let mut put = |name: &str, value: Value| figures.insert(name.to_owned(), value);
        put("duration", json!(seconds));
        put("completed", json!(completed));
        put("failed", json!(self.results.len() as u64 - completed));
        put("failures", json!(self.failures()));
        put("total_input_tokens", json!(prompt_tokens));
        put("total_output_tokens", json!(output_tokens));
        put("requests_without_usage", json!(by_arrivals));
        put("request_throughput", json!(real(completed) / seconds));
        if !wanted.objectives.is_empty() {
            put("request_goodput", json!(real(self.good(&wanted.objectives)) / seconds));
        }
        put("output_throughput", json!(real(output_tokens) / seconds));
        put("total_token_throughput", json!(real(prompt_tokens + output_tokens) / seconds));
        for metric in &wanted.metrics {
            if let Some(summary) = self.summary(*metric, &wanted.percentiles) {
                figures.extend(summary_figures(metric.name(), &summary));
            }
        }
        figures
    }
}

fn summary_figures(name: &str, summary: &Summary) -> Vec<(String, Value)> {
    let mut figures = vec![
        (format!("mean_{name}_ms"), json!(summary.mean)),
        (format!("median_{name}_ms"), json!(summary.median)),
        (format!("std_{name}_ms"), json!(summary.deviation)),
    ];
    figures.extend(
        summary.percentiles.iter().map(|(p, value)| (format!("p{p}_{name}_ms"), json!(value))),
    );
    figures
}

/// Writes the figures as lines of name and value; failures come with their reasons.
pub(super) fn write_table(
    figures: &Map<String, Value>,
    out: &mut impl Write,
) -> std::io::Result<()> {
    for (name, value) in figures {
        match value {
            Value::Object(counts) => {
                for (reason, count) in counts {
                    writeln!(out, "{:<28}{:>14}  {reason}", "  failed", count.to_string())?;
                }
            }
            Value::Number(number) if number.is_f64() => {
                writeln!(out, "{name:<28}{:>14.2}", number.as_f64().unwrap_or_default())?;
            }
            _ => writeln!(out, "{name:<28}{:>14}", value.to_string())?,
        }
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(ttft: u64, latency: u64, output_tokens: u64) -> Measured {
        Measured {
            prompt_tokens: 10,
            output_tokens,
            ttft: Duration::from_millis(ttft),
            gaps: vec![Duration::from_millis(10); 2],
            latency: Duration::from_millis(latency),
            counted: Counted::ByServer,
        }
    }

    fn outcome(results: Vec<Result<Measured, Failure>>) -> Outcome {
        Outcome { results, duration: Duration::from_secs(2), choices: 1 }
    }

    fn wanted(objectives: &[&str]) -> Wanted {
        Wanted {
            metrics: vec![Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el],
            percentiles: vec!["99".parse().unwrap()],
            objectives: objectives.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn figures_are_those_of_a_known_run() {
        let figures = outcome(vec![
            Ok(measured(100, 300, 5)),
            Ok(measured(300, 700, 5)),
            Err(Failure::Connect),
        ])
        .figures(&wanted(&["ttft:200", "tpot:50"]));
        let number = |name: &str| figures[name].as_f64().unwrap();
        assert_eq!((number("completed"), number("failed")), (2.0, 1.0));
        assert_eq!(figures["failures"]["cannot connect"], 1);
        assert_eq!((number("output_throughput"), number("total_token_throughput")), (5.0, 15.0));
        assert_eq!((number("mean_ttft_ms"), number("median_e2el_ms")), (200.0, 500.0));
        assert!(
            (number("mean_tpot_ms") - 75.0).abs() < 1e-9
                && (number("p99_ttft_ms") - 298.0).abs() < 1e-9
        );
        assert_eq!(number("request_goodput"), 0.5);
    }

    #[test]
    fn a_single_token_has_no_time_per_token_and_no_run_divides_by_zero() {
        let figures = outcome(vec![Ok(measured(100, 100, 1))]).figures(&wanted(&[]));
        assert!(!figures.contains_key("mean_tpot_ms") && !figures.contains_key("request_goodput"));
        let empty =
            Outcome { results: vec![], duration: Duration::ZERO, choices: 1 }.figures(&wanted(&[]));
        assert_eq!(empty["request_throughput"], 0.0);
    }

    #[test]
    fn time_per_token_counts_the_tokens_of_one_choice() {
        assert_eq!(measured(0, 100, 22).tpot_ms(2), Some(10.0));
    }

    #[test]
    fn objectives_that_are_not_measured_are_refused() {
        for text in ["ttft", "itl:5", "ttft:0", "ttft:NaN", "x:1", ""] {
            assert!(text.parse::<Objective>().is_err(), "{text}");
        }
    }
}
