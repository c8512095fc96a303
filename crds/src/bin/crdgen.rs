//! Prints every CRD as YAML: `cargo crdgen > charts/bindery/...`. A test compares with the chart's copy.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    let written = crds::yaml()
        .map_err(|error| error.to_string())
        .and_then(|yaml| write!(std::io::stdout(), "{yaml}").map_err(|error| error.to_string()));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: print the definitions: {error}");
            ExitCode::FAILURE
        }
    }
}
