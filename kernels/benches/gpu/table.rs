//! One line a measurement.

use serde_json::{Value, json};

use crate::timer::Timer;

/// What was measured, and what it is held against.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) operation: &'static str,
    pub(crate) shape: String,
    /// Microseconds of one launch.
    pub(crate) time: f64,
    /// What memory or arithmetic allow, in microseconds.
    pub(crate) floor: f64,
    /// What the rival takes, in microseconds, and its name.
    pub(crate) rival: Option<(f64, &'static str)>,
    /// The figure that people know, such as GB/s.
    pub(crate) figure: String,
}

pub(crate) fn print(rows: &[Row]) {
    println!(
        "{:<16} {:<28} {:>10} {:>10} {:>8} {:>10} {:>8}  figure",
        "operation", "shape", "us", "floor us", "of floor", "rival us", "faster"
    );
    for row in rows {
        let rival = row.rival.map_or("-".to_owned(), |(time, _)| format!("{time:.1}"));
        let faster =
            row.rival.map_or("-".to_owned(), |(time, _)| format!("{:.2}", time / row.time));
        println!(
            "{:<16} {:<28} {:>10.1} {:>10.1} {:>7.0}% {rival:>10} {faster:>8}  {}",
            row.operation,
            row.shape,
            row.time,
            row.floor,
            row.floor / row.time * 100.0,
            row.figure
        );
    }
}

pub(crate) fn json(timer: &Timer, rows: &[Row]) -> Value {
    let row = |row: &Row| {
        json!({
            "operation": row.operation, "shape": row.shape, "microseconds": row.time, "floor": row.floor,
            "rival": row.rival.map(|(time, name)| json!({"microseconds": time, "name": name})), "figure": row.figure,
        })
    };
    json!({
        "device": timer.kernels.name(), "copy_gb_per_s": timer.copy_rate,
        "rows": rows.iter().map(row).collect::<Vec<_>>(),
    })
}
