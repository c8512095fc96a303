//! What clients ask for and get.

use anyhow::{Context, Result, ensure};
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model, streamed};

#[tokio::test(flavor = "multi_thread")]
async fn the_api_answers_as_openai_and_vllm_do() -> Result<()> {
    let Some(model) = model("the_api_answers_as_openai_and_vllm_do") else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "512"]).await?;
    chat_answers_sensibly_and_streams_the_same(&server).await?;
    stop_strings_are_never_partly_sent(&server).await?;
    choices_logprobs_and_echo_have_their_shapes(&server).await?;
    beams_and_best_of_come_best_first(&server).await?;
    prompts_come_in_every_form(&server).await?;
    seeds_repeat(&server).await?;
    streams_of_several_choices_say_what_whole_answers_say(&server).await?;
    echoed_log_probabilities_stream_with_true_offsets(&server).await?;
    stop_strings_wait_for_min_tokens(&server).await?;
    salts_separate_caches(&server).await
}

async fn chat_answers_sensibly_and_streams_the_same(server: &Server) -> Result<()> {
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "What is the capital of Germany?"}]}]);
    let body = json!({"model": "tiny", "messages": messages, "max_tokens": 30, "temperature": 0});
    let whole = server.ask("/v1/chat/completions", &body).await?;
    let text = whole["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    ensure!(text.contains("Berlin"), "{whole}");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let mut streaming = body;
    streaming["stream_options"] = json!({"include_usage": true});
    let chunks = server.stream("/v1/chat/completions", streaming).await?;
    assert_eq!(streamed(&chunks, 0), text);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], whole["usage"]["completion_tokens"]);
    Ok(())
}

async fn stop_strings_are_never_partly_sent(server: &Server) -> Result<()> {
    let free = server.ask("/v1/completions", &completion("One, two, three, four,", 24)).await?;
    let free = free["choices"][0]["text"].as_str().unwrap_or_default().to_owned();
    let stop: String = free.chars().skip(9).take(6).collect();
    let mut body = completion("One, two, three, four,", 24);
    body["stop"] = json!([stop]);
    let wanted = free.split(&stop).next().unwrap_or_default();
    let whole = server.ask("/v1/completions", &body).await?;
    assert_eq!(whole["choices"][0]["text"], wanted);
    assert_eq!(whole["choices"][0]["stop_reason"], json!(stop));
    let chunks = server.stream("/v1/completions", body.clone()).await?;
    assert_eq!(streamed(&chunks, 0), wanted);
    body["include_stop_str_in_output"] = true.into();
    let whole = server.ask("/v1/completions", &body).await?;
    assert_eq!(whole["choices"][0]["text"], format!("{wanted}{stop}"));
    Ok(())
}

async fn choices_logprobs_and_echo_have_their_shapes(server: &Server) -> Result<()> {
    let mut body = completion("The sky is", 5);
    body["n"] = 3.into();
    body["temperature"] = 1.into();
    body["ignore_eos"] = true.into();
    body["logprobs"] = 2.into();
    body["echo"] = true.into();
    let whole = server.ask("/v1/completions", &body).await?;
    let choices = whole["choices"].as_array().cloned().unwrap_or_default();
    assert_eq!(choices.len(), 3);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        ensure!(
            choice["text"].as_str().is_some_and(|text| text.starts_with("The sky is")),
            "{choice}"
        );
        let logprobs = &choice["logprobs"];
        let len = |name: &str| logprobs[name].as_array().map_or(0, Vec::len);
        assert_eq!(
            (len("tokens"), len("token_logprobs"), len("text_offset")),
            (8, 8, 8),
            "{logprobs}"
        );
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        ensure!(
            logprobs["token_logprobs"][7].as_f64().is_some_and(|logprob| logprob <= 0.0),
            "{logprobs}"
        );
    }
    let scored = json!({"model": "tiny", "prompt": "The sky is blue", "max_tokens": 0, "echo": true, "logprobs": 1});
    let scored = server.ask("/v1/completions", &scored).await?;
    assert_eq!(
        (&scored["choices"][0]["text"], &scored["usage"]["completion_tokens"]),
        (&json!("The sky is blue"), &json!(0))
    );
    let chat = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 0,
        "logprobs": true, "top_logprobs": 4, "prompt_logprobs": 1,
    });
    let chat = server.ask("/v1/chat/completions", &chat).await?;
    let content = chat["choices"][0]["logprobs"]["content"].as_array().cloned().unwrap_or_default();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0]["top_logprobs"].as_array().map_or(0, Vec::len), 4);
    assert_eq!(
        content[0]["top_logprobs"][0]["token"], content[0]["token"],
        "greedy takes the most likely"
    );
    let prompt = chat["prompt_logprobs"].as_array().map_or(0, Vec::len);
    assert_eq!(json!(prompt), chat["usage"]["prompt_tokens"]);
    Ok(())
}

