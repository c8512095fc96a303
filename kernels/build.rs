//! Compiles each `.cu` of `src/cuda` to a fatbin, with feature `cuda` alone. `BINDERY_CUDA_ARCHS=90a` builds one architecture,
//! `80-virtual` PTX alone, which every device compiles for itself.
#![allow(clippy::print_stdout, reason = "cargo reads it")]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Architectures with machine code of their own; newer ones run the portable path's PTX.
const ARCHITECTURES: [&str; 5] = ["80", "86", "89", "90a", "80-virtual"];
const SOURCES: &str = "src/cuda";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo::rerun-if-changed={SOURCES}");
    for variable in ["BINDERY_CUDA_ARCHS", "CUDA_HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if let Err(error) = build() {
        println!("cargo::error={error}");
    }
}

fn build() -> Result<(), String> {
    let nvcc = find_nvcc()?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let sources = Mutex::new(sources()?);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let worker = || -> Result<(), String> {
        loop {
            let Some(source) = sources.lock().map_err(|error| error.to_string())?.pop() else {
                return Ok(());
            };
            compile(&nvcc, &source, &out)?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|it| it.join().map_err(|_| "a thread panicked".to_owned())?)
    })
}

fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = std::fs::read_dir(SOURCES).map_err(|error| format!("{SOURCES}: {error}"))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    Ok(paths.filter(|path| path.extension().is_some_and(|it| it == "cu")).collect())
}

/// In `CUDA_HOME`, on the `PATH`, or where `make cuda-toolchain` puts it.
fn find_nvcc() -> Result<PathBuf, String> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    let cached = cache.map(|cache| cache.join("bindery/cuda-13.0/nvidia/cu13/bin"));
    let folders = home.into_iter().chain(env::split_paths(&path)).chain(cached);
    let nvcc = folders.map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file());
    nvcc.ok_or_else(|| {
        "feature cuda needs nvcc 13.0, which is neither in CUDA_HOME nor on the PATH: `make cuda-toolchain` fetches it".to_owned()
    })
}

fn compile(nvcc: &Path, source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().ok_or("a source without a name")?;
    let object = out.join(name).with_extension("fatbin");
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "--compress-mode=size", "-Werror=all-warnings"]);
    command.args(architectures()?).arg("-o").arg(&object).arg(source);
    let (done, words) = (out.join(name).with_extension("done"), format!("{command:?}"));
    if is_newer(&done, source) && std::fs::read_to_string(&done).is_ok_and(|of| of == words) {
        return Ok(());
    }
    let status = command.status().map_err(|error| format!("{}: {error}", nvcc.display()))?;
    if !status.success() {
        return Err(format!("nvcc fails on {}: {status}", source.display()));
    }
    std::fs::write(&done, words).map_err(|error| format!("{}: {error}", done.display()))
}

/// Whether a file is newer than a source and every header: then the source need not be compiled again.
fn is_newer(done: &Path, source: &Path) -> bool {
    let time = |path: &Path| path.metadata().and_then(|it| it.modified()).ok();
    let headers =
        std::fs::read_dir(SOURCES).into_iter().flatten().filter_map(|it| Some(it.ok()?.path()));
    let headers = headers.filter(|path| path.extension().is_some_and(|it| it == "cuh"));
    let latest = headers.map(|path| time(&path)).chain([time(source)]).max().flatten();
    time(done).zip(latest).is_some_and(|(done, latest)| done > latest)
}

fn architectures() -> Result<Vec<String>, String> {
    let list = env::var("BINDERY_CUDA_ARCHS").unwrap_or_default();
    let asked: Vec<_> = list.split(',').map(str::trim).filter(|it| !it.is_empty()).collect();
    if let Some(unknown) = asked.iter().find(|it| !ARCHITECTURES.contains(it)) {
        let known = ARCHITECTURES.join(", ");
        return Err(format!("BINDERY_CUDA_ARCHS names {unknown}: wanted some of {known}"));
    }
    let asked = if asked.is_empty() { ARCHITECTURES.to_vec() } else { asked };
    let code = |arch: &str| match arch.strip_suffix("-virtual") {
        Some(arch) => format!("-gencode=arch=compute_{arch},code=compute_{arch}"),
        None => format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
    };
    Ok(asked.into_iter().map(code).collect())
}
