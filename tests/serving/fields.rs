//! Fields of requests that change the answer, each seen to do so.

use anyhow::{Result, ensure};
use harness::Server;
use serde_json::{Value, json};

use crate::{completion, model};

/// `<repo_name>`: a special token that ends nothing.
const SPECIAL: u32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn every_field_does_what_it_says() -> Result<()> {
    let Some(model) = model("every_field_does_what_it_says") else { return Ok(()) };
    let server = Server::start(&model, &["--max-model-len", "256"]).await?;
    a_bias_chooses_the_token_and_special_ones_are_shown_on_demand(&server).await?;
    a_stop_token_ends_the_choice(&server).await?;
    a_repetition_penalty_ends_a_loop(&server).await?;
    prompts_are_scored(&server).await?;
    a_developer_is_heard_as_the_system(&server).await?;
    a_begun_answer_is_continued(&server).await?;
    messages_are_counted_as_the_chat_counts_them(&server).await
}

fn biased() -> Value {
    let mut body = completion("Hello", 2);
    body["logit_bias"] = json!({SPECIAL.to_string(): 100});
    body["return_token_ids"] = true.into();
    body
}

async fn a_bias_chooses_the_token_and_special_ones_are_shown_on_demand(
    server: &Server,
) -> Result<()> {
    let mut body = biased();
    let hidden = server.ask("/v1/completions", &body).await?;
    assert_eq!(hidden["choices"][0]["token_ids"], json!([SPECIAL, SPECIAL]));
    assert_eq!(hidden["choices"][0]["text"], "");
    body["skip_special_tokens"] = false.into();
    let shown = server.ask("/v1/completions", &body).await?;
    assert_eq!(shown["choices"][0]["text"], "<repo_name><repo_name>");
    Ok(())
}

async fn a_stop_token_ends_the_choice(server: &Server) -> Result<()> {
    let mut body = biased();
    body["stop_token_ids"] = json!([SPECIAL]);
    let answer = server.ask("/v1/completions", &body).await?;
    let choice = &answer["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["stop_reason"]),
        (&json!("stop"), &json!(SPECIAL))
    );
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    Ok(())
}

async fn a_repetition_penalty_ends_a_loop(server: &Server) -> Result<()> {
    let looping = format!("{}The cat", "The cat sat. ".repeat(4));
    let mut body = completion(looping, 6);
    let free = server.ask("/v1/completions", &body).await?;
    assert_eq!(free["choices"][0]["text"], " sat. The cat sat.");
    body["repetition_penalty"] = 2.into();
    let other = server.ask("/v1/completions", &body).await?;
    let text = other["choices"][0]["text"].as_str().unwrap_or_default();
    ensure!(!text.contains("sat") && !text.contains("cat"), "{text}");
    Ok(())
}

async fn prompts_are_scored(server: &Server) -> Result<()> {
    let mut body = completion("The capital of France is Paris", 1);
    body["prompt_logprobs"] = 1.into();
    let answer = server.ask("/v1/completions", &body).await?;
    let scores = answer["choices"][0]["prompt_logprobs"].as_array().cloned().unwrap_or_default();
    assert_eq!(json!(scores.len()), answer["usage"]["prompt_tokens"]);
    assert_eq!(scores[0], Value::Null);
    let last = scores.last().and_then(Value::as_object).cloned().unwrap_or_default();
    let best = last.values().find(|entry| entry["rank"] == 1).cloned().unwrap_or_default();
    assert_eq!(best["decoded_token"], " Paris", "{last:?}");
    Ok(())
}

fn messages(role: &str) -> Value {
    json!([
        {"role": role, "content": "Answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ])
}

async fn a_developer_is_heard_as_the_system(server: &Server) -> Result<()> {
    let mut answers = Vec::new();
    for role in ["system", "developer"] {
        let body = json!({"messages": messages(role), "max_tokens": 8, "temperature": 0});
        answers.push(server.ask("/v1/chat/completions", &body).await?);
    }
    assert_eq!(answers[0]["choices"], answers[1]["choices"]);
    assert_eq!(answers[0]["usage"]["prompt_tokens"], answers[1]["usage"]["prompt_tokens"]);
    Ok(())
}

async fn a_begun_answer_is_continued(server: &Server) -> Result<()> {
    let messages = json!([
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]);
    let mut body = json!({"messages": messages, "max_tokens": 8, "temperature": 0});
    body["continue_final_message"] = true.into();
    let answer = server.ask("/v1/chat/completions", &body).await?;
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    ensure!(text.starts_with(" Paris"), "{answer}");
    Ok(())
}

async fn messages_are_counted_as_the_chat_counts_them(server: &Server) -> Result<()> {
    let mut body = json!({"messages": messages("system"), "max_tokens": 1});
    let chat = server.ask("/v1/chat/completions", &body).await?;
    let tokens = server.ask("/tokenize", &body).await?;
    assert_eq!(tokens["count"], chat["usage"]["prompt_tokens"]);
    body["add_generation_prompt"] = false.into();
    let fewer = server.ask("/tokenize", &body).await?;
    ensure!(fewer["count"].as_u64() < tokens["count"].as_u64(), "{fewer}");
    Ok(())
}
