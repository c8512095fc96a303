//! Each GPU kernel against its floor and its rival, in one run: `make bench-gpu`. Random data, inputs several times the second
//! cache, replays of captured graphs, medians. `--json FILE` writes the rows too, other words name operations to run alone.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "it prints a table")]
#![allow(clippy::cast_possible_truncation, reason = "sizes of the benchmark are small")]

mod linear;
mod paged_decode;
mod paged_prefill;
mod rows;
mod sample;
mod table;
mod timer;

use table::Row;
use timer::Timer;

type Bench = fn(&Timer) -> Result<Vec<Row>, Box<dyn std::error::Error>>;

const BENCHES: [(&str, Bench); 5] = [
    ("linear", linear::rows),
    ("paged_decode", paged_decode::rows),
    ("paged_prefill", paged_prefill::rows),
    ("rows", rows::rows),
    ("sample", sample::rows),
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let (mut json, mut names) = (None, Vec::new());
    while let Some(word) = words.next() {
        if word == "--json" { json = words.next() } else { names.push(word) }
    }
    let timer = Timer::new()?;
    println!("{}: copies {:.0} GB/s, read and written", timer.kernels.name(), timer.copy_rate);
    let mut rows = Vec::new();
    for (name, bench) in BENCHES {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            rows.extend(bench(&timer)?);
        }
    }
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_string_pretty(&table::json(&timer, &rows))?)?;
    }
    table::print(&rows);
    Ok(())
}
