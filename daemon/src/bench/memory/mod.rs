//! `bindery bench memory`: what paging promises, measured on the real engine. Every section is one table.

mod arithmetic;
mod cost;
mod first_fit;
mod held;
mod live;
mod long_context;
mod occupancy;
mod pressure;
mod sharing;
mod snapshot;
mod throughput;
mod users;

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;

pub use super::model::NamedModel;
use super::model::{BenchModel, SMOLLM2_VOCABULARY, TINY_VOCABULARY};
use super::plot::Plot;
use super::table::{Table, write_json};
use crate::source::Location;

/// What to measure, and where to write it.
#[derive(Debug, Clone, clap::Args)]
pub struct BenchMemoryArgs {
    /// Model for the rows that compute one: a GGUF file, a folder in Hugging Face layout, or hf://org/name[@revision][/file.gguf]; default: none, since only lengths matter
    pub model: Option<Location>,
    /// Sections to measure, in order; default: all but long-context
    #[arg(long, value_enum, value_delimiter = ',', value_name = "SECTIONS", hide_default_value = true, default_values_t = Section::USUAL)]
    pub sections: Vec<Section>,
    /// Seed of lengths and prompts
    #[arg(long, default_value = "0")]
    pub seed: u64,
    /// Threads that compute; default: the cores this process may use
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Also write all tables as JSON to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Also write plots as SVG into this folder: blocks over time, memory against tokens held
    #[arg(long, value_name = "FOLDER")]
    pub svg: Option<PathBuf>,
}

/// A part of the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Bytes and blocks by plain arithmetic
    Arithmetic,
    /// Users at their ends, four ways to hold the memory
    Snapshot,
    /// Users that come and go, four ways to hold the memory
    Live,
    /// Paging by block size, and at a maximum length of 32,000
    BlockSize,
    /// Static waves, continuous batching, paging: tokens a second, idle slots
    Throughput,
    /// Blocks saved by a common beginning, by n, by beams, by turns; the prefix cache on and off
    Sharing,
    /// Preemptions and stalls as memory shrinks
    Pressure,
    /// Attention through scattered blocks against attention over one piece
    Cost,
    /// A prompt of 32,000 tokens among 63 short streams (two to ten minutes)
    LongContext,
}

/// What the sections are measured with.
struct Bench<'a> {
    arguments: &'a BenchMemoryArgs,
    model: Option<BenchModel>,
}

/// What a section brings.
#[derive(Debug, Default)]
struct Found {
    tables: Vec<Table>,
    plots: Vec<Plot>,
}

impl From<Table> for Found {
    fn from(table: Table) -> Self {
        Self { tables: vec![table], plots: Vec::new() }
    }
}

/// Measures and writes tables to `out`, and JSON and plots where they were asked for.
///
/// # Errors
/// When the model is refused, an engine fails or breaks its promise, or a file cannot be written.
pub async fn run(
    arguments: &BenchMemoryArgs,
    model: Option<&NamedModel>,
    out: &mut impl Write,
) -> Result<()> {
    let model = match model {
        Some(model) => Some(model.open(arguments.threads).await?),
        None => None,
    };
    let bench = Bench { arguments, model };
    let mut all = Found::default();
    for &section in &arguments.sections {
        eprintln!("measuring {} ...", section.name());
        let found = bench.measure(section)?;
        found.tables.iter().try_for_each(|table| table.write(out)).context("write the table")?;
        all.tables.extend(found.tables);
        all.plots.extend(found.plots);
    }
    if let Some(path) = &arguments.json {
        let model = bench.model.as_ref().map(|model| model.name.as_str());
        write_json(path, model, arguments.seed, &all.tables)?;
    }
    arguments.svg.as_deref().map_or(Ok(()), |folder| write_plots(folder, &all.plots))
}

impl Section {
    /// Those that take less than a few minutes together.
    const USUAL: [Self; 8] = [
        Self::Arithmetic,
        Self::Snapshot,
        Self::Live,
        Self::BlockSize,
        Self::Throughput,
        Self::Sharing,
        Self::Pressure,
        Self::Cost,
    ];

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

impl Bench<'_> {
    fn measure(&self, section: Section) -> Result<Found> {
        match section {
            Section::Arithmetic => arithmetic::table().map(Found::from),
            Section::Snapshot => occupancy::snapshots(self.arguments.seed),
            Section::Live => occupancy::lives(self.arguments.seed, self.model.as_ref()),
            Section::BlockSize => occupancy::block_sizes(self.arguments.seed),
            Section::Throughput => throughput::tables(&self.tiny()?, self.arguments.seed),
            Section::Sharing => sharing::tables(&self.tiny()?, self.model.as_ref()),
            Section::Pressure => pressure::table(&self.tiny()?, self.arguments.seed),
            Section::Cost => cost::table(),
            Section::LongContext => long_context::table(&self.made_up(SMOLLM2_VOCABULARY)?),
        }
    }

    fn tiny(&self) -> Result<BenchModel> {
        self.made_up(TINY_VOCABULARY)
    }

    fn made_up(&self, vocabulary: u32) -> Result<BenchModel> {
        BenchModel::two_layers(vocabulary, self.arguments.threads)
    }
}

fn write_plots(folder: &Path, plots: &[Plot]) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    plots.iter().try_for_each(|plot| {
        let path = folder.join(format!("{}.svg", plot.key));
        std::fs::write(&path, plot.svg()).with_context(|| format!("write {}", path.display()))
    })
}

#[cfg(test)]
mod tests;
