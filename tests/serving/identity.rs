//! The same text whatever the pool, the cache, the chunks and the company: on the real model, quantized weights included.

use anyhow::{Context, Result, ensure};
use futures_util::future::try_join_all;
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model, streamed};

const TOPICS: [&str; 8] =
    ["the sea", "a red fox", "tea", "old maps", "the moon", "a bridge", "winter", "music"];

fn chat(user: usize) -> Value {
    let content =
        format!("Write one sentence about {} for reader {user}.", TOPICS[user % TOPICS.len()]);
    json!({"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "stream_options": {"include_usage": true}, "include_preemptions": true})
}

/// What a user was told.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    text: String,
    preemptions: u64,
}

fn preemptions(told: &[Told]) -> u64 {
    told.iter().map(|told| told.preemptions).sum()
}

fn texts(told: &[Told]) -> Vec<&str> {
    told.iter().map(|told| told.text.as_str()).collect()
}

async fn chats(server: &Server, users: usize) -> Result<Vec<Told>> {
    let one = |user| async move {
        let chunks = server.stream("/v1/chat/completions", chat(user)).await?;
        let usage = &chunks.last().context("a chunk")?["usage"];
        let preemptions = usage["preemptions"]["count"].as_u64().context(usage.to_string())?;
        Ok::<_, anyhow::Error>(Told { text: streamed(&chunks, 0), preemptions })
    };
    try_join_all((0..users).map(one)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_streaming_chats_under_preemption_say_what_they_say_without() -> Result<()> {
    let Some(model) =
        model("sixty_four_streaming_chats_under_preemption_say_what_they_say_without")
    else {
        return Ok(());
    };
    let large = Server::start(&model, &["--max-model-len", "256"]).await?;
    let wanted = chats(&large, 64).await?;
    assert_eq!(counted_preemptions(&large, &wanted).await?, 0.0, "the large pool preempts");
    drop(large);
    for caching in ["--no-enable-prefix-caching", "--enable-prefix-caching"] {
        let small = ["--max-model-len", "256", "--num-gpu-blocks-override", "40", caching];
        let small = Server::start(&model, &small).await?;
        let got = chats(&small, 64).await?;
        ensure!(counted_preemptions(&small, &got).await? > 0.0, "{caching}: never preempts");
        assert_eq!(texts(&got), texts(&wanted), "{caching}");
        small.wait_metric("bindery_blocks", "used", 0.0).await?;
    }
    let alone = Server::start(&model, &["--max-model-len", "256", "--max-num-seqs", "1"]).await?;
    assert_eq!(texts(&chats(&alone, 7).await?), texts(&wanted[..7]), "alone");
    Ok(())
}

/// Preemptions by the metric, of which every client was told its own.
async fn counted_preemptions(server: &Server, told: &[Told]) -> Result<f64> {
    let counted = server.metric("vllm:num_preemptions_total", "").await?;
    assert_eq!(format!("{counted}"), preemptions(told).to_string(), "what clients were told");
    Ok(counted)
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_caching_block_size_and_company_change_no_text() -> Result<()> {
    let Some(model) = model("chunks_caching_block_size_and_company_change_no_text") else {
        return Ok(());
    };
    let variants: [&[&str]; 5] = [
        &["--max-num-seqs", "16"],
        &["--max-num-seqs", "1", "--max-num-batched-tokens", "1"],
        &["--max-num-seqs", "16", "--max-num-batched-tokens", "16"],
        &["--max-num-seqs", "16", "--no-enable-prefix-caching"],
        &["--max-num-seqs", "16", "--block-size", "7"],
    ];
    let mut wanted: Option<Vec<Told>> = None;
    for flags in variants {
        let server = Server::start(&model, &[flags, &["--max-model-len", "256"]].concat()).await?;
        let mut got = chats(&server, 6).await?;
        // Once more, with what the first ones left in the cache.
        got.extend(chats(&server, 6).await?);
        assert_eq!(got[..6], got[6..], "{flags:?}: with a warm cache");
        assert_eq!(*wanted.get_or_insert_with(|| got.clone()), got, "{flags:?}");
    }
    Ok(())
}

/// What users who come together are told, with the log-probability of each token.
async fn scored(server: &Server, users: usize) -> Result<Vec<Value>> {
    let one = |user| async move {
        let mut body = chat(user);
        body["logprobs"] = true.into();
        body["stream_options"] = Value::Null;
        body["include_preemptions"] = false.into();
        Ok::<_, anyhow::Error>(server.ask("/v1/chat/completions", &body).await?["choices"].take())
    };
    try_join_all((0..users).map(one)).await
}

/// Instructions that kernels are compiled for, as the flag and as the log name them; the narrowest first.
const INSTRUCTIONS: [(&str, &str); 3] =
    [("portable", "Portable"), ("avx2", "Avx2Fma"), ("avx512", "Avx512")];

#[tokio::test(flavor = "multi_thread")]
async fn narrower_instructions_give_the_same_bits_alone_in_a_crowd_in_chunks_and_preempted()
-> Result<()> {
    const TEST: &str =
        "narrower_instructions_give_the_same_bits_alone_in_a_crowd_in_chunks_and_preempted";
    let Some(model) = model(TEST) else { return Ok(()) };
    let widest = Server::start(&model, &["--max-model-len", "256"]).await?;
    let wanted = scored(&widest, 4).await?;
    let is_widest = |logged: &str| widest.log().contains(&format!("instructions={logged}"));
    let narrower = INSTRUCTIONS.iter().position(|(_, logged)| is_widest(logged));
    let narrower = &INSTRUCTIONS[..narrower.context("the log names no instructions")?];
    if narrower.len() + 1 < INSTRUCTIONS.len() {
        eprintln!("NOT RUN: {TEST} with more than {narrower:?}, this machine's are too narrow");
    }
    for (isa, logged) in narrower {
        let flags = "--max-model-len 128 --num-gpu-blocks-override 10 --no-enable-prefix-caching \
            --max-num-seqs 4 --max-num-batched-tokens 16 --max-cpu-isa";
        let flags: Vec<&str> = flags.split_whitespace().chain([*isa]).collect();
        let server = Server::start(&model, &flags).await?;
        server.wait_log(&format!("instructions={logged}")).await?;
        assert_eq!(scored(&server, 4).await?, wanted, "{isa}: in a crowd");
        ensure!(server.metric("vllm:num_preemptions_total", "").await? > 0.0, "never preempts");
        assert_eq!(scored(&server, 1).await?, wanted[..1], "{isa}: alone");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_turn_of_a_chat_finds_its_history_cached_and_keys_share_nothing() -> Result<()> {
    let Some(model) =
        model("the_next_turn_of_a_chat_finds_its_history_cached_and_keys_share_nothing")
    else {
        return Ok(());
    };
    let server =
        Server::start(&model, &["--max-model-len", "512", "--api-key", "one", "--api-key", "two"])
            .await?;
    let ask = |key: &'static str, body: Value| {
        let url = format!("{}/v1/chat/completions", server.url);
        async move {
            let answer =
                reqwest::Client::new().post(url).bearer_auth(key).json(&body).send().await?;
            Ok::<Value, anyhow::Error>(answer.json().await?)
        }
    };
    let mut first = chat(0);
    first["stream_options"] = Value::Null;
    let answer = ask("one", first.clone()).await?;
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap_or_default();
    let mut second = first;
    let turns = second["messages"].as_array_mut().expect("messages");
    turns.push(answer["choices"][0]["message"].clone());
    turns.push(json!({"role": "user", "content": "Go on."}));
    let again = ask("one", second.clone()).await?;
    let cached =
        again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or_default();
    ensure!(
        cached >= prompt,
        "the prompt of the first turn and a part of its answer: {cached} of {prompt}"
    );
    let other = ask("two", second).await?;
    assert_eq!(other["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "another key");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_share_a_cache_whose_scope_is_all() -> Result<()> {
    let Some(model) = model("keys_share_a_cache_whose_scope_is_all") else { return Ok(()) };
    let flags = "--max-model-len 128 --api-key one --api-key two --prefix-cache-scope all";
    let server = Server::start(&model, &flags.split(' ').collect::<Vec<_>>()).await?;
    let mut cached = Vec::new();
    for key in ["one", "two"] {
        let url = format!("{}/v1/completions", server.url);
        let body = completion("word ".repeat(40), 1);
        let answer = reqwest::Client::new().post(url).bearer_auth(key).json(&body).send().await?;
        let answer: Value = answer.json().await?;
        cached.push(answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64());
    }
    ensure!(cached[0] == Some(0) && cached[1] >= Some(32), "{cached:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_are_exact_and_blocks_return_after_a_known_workload() -> Result<()> {
    let Some(model) = model("counters_are_exact_and_blocks_return_after_a_known_workload") else {
        return Ok(());
    };
    let server = Server::start(&model, &["--max-model-len", "256"]).await?;
    let prompt: Vec<u32> = (100..140).collect();
    let mut body = completion(json!(prompt), 10);
    body["ignore_eos"] = true.into();
    for n in [1, 4] {
        body["n"] = n.into();
        server.ask("/v1/completions", &body).await?;
    }
    let vllm = |name: &'static str| server.metric(name, "");
    assert_eq!(vllm("vllm:prompt_tokens_total").await?, 80.0);
    assert_eq!(vllm("vllm:generation_tokens_total").await?, 50.0);
    assert_eq!(
        vllm("vllm:prompt_tokens_cached_total").await?,
        39.0,
        "all but the last prompt token"
    );
    assert_eq!(server.metric("vllm:request_success_total", "length").await?, 5.0);
    // 40 tokens leave half a block: three of four choices copy it.
    assert_eq!(server.metric("bindery_forked_blocks_total", "").await?, 3.0);
    server.wait_metric("bindery_blocks", "used", 0.0).await?;
    server.wait_metric("vllm:kv_cache_usage_perc", "", 0.0).await
}
