//! The command as a whole: its words, its tables, what it writes.

use clap::Parser;
use serde_json::Value;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    arguments: BenchMemoryArgs,
}

async fn bench(line: &str) -> Result<String> {
    let words = std::iter::once("bench").chain(line.split_whitespace());
    let mut out = Vec::new();
    run(&Line::parse_from(words).arguments, None, &mut out).await?;
    Ok(String::from_utf8(out)?)
}

#[test]
fn every_section_but_the_slowest_is_measured_by_default() {
    let mut sections = Line::parse_from(["bench"]).arguments.sections;
    sections.push(Section::LongContext);
    assert_eq!(sections, Section::value_variants());
}

#[tokio::test]
async fn tables_are_printed_and_written_as_json() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("figures.json");
    let line = format!("--sections arithmetic --json {} --seed 3", path.display());
    let printed = bench(&line).await.unwrap();
    assert!(printed.contains("| KV of a token") && printed.contains("864 | MiB"), "{printed}");
    let figures: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(figures["seed"], 3);
    assert_eq!(figures["arithmetic"]["rows"][0]["figure"], 512);
}

#[tokio::test]
async fn what_cannot_be_written_is_said_with_its_path() {
    let error = bench("--sections arithmetic --json /nowhere/x.json").await.unwrap_err();
    assert!(format!("{error:#}").contains("/nowhere/x.json"), "{error:#}");
}
