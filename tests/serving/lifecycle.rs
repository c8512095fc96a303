//! Starting, ending, and what happens when somebody goes away.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model};

fn endless() -> Value {
    let mut body = completion("Once upon a time", 400);
    body["ignore_eos"] = true.into();
    body["stream"] = true.into();
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_connection_frees_its_blocks() -> Result<()> {
    let Some(model) = model("a_closed_connection_frees_its_blocks") else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "512"]).await?;
    let url = format!("{}/v1/completions", server.url);
    let answer = reqwest::Client::new().post(&url).json(&endless()).send().await?;
    let mut bytes = answer.bytes_stream();
    bytes.next().await.context("a first chunk")??;
    ensure!(server.metric("bindery_blocks", "used").await? > 0.0, "it runs");
    drop(bytes);
    server.wait_metric("bindery_blocks", "used", 0.0).await?;
    assert_eq!(server.metric("vllm:request_success_total", "abort").await?, 1.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_and_a_second_signal_ends_at_once() -> Result<()> {
    let Some(model) = model("sigterm_drains_and_a_second_signal_ends_at_once") else {
        return Ok(());
    };
    let patient = ["--max-model-len", "512", "--shutdown-timeout", "300"];
    let mut server = Server::start(&model, &patient).await?;
    let url = format!("{}/v1/completions", server.url);
    let mut short = endless();
    short["max_tokens"] = 40.into();
    let answer = reqwest::Client::new().post(&url).json(&short).send().await?;
    server.terminate()?;
    let deadline = std::time::Instant::now() + harness::PATIENCE;
    let refused = loop {
        // The signal may still be on its way.
        let refused = reqwest::Client::new().post(&url).json(&completion("Hi", 2)).send().await?;
        if refused.status() != 200 || std::time::Instant::now() > deadline {
            break refused;
        }
    };
    assert_eq!(refused.status(), 503);
    ensure!(refused.headers().contains_key("retry-after"), "{:?}", refused.headers());
    ensure!(
        answer.text().await?.trim_end().ends_with("data: [DONE]"),
        "the running request finishes"
    );
    ensure!(server.wait().await?.success(), "{}", server.log());

    let mut server = Server::start(&model, &patient).await?;
    let url = format!("{}/v1/completions", server.url);
    let answer = reqwest::Client::new().post(&url).json(&endless()).send().await?;
    server.terminate()?;
    let deadline = std::time::Instant::now() + harness::PATIENCE;
    while !server.log().contains("draining") && std::time::Instant::now() < deadline {
        tokio::task::yield_now().await;
    }
    server.terminate()?;
    assert_eq!(server.wait().await?.code(), Some(143), "{}", server.log());
    ensure!(!answer.text().await.unwrap_or_default().contains("[DONE]"), "the stream was cut off");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_and_a_configuration_file_serve_too() -> Result<()> {
    let Some(model) = model("a_unix_socket_and_a_configuration_file_serve_too") else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("bindery.yaml");
    std::fs::write(&file, "max-model-len: 96\nserved-model-name: [tiny, small]\n")?;
    let server = Server::start(&model, &["--config", &file.to_string_lossy()]).await?;
    let models: Value = reqwest::get(format!("{}/v1/models", server.url)).await?.json().await?;
    assert_eq!(models["data"][0]["max_model_len"], 96, "{models}");
    drop(server);
    std::fs::write(&file, "max-model-length: 96\n")?;
    let (code, _, error) =
        harness::run(&["serve", &model.to_string_lossy(), "--config", &file.to_string_lossy()])?;
    ensure!(code == 2 && error.contains("max-model-length"), "{code}: {error}");
    let (code, _, error) =
        harness::run(&["serve", &model.to_string_lossy(), "--max-model-len", "9000"])?;
    ensure!(code == 1 && error.contains("8192"), "{code}: {error}");
    let (code, _, error) = harness::run(&["serve", &model.to_string_lossy(), "--no-such-flag"])?;
    ensure!(code == 2 && error.contains("--no-such-flag"), "{code}: {error}");
    Ok(())
}

#[test]
fn a_plan_says_where_the_memory_goes_and_what_is_missing() -> Result<()> {
    let Some(model) = model("a_plan_says_where_the_memory_goes_and_what_is_missing") else {
        return Ok(());
    };
    let model = model.to_string_lossy();
    let (code, text, _) =
        harness::run(&["plan", &model, "--format", "json", "--num-gpu-blocks-override", "1024"])?;
    let plan: Value = serde_json::from_str(&text)?;
    assert_eq!(
        (code, &plan["kv_bytes_per_token"], &plan["sequences_at_full_length"]),
        (0, &json!(23_040), &json!(2))
    );
    let (code, _, error) = harness::run(&["plan", &model, "--memory-bytes", "100MiB"])?;
    ensure!(code == 1 && error.contains("missing"), "{code}: {error}");
    let (code, _, error) = harness::run(&[
        "plan",
        &model,
        "--num-gpu-blocks-override",
        "4",
        "--max-model-len",
        "100",
    ])?;
    ensure!(
        code == 1 && error.contains("needs 7 KV blocks") && error.contains("at most 64"),
        "{code}: {error}"
    );
    let (code, _, error) =
        harness::run(&["serve", &model, "--num-gpu-blocks-override", "2000000000"])?;
    ensure!(code == 1 && error.contains("this machine or its cgroup has"), "{code}: {error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_load_generator_measures_a_server() -> Result<()> {
    let Some(model) = model("the_load_generator_measures_a_server") else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "256"]).await?;
    let args = [
        "bench",
        "serve",
        "--base-url",
        &server.url,
        "--num-prompts",
        "4",
        "--max-concurrency",
        "2",
    ];
    let shape =
        ["--random-input-len", "20", "--random-output-len", "6", "--ignore-eos", "--json", "-"];
    let args: Vec<String> = args.iter().chain(&shape).map(|&arg| arg.to_owned()).collect();
    let run = move || harness::run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let (code, out, error) = tokio::task::spawn_blocking(run).await??;
    ensure!(code == 0 && out.contains("\"completed\""), "{code}: {out}\n{error}");
    assert_eq!(server.metric("vllm:generation_tokens_total", "").await?, 24.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_openai_package_works_unchanged() -> Result<()> {
    let Some(model) = model("the_openai_package_works_unchanged") else { return Ok(()) };
    let Some(python) = std::env::var_os("BINDERY_TEST_PYTHON").filter(|python| !python.is_empty())
    else {
        eprintln!(
            "NOT RUN: the_openai_package_works_unchanged, BINDERY_TEST_PYTHON names no Python with openai"
        );
        return Ok(());
    };
    let flags = [
        "--max-model-len",
        "512",
        "--api-key",
        "secret",
        "--max-num-seqs",
        "2",
        "--max-num-queued-reqs",
        "2",
    ];
    let server = Server::start(&model, &flags).await?;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/serving/openai_client.py");
    let url = server.url.clone();
    let output = tokio::task::spawn_blocking(move || {
        Command::new(python).args([script, &url, "secret"]).output()
    })
    .await??;
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(output.status.success(), "{said}\n{}", server.log());
    Ok(())
}