async fn beams_and_best_of_come_best_first(server: &Server) -> Result<()> {
    let mut body = completion("The capital of Italy is", 6);
    body["use_beam_search"] = true.into();
    body["n"] = 3.into();
    let beams = server.ask("/v1/completions", &body).await?;
    let texts: Vec<&str> = beams["choices"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|choice| choice["text"].as_str())
        .collect();
    ensure!(texts.len() == 3 && texts[0] != texts[1], "{texts:?}");
    ensure!(texts[0].contains("Rome"), "{texts:?}");
    body["best_of"] = 6.into();
    let wide = server.ask("/v1/completions", &body).await?;
    assert_eq!(wide["choices"].as_array().map_or(0, Vec::len), 3, "n of a beam of best_of");
    let counted = wide["usage"]["completion_tokens"].as_u64();
    ensure!(counted.is_some_and(|counted| counted > 18), "all that were generated count: {wide}");
    let mut body = completion("The capital of Italy is", 6);
    body["temperature"] = 1.into();
    body["best_of"] = 4.into();
    body["seed"] = 3.into();
    body["ignore_eos"] = true.into();
    let best = server.ask("/v1/completions", &body).await?;
    assert_eq!(best["choices"].as_array().map_or(0, Vec::len), 1);
    assert_eq!(best["choices"][0]["logprobs"], Value::Null, "nobody asked for them");
    assert_eq!(best["usage"]["completion_tokens"], 24, "all that were generated count");
    Ok(())
}

async fn prompts_come_in_every_form(server: &Server) -> Result<()> {
    let text = server.ask("/v1/completions", &completion("Once upon a time", 6)).await?;
    let tokens = server.ask("/tokenize", &json!({"prompt": "Once upon a time"})).await?;
    let ids = tokens["tokens"].clone();
    let by_id = server.ask("/v1/completions", &completion(ids.clone(), 6)).await?;
    assert_eq!(by_id["choices"][0]["text"], text["choices"][0]["text"]);
    let both = server
        .ask("/v1/completions", &completion(json!(["Once upon a time", "The moon"]), 6))
        .await?;
    assert_eq!(both["choices"][0]["text"], text["choices"][0]["text"]);
    assert_eq!(both["choices"][1]["index"], 1);
    let lists = server.ask("/v1/completions", &completion(json!([ids]), 6)).await?;
    assert_eq!(lists["choices"][0]["text"], text["choices"][0]["text"]);
    let back = server.ask("/detokenize", &json!({"tokens": tokens["tokens"]})).await?;
    assert_eq!(back["prompt"], "Once upon a time");
    Ok(())
}

async fn seeds_repeat(server: &Server) -> Result<()> {
    let mut body = completion("My favourite colour", 12);
    body["temperature"] = 1.into();
    body["seed"] = 42.into();
    let first = server.ask("/v1/completions", &body).await?;
    let (again, beside) = tokio::try_join!(server.ask("/v1/completions", &body), async {
        let mut other = body.clone();
        other["seed"] = 43.into();
        server.ask("/v1/completions", &other).await
    })?;
    assert_eq!(first["choices"][0]["text"], again["choices"][0]["text"]);
    assert_ne!(first["choices"][0]["text"], beside["choices"][0]["text"]);
    Ok(())
}

