//! Tables of figures: printed as Markdown that reads well in a terminal, and written as JSON.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};

/// One figure, with the precision that it is printed in.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Text(String),
    Count(usize),
    /// A value and its decimals.
    Real(f64, usize),
    /// A share of 1, printed in hundredths.
    Share(f64),
    /// Nothing to say.
    Empty,
}

/// Rows of figures under one heading.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub(super) title: &'static str,
    pub(super) columns: Vec<&'static str>,
    rows: Vec<Vec<Cell>>,
    /// What the figures mean and what they were measured with.
    notes: Vec<String>,
}

impl Cell {
    pub(super) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A time in milliseconds; empty where there is none.
    pub(super) fn milliseconds(value: Option<f64>) -> Self {
        value.map_or(Self::Empty, |value| Self::Real(value, if value < 10.0 { 2 } else { 0 }))
    }

    /// A share that may not have come about.
    pub(super) fn share(value: Option<f64>) -> Self {
        value.map_or(Self::Empty, Self::Share)
    }

    fn printed(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Count(count) => count.to_string(),
            Self::Real(value, decimals) => format!("{value:.decimals$}"),
            Self::Share(share) if *share > 0.0 && *share < 0.001 => {
                format!("{:.2} %", share * 100.0)
            }
            Self::Share(share) => format!("{:.1} %", share * 100.0),
            Self::Empty => "-".to_owned(),
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Text(text) => json!(text),
            Self::Count(count) => json!(count),
            Self::Real(value, _) | Self::Share(value) => json!(value),
            Self::Empty => Value::Null,
        }
    }

    fn is_text(&self) -> bool {
        matches!(self, Self::Text(_))
    }
}

impl Table {
    pub(super) fn new(title: &'static str, columns: impl Into<Vec<&'static str>>) -> Self {
        Self { title, columns: columns.into(), rows: Vec::new(), notes: Vec::new() }
    }

    pub(super) fn push(&mut self, row: Vec<Cell>) {
        debug_assert_eq!(row.len(), self.columns.len(), "a cell for each column");
        self.rows.push(row);
    }

    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Prints title, notes and rows.
    pub(super) fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        writeln!(out, "## {}\n", self.title)?;
        self.notes.iter().try_for_each(|note| writeln!(out, "{note}"))?;
        let rows: Vec<Vec<String>> =
            self.rows.iter().map(|row| row.iter().map(Cell::printed).collect()).collect();
        let width = |column: usize| {
            let cells = rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.columns[column].chars().count(), 3]).max().unwrap_or_default()
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let titles: Vec<String> = self.columns.iter().map(|title| (*title).to_owned()).collect();
        writeln!(out, "\n{}", self.line(&titles, &widths))?;
        let rule = |(column, width): (usize, &usize)| match self.is_text(column) {
            true => "-".repeat(*width),
            false => format!("{}:", "-".repeat(width - 1)),
        };
        let rules: Vec<String> = widths.iter().enumerate().map(rule).collect();
        writeln!(out, "| {} |", rules.join(" | "))?;
        rows.iter().try_for_each(|row| writeln!(out, "{}", self.line(row, &widths)))?;
        writeln!(out)?;
        out.flush()
    }

    fn line(&self, cells: &[String], widths: &[usize]) -> String {
        let padded =
            cells.iter().zip(widths).enumerate().map(|(column, (cell, &width))| {
                match self.is_text(column) {
                    true => format!("{cell:<width$}"),
                    false => format!("{cell:>width$}"),
                }
            });
        format!("| {} |", padded.collect::<Vec<_>>().join(" | "))
    }

    fn is_text(&self, column: usize) -> bool {
        self.rows.iter().any(|row| row[column].is_text())
    }

    /// The rows as objects whose keys are the columns.
    pub(super) fn json(&self) -> Value {
        let row = |row: &Vec<Cell>| {
            let entries =
                self.columns.iter().zip(row).map(|(title, cell)| (key(title), cell.json()));
            Value::Object(entries.collect::<Map<_, _>>())
        };
        json!({"notes": self.notes, "rows": self.rows.iter().map(row).collect::<Vec<_>>()})
    }

    /// The title as a key.
    pub(super) fn key(&self) -> String {
        key(self.title)
    }
}

/// Writes `tables` to a file, each under its key.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn write_json(
    path: &Path,
    model: Option<&str>,
    seed: u64,
    tables: &[Table],
) -> anyhow::Result<()> {
    let mut figures = Map::new();
    figures.insert("model".into(), json!(model));
    figures.insert("seed".into(), json!(seed));
    figures.extend(tables.iter().map(|table| (table.key(), table.json())));
    let text = format!("{:#}\n", Value::Object(figures));
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// A heading in lower case with underscores.
fn key(title: &str) -> String {
    let lower = title.to_lowercase().replace('%', "percent");
    let words = lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new("A table", ["who", "TTFT, ms", "filled"]);
        table.note("What it means.");
        table.push(vec![Cell::text("paged"), Cell::Real(1.25, 1), Cell::Share(0.976)]);
        table.push(vec![Cell::text("x"), Cell::Empty, Cell::Share(0.0003)]);
        table
    }

    #[test]
    fn a_table_is_aligned_markdown() {
        let mut out = Vec::new();
        table().write(&mut out).unwrap();
        let wanted = "## A table\n\nWhat it means.\n\n\
                      | who   | TTFT, ms | filled |\n\
                      | ----- | -------: | -----: |\n\
                      | paged |      1.2 | 97.6 % |\n\
                      | x     |        - | 0.03 % |\n\n";
        assert_eq!(String::from_utf8(out).unwrap(), wanted);
    }

    #[test]
    fn json_has_an_object_for_each_row() {
        let json = table().json();
        assert_eq!(json["rows"][0], json!({"who": "paged", "ttft_ms": 1.25, "filled": 0.976}));
        assert_eq!(json["rows"][1]["ttft_ms"], Value::Null);
        assert_eq!(table().key(), "a_table");
    }
}
