use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

/// Every exported family in the order of names: its type, its labels, and a histogram's buckets.
const GOLDEN: &str = include_str!("golden.txt");

fn loaded() -> Metrics {
    let metrics = Metrics::new("tiny").unwrap();
    let cache_dtype = "float16".to_owned();
    let gpu_memory_utilization = "None".to_owned();
    let config = CacheConfig {
        block_size: 16,
        num_gpu_blocks: 100,
        cache_dtype,
        gpu_memory_utilization,
        enable_prefix_caching: true,
    };
    metrics.set_cache_config(&config);
    metrics.set_memory(MemoryUse { weights: 1, kv: 2, workspace: 3, other: 4 });
    metrics.load_stage("weights", Duration::from_millis(1500));
    metrics.http("POST", 200, "/v1/completions", Duration::from_millis(20));
    metrics
}

fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is not there:\n{text}")).parse().unwrap()
}

/// A family as Prometheus sees it.
#[derive(Default)]
struct Family<'a> {
    kind: &'a str,
    labels: BTreeSet<&'a str>,
    buckets: Vec<&'a str>,
}

impl<'a> Family<'a> {
    /// Takes what stands between the braces of a series.
    fn add(&mut self, labels: &'a str) {
        for label in labels.split("\",") {
            let Some((name, value)) = label.split_once("=\"") else { continue };
            let value = value.trim_end_matches('"');
            if name != "le" {
                self.labels.insert(name);
            } else if !self.buckets.contains(&value) {
                self.buckets.push(value);
            }
        }
    }

    fn line(&self, name: &str) -> String {
        let labels = self.labels.iter().copied().collect::<Vec<_>>().join(",");
        let buckets = self.buckets.join(" ");
        format!("{name} {} {{{labels}}} {buckets}", self.kind).trim_end().to_owned()
    }
}

/// The families of an exposition, whose series follow the line with their type.
fn families(text: &str) -> BTreeMap<&str, Family<'_>> {
    let mut families = BTreeMap::new();
    let mut current: Option<&mut Family<'_>> = None;
    for line in text.lines() {
        if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|line| line.split_once(' '))
        {
            current = Some(families.entry(name).or_insert(Family { kind, ..Family::default() }));
        } else if let (Some(family), Some((_, labels))) = (&mut current, line.split_once('{')) {
            family.add(labels.rsplit_once('}').map_or(labels, |(labels, _)| labels));
        }
    }
    families
}

#[test]
fn the_exported_names_types_labels_and_buckets_are_the_golden_ones() {
    let text = loaded().render();
    let lines: Vec<String> =
        families(&text).iter().map(|(name, family)| family.line(name)).collect();
    let golden: Vec<&str> = GOLDEN.lines().collect();
    assert_eq!(
        lines,
        golden,
        "write this to metrics/golden.txt when the change is meant:\n{}",
        lines.join("\n")
    );
}

#[test]
fn a_step_is_counted_exactly() {
    let mut recorder = Recorder(Arc::new(loaded()));
    let blocks = BlockStats {
        total: 100,
        used: 10,
        shared: 2,
        saved: 3,
        cached: 20,
        free: 70,
        filled_slots: 120,
        block_size: 16,
    };
    let step = StepStats {
        running: 4,
        waiting: 1,
        prefill_tokens: 30,
        decode_tokens: 3,
        blocks,
        preemptions: 2,
        recomputed_tokens: 17,
        forked_blocks: 5,
        prefix_copied_slots: 8,
        discarded_tokens: 1,
        prefix_queries: 50,
        prefix_hits: 20,
        generated_tokens: 4,
        ..StepStats::default()
    };
    recorder.step(&step);
    let text = recorder.0.render();
    let vllm =
        |name: &str| value(&text, &format!("vllm:{name}{{engine=\"0\",model_name=\"tiny\"}}"));
    assert_eq!((vllm("num_requests_running"), vllm("num_requests_waiting")), (4.0, 1.0));
    assert_eq!(
        (
            vllm("prompt_tokens_total"),
            vllm("prompt_tokens_cached_total"),
            vllm("generation_tokens_total")
        ),
        (50.0, 20.0, 4.0)
    );
    assert_eq!((vllm("num_preemptions_total"), vllm("kv_cache_usage_perc")), (2.0, 0.1));
    assert_eq!(value(&text, "bindery_token_slot_occupancy_ratio"), 0.75);
    assert_eq!(value(&text, "bindery_blocks{state=\"cached\"}"), 20.0);
    assert_eq!(value(&text, "bindery_recomputed_tokens_total{reason=\"memory\"}"), 17.0);
    assert_eq!(
        (value(&text, "bindery_forked_blocks_total"), value(&text, "bindery_blocks_saved")),
        (5.0, 3.0)
    );
    recorder.idle(&BlockStats { total: 100, free: 100, block_size: 16, ..BlockStats::default() });
    let text = recorder.0.render();
    assert_eq!(value(&text, "bindery_blocks{state=\"used\"}"), 0.0);
    assert_eq!(value(&text, "vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"}"), 0.0);
}

#[test]
fn an_ended_choice_is_counted_by_its_reason_and_times() {
    let mut recorder = Recorder(Arc::new(loaded()));
    let at = Duration::from_millis;
    recorder.choice(&ChoiceStats {
        reason: FinishReason::Stop,
        prompt_tokens: 30,
        cached_tokens: 16,
        output_tokens: 5,
        max_tokens: 9,
        choices: 1,
        admitted: Some(at(100)),
        first_token: Some(at(600)),
        finished: at(1000),
    });
    let text = recorder.0.render();
    let labels = "engine=\"0\",model_name=\"tiny\"";
    assert_eq!(
        value(
            &text,
            "vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"}"
        ),
        1.0
    );
    let sum = |name: &str| value(&text, &format!("vllm:{name}_sum{{{labels}}}"));
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} is not {b}");
    close(sum("request_queue_time_seconds"), 0.1);
    close(sum("request_prefill_time_seconds"), 0.5);
    close(sum("request_decode_time_seconds"), 0.4);
    close(sum("request_time_per_output_token_seconds"), 0.1);
    close(sum("request_prefill_kv_computed_tokens"), 14.0);
}

#[test]
fn promtool_finds_only_what_vllm_itself_has() {
    let Some(promtool) = std::env::var_os("BINDERY_TEST_PROMTOOL").filter(|path| !path.is_empty())
    else {
        eprintln!(
            "NOT RUN: promtool_finds_only_what_vllm_itself_has, BINDERY_TEST_PROMTOOL names no promtool"
        );
        return;
    };
    let mut child = Command::new(promtool)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(loaded().render().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let mut findings: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
    findings.sort_unstable();
    let text = loaded().render();
    let vllm = families(&text).into_keys().filter(|name| name.starts_with("vllm:"));
    let mut known: Vec<String> =
        vllm.map(|name| format!("{name} metric names should not contain ':'")).collect();
    // A histogram, whatever its name says.
    known.push(
        "vllm:iteration_tokens_total non-counter metrics should not have \"_total\" suffix"
            .to_owned(),
    );
    known.sort_unstable();
    assert_eq!(findings, known);
}

#[test]
fn methods_that_clients_invent_share_one_series() {
    let metrics = loaded();
    for index in 0..50 {
        metrics.http(&format!("X{index}"), 405, "/v1/models", Duration::ZERO);
    }
    let series = "http_requests_total{handler=\"/v1/models\",method=\"other\",status=\"4xx\"}";
    assert_eq!(value(&metrics.render(), series), 50.0);
}
