//! Bad input gets a 4xx in OpenAI's shape, and the server goes on.

use anyhow::{Result, ensure};
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model};

/// A completion with one field changed.
fn with(field: &str, value: Value) -> Value {
    let mut body = completion("Hello", 4);
    body[field] = value;
    body
}

fn chat_with(field: &str, value: Value) -> Value {
    let mut body =
        json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2});
    body[field] = value;
    body
}

fn bad_prompts() -> Vec<Value> {
    vec![
        json!(""),
        json!([]),
        json!(7),
        json!([[]]),
        json!([49_152]),
        json!([-1]),
        json!([1.5]),
        json!([null]),
        json!([1, "a"]),
        json!(["a", 1]),
        json!([[[1]]]),
        json!([{"a": 1}]),
    ]
}

fn bad_completions() -> Vec<(Value, u16, &'static str)> {
    let invalid = [
        ("max_tokens", json!(0)),
        ("max_tokens", json!("many")),
        ("max_tokens", json!(-3)),
        ("temperature", json!(-0.1)),
        ("temperature", json!(2.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("n", json!(0)),
        ("n", json!(65)),
        ("n", json!(1.5)),
        ("best_of", json!(0)),
        ("stop", json!(vec!["x"; 17])),
        ("stop", json!([""])),
        ("stop", json!(5)),
        ("logit_bias", json!({"50000": 1})),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logprobs", json!(21)),
        ("stop_token_ids", json!([60_000])),
        ("presence_penalty", json!(3)),
        ("stream_options", json!({"include_usage": true})),
        ("min_tokens", json!(9)),
        ("seed", json!("x")),
        ("use_beam_search", json!(1)),
        ("early_stopping", json!("soon")),
        ("cache_salt", json!(1)),
    ];
    let unsupported = ["tools", "suffix", "guided_json", "response_format"]
        .map(|name| (name, json!({"type": "x"})));
    let prompts = bad_prompts().into_iter().map(|prompt| ("prompt", prompt));
    let mut table: Vec<_> = invalid
        .into_iter()
        .chain(prompts)
        .map(|(field, value)| (with(field, value), 400, "invalid_value"))
        .collect();
    table.extend(
        unsupported
            .into_iter()
            .map(|(field, value)| (with(field, value), 400, "unsupported_parameter")),
    );
    table.extend(bad_combinations().into_iter().map(|body| (body, 400, "invalid_value")));
    let biases: serde_json::Map<_, _> = (0..1025).map(|id| (id.to_string(), json!(1))).collect();
    table.push((with("logit_bias", biases.into()), 400, "invalid_value"));
    table.push((with("model", json!("other")), 404, "model_not_found"));
    table.push((with("max_tokens", json!(100_000)), 400, "context_length_exceeded"));
    table.push((with("prompt", json!("word ".repeat(3000))), 400, "context_length_exceeded"));
    table
}

/// Fields that are good alone.
fn bad_combinations() -> Vec<Value> {
    let mut table = Vec::new();
    for (field, value) in [
        ("stop", json!(["x"])),
        ("logprobs", json!(1)),
        ("logit_bias", json!({"1": 1})),
        ("min_tokens", json!(2)),
        ("frequency_penalty", json!(0.5)),
        ("echo", json!(true)),
        ("stream", json!(true)),
        ("best_of", json!(1)),
    ] {
        let mut body = with(field, value);
        body["use_beam_search"] = true.into();
        body["n"] = 2.into();
        table.push(body);
    }
    let mut streamed = with("prompt_logprobs", json!(1));
    streamed["stream"] = true.into();
    table.push(streamed);
    let mut many = with("prompt_logprobs", json!(20));
    (many["n"], many["prompt"]) = (64.into(), "word ".repeat(200).into());
    table.push(many);
    // 64 answers of 240 tokens, each with 21 log-probabilities.
    let mut answers = with("logprobs", json!(20));
    (answers["n"], answers["max_tokens"]) = (64.into(), 240.into());
    answers["prompt"] = json!(["a", "b", "c", "d"]);
    table.push(answers);
    // Eight spaces are one token: few tokens, many bytes.
    let mut echoed = with("echo", json!(true));
    (echoed["n"], echoed["prompt"]) = (64.into(), "        word".repeat(110).into());
    table.push(echoed);
    // More than the queue takes, however empty it is.
    table.push(with("prompt", json!(["a", "b", "c", "d", "e"])));
    table.push(with("prompt", json!(vec!["word ".repeat(60); 4])));
    table
}

fn bad_chats() -> Vec<(Value, u16, &'static str)> {
    let part =
        |kind: &str| json!([{"role": "user", "content": [{"type": kind, kind: {"url": "x"}}]}]);
    vec![
        (chat_with("messages", json!([])), 400, "invalid_value"),
        (chat_with("messages", json!("hi")), 400, "invalid_value"),
        (chat_with("messages", json!([{"role": "wizard", "content": "x"}])), 400, "invalid_value"),
        (chat_with("messages", json!([{"content": "x"}])), 400, "invalid_value"),
        (chat_with("messages", part("image_url")), 400, "unsupported_parameter"),
        (chat_with("top_logprobs", json!(3)), 400, "invalid_value"),
        (chat_with("chat_template", json!("{{ 1 }}")), 400, "unsupported_parameter"),
        (chat_with("chat_template_kwargs", json!({"messages": []})), 400, "chat_template_failed"),
        (chat_with("continue_final_message", json!("x")), 400, "invalid_value"),
        (chat_with("tool_choice", json!("required")), 400, "unsupported_parameter"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_a_4xx_with_a_stable_code_and_the_server_goes_on() -> Result<()> {
    let Some(model) = model("bad_input_gets_a_4xx_with_a_stable_code_and_the_server_goes_on")
    else {
        return Ok(());
    };
    let flags = "--max-model-len 256 --max-body-bytes 65536 --max-num-queued-reqs 4 --max-num-queued-tokens 200";
    let server = Server::start(&model, &flags.split(' ').collect::<Vec<_>>()).await?;
    for (path, table) in
        [("/v1/completions", bad_completions()), ("/v1/chat/completions", bad_chats())]
    {
        for (body, status, code) in table {
            let (got, answer) = server.post(path, &body).await?;
            let shown: String = body.to_string().chars().take(200).collect();
            assert_eq!(
                (got, answer["error"]["code"].as_str()),
                (status, Some(code)),
                "{shown}: {answer}"
            );
            ensure!(
                answer["error"]["message"].as_str().is_some_and(|message| !message.is_empty()),
                "{answer}"
            );
        }
    }
    raw_bodies(&server).await?;
    assert_eq!(server.post("/v1/nothing", &json!({})).await?.0, 404);
    let status = reqwest::get(format!("{}/v1/completions", server.url)).await?.status();
    assert_eq!(status, 405);
    let not_utf8 = reqwest::get(format!("{}/v1/models/%FF", server.url)).await?;
    assert_eq!(not_utf8.status(), 404);
    assert_eq!(not_utf8.json::<Value>().await?["error"]["code"], "model_not_found");
    for path in ["/healthz", "/metrics", "/version"] {
        let (status, answer) = server.post(path, &json!({})).await?;
        assert_eq!((status, &answer["error"]["code"]), (405, &json!("method_not_allowed")));
    }
    let nothing_asked = json!({"tools": [], "mm_processor_kwargs": {}, "function_call": "none"});
    for (field, value) in nothing_asked.as_object().into_iter().flatten() {
        server.ask("/v1/completions", &with(field, value.clone())).await?;
    }
    server.ask("/v1/completions", &completion("Hello", 2)).await?;
    assert_eq!(reqwest::get(format!("{}/healthz", server.url)).await?.status(), 200);
    assert_eq!(server.metric("bindery_blocks", "used").await?, 0.0);
    Ok(())
}

async fn raw_bodies(server: &Server) -> Result<()> {
    let deep = format!("{{\"prompt\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let values = format!("{{\"prompt\": \"x\", \"stop\": [{}0]}}", "0,".repeat(30_000));
    let bodies: [(Vec<u8>, u16); 8] = [
        (values.into_bytes(), 400),
        (b"{".to_vec(), 400),
        (b"[]".to_vec(), 400),
        (b"{\"prompt\": \"\xff\xfe\"}".to_vec(), 400),
        (b"{\"prompt\": \"x\", \"temperature\": NaN}".to_vec(), 400),
        (deep.into_bytes(), 400),
        (vec![b' '; 70_000], 413),
        (Vec::new(), 400),
    ];
    for (body, wanted) in bodies {
        let url = format!("{}/v1/completions", server.url);
        let answer = reqwest::Client::new().post(url).body(body).send().await?;
        let status = answer.status().as_u16();
        let text = answer.text().await?;
        ensure!(status == wanted && text.contains("\"code\""), "{status}, wanted {wanted}: {text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_guard_every_route_but_health_and_metrics() -> Result<()> {
    let Some(model) = model("keys_guard_every_route_but_health_and_metrics") else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "64", "--api-key", "secret"]).await?;
    let get = |path: &str, key: Option<&str>| {
        let request = reqwest::Client::new().get(format!("{}{path}", server.url));
        match key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
        .send()
    };
    // The last answers no GET, which is nobody's business without a key.
    for path in ["/v1/models", "/version", "/v1/none", "/v1/completions"] {
        assert_eq!(get(path, None).await?.status(), 401, "{path}");
        assert_eq!(get(path, Some("wrong!")).await?.status(), 401, "{path}");
    }
    for path in ["/health", "/healthz", "/readyz", "/metrics"] {
        assert_eq!(get(path, None).await?.status(), 200, "{path}");
    }
    assert_eq!(get("/v1/models", Some("secret")).await?.status(), 200);
    assert_eq!(server.post("/v1/completions", &completion("Hi", 2)).await?.0, 401);
    let counted = "handler=\"/v1/completions\",method=\"POST\",status=\"4xx\"";
    assert_eq!(server.metric("http_requests_total", counted).await?, 1.0);
    assert_eq!(get("/v1/completions", Some("secret")).await?.status(), 405);
    let counted = "handler=\"/v1/completions\",method=\"GET\",status=\"4xx\"";
    assert_eq!(server.metric("http_requests_total", counted).await?, 3.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_answers_429_and_says_when_to_return() -> Result<()> {
    let Some(model) = model("a_full_queue_answers_429_and_says_when_to_return") else {
        return Ok(());
    };
    let flags = ["--max-model-len", "512", "--max-num-seqs", "1", "--max-num-queued-reqs", "2"];
    let server = Server::start(&model, &flags).await?;
    let mut body = completion("Once", 200);
    body["ignore_eos"] = true.into();
    let send =
        || reqwest::Client::new().post(format!("{}/v1/completions", server.url)).json(&body).send();
    let mut running = tokio::task::JoinSet::new();
    (0..8).for_each(|_| drop(running.spawn(send())));
    let mut refused = 0;
    while let Some(answer) = running.join_next().await {
        let answer = answer??;
        if answer.status() == 429 {
            let after = answer
                .headers()
                .get("retry-after")
                .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
            ensure!(after.is_some_and(|seconds| (1..=60).contains(&seconds)), "{after:?}");
            refused += 1;
        } else {
            assert_eq!(answer.status(), 200);
        }
    }
    ensure!(refused >= 1, "none of eight was refused");
    let counted = server.metric("vllm:admission_rejections_total", "max_num_queued_reqs").await?;
    assert_eq!(counted, f64::from(refused));
    Ok(())
}
