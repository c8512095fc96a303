//! The `bindery-operator` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use operator::config::Config;
use operator::controller;

fn main() -> ExitCode {
    let config = Config::parse();
    match controller::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
