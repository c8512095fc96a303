//! The load generator against a small server in this process.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Parser;
use std::sync::Mutex;

use super::*;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    arguments: BenchServeArgs,
}

/// What the server was asked, and how it answers.
#[derive(Debug, Default)]
struct Server {
    bodies: Mutex<Vec<Value>>,
    most_at_once: Mutex<(usize, usize)>,
    /// Every second request is refused, or all break off.
    mood: Mutex<Mood>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Mood {
    #[default]
    Good,
    RefusesAll,
    BreaksOff,
    RefusesEverySecond,
}

fn stream(body: &Value) -> String {
    let chat = body.get("messages").is_some();
    let tokens = body["max_tokens"].as_u64().or(body["max_completion_tokens"].as_u64()).unwrap();
    let mut stream = String::from(": comment\n\n");
    if chat {
        stream += "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n";
    }
    for _ in 0..tokens {
        let choice = if chat {
            json!({"index": 0, "delta": {"content": "x"}})
        } else {
            json!({"index": 0, "text": "x"})
        };
        stream += &format!("data: {}\n\n", json!({"choices": [choice]}));
    }
    let prompt = body["prompt"].as_array().map_or(1, Vec::len);
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": tokens});
    stream + &format!("data: {}\n\ndata: [DONE]\n\n", json!({"choices": [], "usage": usage}))
}

async fn complete(State(server): State<Arc<Server>>, Json(body): Json<Value>) -> Response {
    {
        let mut at_once = server.most_at_once.lock().unwrap();
        at_once.0 += 1;
        at_once.1 = at_once.1.max(at_once.0);
    }
    // Lets other requests in, so that a missing bound would show.
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
    let count = {
        let mut bodies = server.bodies.lock().unwrap();
        bodies.push(body.clone());
        bodies.len()
    };
    server.most_at_once.lock().unwrap().0 -= 1;
    let refusal = || {
        (StatusCode::TOO_MANY_REQUESTS, Json(json!({"error": {"message": "full"}}))).into_response()
    };
    let mood = *server.mood.lock().unwrap();
    match mood {
        Mood::RefusesAll => refusal(),
        Mood::RefusesEverySecond if count % 2 == 0 => refusal(),
        Mood::BreaksOff => stream(&body).replace("data: [DONE]\n\n", "").into_response(),
        Mood::Good | Mood::RefusesEverySecond => stream(&body).into_response(),
    }
}

async fn serve(mood: Mood) -> (Arc<Server>, String) {
    let server = Arc::new(Server { mood: Mutex::new(mood), ..Server::default() });
    let app = Router::new()
        .route("/v1/completions", post(complete))
        .route("/v1/chat/completions", post(complete))
        .route("/v1/models", get(|| async { Json(json!({"data": [{"id": "tiny"}]})) }))
        .route("/tokenize", post(|| async { Json(json!({"tokens": [5, 6, 7]})) }))
        .route("/detokenize", post(|| async { Json(json!({"prompt": "five six"})) }))
        .with_state(Arc::clone(&server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, app).await });
    (server, url)
}

async fn bench(url: &str, line: &str) -> (Verdict, Value) {
    let words = format!("bench --base-url {url} --json - {line}");
    let arguments = Line::parse_from(words.split_whitespace()).arguments;
    let mut out = Vec::new();
    let verdict = run(&arguments, &mut out).await.unwrap();
    (verdict, serde_json::from_slice(&out).unwrap())
}

#[tokio::test]
async fn tokens_are_counted_as_the_server_counts_them() {
    let (server, url) = serve(Mood::Good).await;
    let (verdict, figures) =
        bench(&url, "--num-prompts 8 --random-input-len 10 --random-output-len 4 --ignore-eos")
            .await;
    assert_eq!(verdict, Verdict::Measured);
    assert_eq!((figures["completed"].as_u64(), figures["failed"].as_u64()), (Some(8), Some(0)));
    assert_eq!(figures["total_input_tokens"], 80);
    assert_eq!(figures["total_output_tokens"], 32);
    assert!(figures["p99_ttft_ms"].is_f64() && figures["mean_itl_ms"].is_f64());
    let bodies = server.bodies.lock().unwrap();
    assert!(bodies.iter().all(|body| body["model"] == "tiny"
        && body["ignore_eos"] == true
        && body["stream"] == true));
    let drawn = bodies.iter().flat_map(|body| body["prompt"].as_array().unwrap());
    assert!(drawn.into_iter().all(|token| (5..=7).contains(&token.as_u64().unwrap())));
}

#[tokio::test]
async fn a_closed_loop_never_has_more_requests_than_its_limit() {
    let (server, url) = serve(Mood::Good).await;
    bench(&url, "--num-prompts 20 --max-concurrency 3 --random-input-len 2 --random-output-len 2")
        .await;
    assert!(server.most_at_once.lock().unwrap().1 <= 3);
}

#[tokio::test]
async fn a_chat_is_asked_in_text_and_its_role_is_no_token() {
    let (server, url) = serve(Mood::Good).await;
    let line = "--endpoint-type openai-chat --num-prompts 2 --random-output-len 3 --n 2 --request-rate 1000";
    let (_, figures) = bench(&url, line).await;
    assert_eq!(figures["total_output_tokens"], 6);
    assert_eq!(figures["requests_without_usage"], 0);
    let bodies = server.bodies.lock().unwrap();
    assert!(
        bodies.iter().all(|body| body["messages"][0]["content"] == "five six" && body["n"] == 2)
    );
}

#[tokio::test]
async fn failures_are_counted_with_their_reasons() {
    let (_, url) = serve(Mood::RefusesEverySecond).await;
    let (verdict, figures) =
        bench(&url, "--num-prompts 4 --max-concurrency 1 --random-output-len 2").await;
    assert_eq!(verdict, Verdict::Measured);
    assert_eq!(figures["failures"]["HTTP 429: full"], 2);
}

#[tokio::test]
async fn a_run_in_which_all_failed_says_so() {
    let (_, url) = serve(Mood::RefusesAll).await;
    assert_eq!(bench(&url, "--num-prompts 2").await.0, Verdict::AllFailed);
    let (_, url) = serve(Mood::BreaksOff).await;
    let (verdict, figures) = bench(&url, "--num-prompts 2 --random-vocab-size 9").await;
    assert_eq!(verdict, Verdict::AllFailed);
    assert_eq!(figures["failures"]["the stream ended without [DONE]"], 2);
}

#[tokio::test]
async fn nobody_listening_is_said_before_the_load() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let words = ["bench", "--base-url", &url];
    let error = run(&Line::parse_from(words).arguments, &mut Vec::new()).await.unwrap_err();
    assert!(matches!(error, BenchError::NoModel(_)));
}
