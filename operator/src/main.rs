//! The `bindery-operator` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use operator::config::Config;
use operator::{check, controller};

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let done = match (words.next().as_deref(), words.next()) {
        (Some("check"), Some(base)) => check::run(&base),
        _ => controller::run(Config::parse()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
