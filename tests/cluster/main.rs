//! Proves Bindery on a real Kubernetes: `make test-cluster` starts one and runs this against it, one test after the other.
#![forbid(unsafe_code)]

mod api;
mod cluster;
mod deletion;
mod devices;
#[cfg(target_arch = "x86_64")]
mod eater;
mod failures;
mod gpus;
mod hostile;
mod hub;
mod killed;
mod load;
mod nodes;
mod operators;
mod rollout;
mod serving;
mod stages;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};

use cluster::Cluster;

type Test = (&'static str, fn(&Cluster) -> Result<()>);

/// Where the state of the cluster is; unset: there is none.
const STATE: &str = "BINDERY_TEST_CLUSTER";
/// Set once this process is in the cluster's network.
const INSIDE: &str = "BINDERY_TEST_CLUSTER_INSIDE";

fn main() -> Result<()> {
    let mut arguments = Arguments::from_args();
    // The tests share one cluster.
    arguments.test_threads = Some(1);
    let state = std::env::var_os(STATE).filter(|state| !state.is_empty());
    let Some(state) = state else {
        eprintln!("NOT RUN: the cluster suite; `make test-cluster` starts a cluster and runs it");
        return Ok(());
    };
    if std::env::var_os(INSIDE).is_none() {
        return Err(enter(&state));
    }
    let cluster = Arc::new(Cluster::new(state.into())?);
    let tests = [
        serving::TESTS,
        stages::TESTS,
        operators::TESTS,
        killed::TESTS,
        hostile::TESTS,
        hub::TESTS,
        devices::TESTS,
        gpus::TESTS,
        rollout::TESTS,
        failures::TESTS,
        nodes::TESTS,
        deletion::TESTS,
    ];
    let trial = |(name, test): &Test| {
        let (cluster, test) = (Arc::clone(&cluster), *test);
        Trial::test(*name, move || {
            let start = std::time::Instant::now();
            let done = test(&cluster);
            eprintln!("  {:.1} s", start.elapsed().as_secs_f64());
            done.map_err(|error| {
                // At once, and with the rest at the end.
                eprintln!("  {error:#}\n{}", cluster.picture().unwrap_or_default());
                Failed::from(format!("{error:#}"))
            })
        })
    };
    let trials = tests.into_iter().flatten().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit()
}

/// Begins again in the network of the cluster's control plane, from where Pods and Services can be reached. Never returns
/// without an error.
fn enter(state: &std::ffi::OsStr) -> anyhow::Error {
    let run = || -> Result<std::io::Error> {
        let pid = std::fs::read_to_string(std::path::Path::new(state).join("vm/cp/pid"))
            .context("is the cluster up? `make test-cluster` starts it")?;
        let mut command = Command::new("nsenter");
        command.args(["-t", pid.trim(), "--net", "--"]).arg(std::env::current_exe()?);
        Ok(command.args(std::env::args_os().skip(1)).env(INSIDE, "1").exec())
    };
    run().map_or_else(|error| error, |error| anyhow::Error::from(error).context("run nsenter"))
}
