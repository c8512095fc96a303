//! The `bindery` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use daemon::bench::serve::Verdict;
use daemon::config::{self, Command, Environment};
use daemon::{bench, node, replica, serve};

fn main() -> ExitCode {
    let command = match config::parse(std::env::args_os(), &Environment::of_process()) {
        Ok(command) => command,
        Err(error) => return error.report(),
    };
    let done = match command {
        Command::Serve(config) => serve::run(*config),
        Command::Plan { config, format } => {
            serve::print_plan(&config, format, &mut std::io::stdout())
        }
        Command::Node(config) => node::run(&config),
        Command::Replica(config) => return ended(replica::run(*config)),
        Command::BenchServe(args) => run_bench(&args),
        Command::BenchSweep { arguments, model } => {
            in_runtime(bench::sweep::run(&arguments, model.as_ref(), &mut std::io::stdout()))
        }
        Command::BenchMemory { arguments, model } => {
            in_runtime(bench::memory::run(&arguments, model.as_ref(), &mut std::io::stdout()))
        }
    };
    ended(done.map(|()| ExitCode::SUCCESS))
}

fn ended(done: anyhow::Result<ExitCode>) -> ExitCode {
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn in_runtime(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

fn run_bench(args: &bench::serve::BenchServeArgs) -> anyhow::Result<()> {
    in_runtime(async {
        match bench::serve::run(args, &mut std::io::stdout()).await? {
            Verdict::Measured => Ok(()),
            Verdict::AllFailed => anyhow::bail!("all requests failed"),
        }
    })
}