async fn streams_of_several_choices_say_what_whole_answers_say(server: &Server) -> Result<()> {
    let mut body = completion(json!(["The sun", "A small cat"]), 6);
    for (field, value) in [("n", 2), ("temperature", 1), ("seed", 7)] {
        body[field] = value.into();
    }
    body["return_token_ids"] = true.into();
    let whole = server.ask("/v1/completions", &body).await?;
    body["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = server.stream("/v1/completions", body).await?;
    ensure!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"].is_u64()), "{chunks:?}");
    let counts = chunks.iter().map(|chunk| chunk["usage"]["completion_tokens"].as_u64());
    ensure!(counts.is_sorted(), "usage grows: {chunks:?}");
    assert_eq!(chunks[chunks.len() - 1]["usage"], whole["usage"]);
    for index in 0..4 {
        let wanted = &whole["choices"][index];
        assert_eq!(wanted["text"], streamed(&chunks, index));
        let own = || {
            let choices = chunks.iter().filter_map(|chunk| chunk["choices"].as_array()).flatten();
            choices.filter(|choice| choice["index"] == index)
        };
        let ids = |name: &str| -> Vec<Value> {
            own().filter_map(|choice| choice[name].as_array()).flatten().cloned().collect()
        };
        assert_eq!(wanted["token_ids"], json!(ids("token_ids")));
        assert_eq!(wanted["prompt_token_ids"], json!(ids("prompt_token_ids")));
        let reasons: Vec<_> = own().filter_map(|choice| choice["finish_reason"].as_str()).collect();
        assert_eq!(json!(reasons), json!([wanted["finish_reason"]]), "ends once");
    }
    Ok(())
}

async fn echoed_log_probabilities_stream_with_true_offsets(server: &Server) -> Result<()> {
    // The emoji is several tokens, none of which is a character.
    let mut body = completion("Fun \u{1F9CA} is", 5);
    body["echo"] = true.into();
    body["logprobs"] = 1.into();
    let whole = server.ask("/v1/completions", &body).await?;
    let choice = &whole["choices"][0];
    let text: Vec<char> = choice["text"].as_str().unwrap_or_default().chars().collect();
    let logprobs = &choice["logprobs"];
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let offsets = logprobs["text_offset"].as_array().into_iter().flatten();
    let offsets: Vec<usize> =
        offsets.filter_map(|offset| usize::try_from(offset.as_u64()?).ok()).collect();
    ensure!(tokens.len() > 8 && tokens.len() == offsets.len(), "{logprobs}");
    for (token, &offset) in tokens.iter().zip(&offsets).filter(|(token, _)| token.is_ascii()) {
        let there: String = text[offset..].iter().take(token.len()).collect();
        assert_eq!(there, *token, "at {offset}: {logprobs}");
    }
    let chunks = server.stream("/v1/completions", body.clone()).await?;
    assert_eq!(streamed(&chunks, 0), choice["text"]);
    for name in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let parts =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"][name].as_array());
        assert_eq!(json!(parts.flatten().collect::<Vec<_>>()), logprobs[name], "{name}");
    }
    body["max_tokens"] = 0.into();
    body["stream_options"] = json!({"include_usage": true});
    let chunks = server.stream("/v1/completions", body).await?;
    assert_eq!(streamed(&chunks, 0), "Fun \u{1F9CA} is");
    assert_eq!(chunks[chunks.len() - 1]["usage"]["completion_tokens"], 0);
    Ok(())
}

async fn stop_strings_wait_for_min_tokens(server: &Server) -> Result<()> {
    let mut body = completion("One, two, three,", 12);
    body["stop"] = json!([","]);
    let short = server.ask("/v1/completions", &body).await?;
    body["min_tokens"] = 6.into();
    let long = server.ask("/v1/completions", &body).await?;
    let count = |answer: &Value| answer["usage"]["completion_tokens"].as_u64().unwrap_or(0);
    ensure!(count(&short) < 6 && count(&long) > 6, "{short} {long}");
    ensure!(long["choices"][0]["text"].as_str().is_some_and(|text| text.contains(',')), "{long}");
    Ok(())
}

async fn salts_separate_caches(server: &Server) -> Result<()> {
    let text =
        "A long prompt that fills more than one block of sixteen tokens with words, ".repeat(3);
    let cached = async |salt: &str| {
        let mut body = completion(text.clone(), 1);
        body["cache_salt"] = salt.into();
        let answer = server.ask("/v1/completions", &body).await?;
        let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
        cached.as_u64().context("cached_tokens")
    };
    assert_eq!(cached("a").await?, 0);
    ensure!(cached("a").await? >= 32, "the same salt shares");
    assert_eq!(cached("b").await?, 0, "another salt does not");
    Ok(())
}
