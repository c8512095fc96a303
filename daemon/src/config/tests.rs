//! Tests of the configuration: each layer, each refusal.

use std::io::Write;

use super::*;

fn words(line: &str) -> Vec<OsString> {
    std::iter::once("bindery").chain(line.split_whitespace()).map(OsString::from).collect()
}

fn serve_in(line: &str, environment: &Environment) -> ServeConfig {
    match parse(words(line), environment).unwrap() {
        Command::Serve(config) => *config,
        other => panic!("wanted serve, got {other:?}"),
    }
}

fn serve(line: &str) -> ServeConfig {
    serve_in(line, &Environment::default())
}

fn refusal_in(line: &str, environment: &Environment) -> String {
    parse(words(line), environment).unwrap_err().to_string()
}

fn refusal(line: &str) -> String {
    refusal_in(line, &Environment::default())
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

#[test]
fn defaults_are_those_of_the_help() {
    let config = serve("serve model.gguf");
    assert_eq!(config.listen, Listen::Tcp { host: "127.0.0.1".parse().unwrap(), port: 8000 });
    assert_eq!(config.block_size.get(), 16);
    assert_eq!(config.max_model_len, None);
    assert_eq!(config.prefix_cache, Some(PrefixCacheScope::Key));
    assert_eq!(config.served_model_names, ["model.gguf"]);
    assert_eq!(config.memory, MemoryLimit::Unset);
    assert_eq!(config.supervision, Supervision::Bare);
}

#[test]
fn the_last_of_a_repeated_flag_wins() {
    assert_eq!(
        serve("serve m --port 8000 --port 8001").listen,
        serve("serve m --port 8001").listen
    );
}

#[test]
fn keys_and_names_may_be_repeated() {
    let config = serve("serve m --api-key a --api-key b --served-model-name x,y");
    assert_eq!(config.api_keys.iter().map(ApiKey::expose).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(config.served_model_names, ["x", "y"]);
}

#[test]
fn the_last_of_the_two_prefix_caching_flags_wins() {
    assert_eq!(serve("serve m --no-enable-prefix-caching").prefix_cache, None);
    let config = serve(
        "serve m --no-enable-prefix-caching --enable-prefix-caching --prefix-cache-scope all",
    );
    assert_eq!(config.prefix_cache, Some(PrefixCacheScope::All));
}

#[test]
fn a_step_has_a_token_for_every_sequence() {
    let tokens = |flags| serve(flags).max_num_batched_tokens.get();
    assert_eq!(tokens("serve m"), 128);
    assert_eq!(tokens("serve m --max-num-seqs 4"), 128);
    assert_eq!(tokens("serve m --max-num-seqs 300"), 300);
    assert_eq!(tokens("serve m --max-num-batched-tokens 2k"), 2000);
    let error = refusal("serve m --max-num-seqs 4 --max-num-batched-tokens 3");
    assert!(error.contains("at least --max-num-seqs (4)"), "{error}");
}

#[test]
fn a_flag_wins_over_a_variable_and_a_variable_over_the_file() {
    let file = file(
        "max-num-seqs: 3\nport: 3\nblock_size: 3\napi-key: [x, y]\nenable-prefix-caching: false\n",
    );
    let path = file.path().to_str().unwrap();
    let environment = Environment::from([
        ("BINDERY_PORT", "2"),
        ("BINDERY_MAX_NUM_SEQS", "2"),
        ("BINDERY_CONFIG", path),
    ]);
    let config = serve_in("serve m --max-num-seqs 1", &environment);
    assert_eq!(config.max_num_seqs.get(), 1);
    assert_eq!(config.listen, Listen::Tcp { host: "127.0.0.1".parse().unwrap(), port: 2 });
    assert_eq!(config.block_size.get(), 3);
    assert_eq!(config.api_keys.len(), 2);
    assert_eq!(config.prefix_cache, None);
    assert!(serve_in("serve m --enable-prefix-caching", &environment).prefix_cache.is_some());
}

#[test]
fn the_model_may_come_from_the_file_or_a_variable() {
    let file = file("model: a.gguf\n");
    let path = file.path().to_str().unwrap();
    assert_eq!(serve(&format!("serve --config {path}")).model.to_string(), "a.gguf");
    let environment = Environment::from([("BINDERY_MODEL", "b.gguf")]);
    assert_eq!(
        serve_in(&format!("serve --config {path}"), &environment).model.to_string(),
        "b.gguf"
    );
    assert!(refusal("serve").contains("MODEL is missing"));
}

#[test]
fn an_unknown_key_is_refused_with_those_allowed() {
    let file = file("max-num-sequences: 3\n");
    let error = refusal(&format!("serve m --config {}", file.path().to_str().unwrap()));
    assert!(error.contains("max-num-sequences") && error.contains("max-num-seqs"), "{error}");
}

#[test]
fn a_bad_value_in_the_file_names_the_file_and_the_key() {
    for text in
        ["port: many", "port: [1, 2]", "port: {a: b}", "supervised: maybe", "- a", "port: ["]
    {
        let file = file(text);
        let error = refusal(&format!("serve m --config {}", file.path().to_str().unwrap()));
        assert!(error.contains("configuration file"), "{text}: {error}");
    }
}

#[test]
fn a_service_link_is_refused_by_the_name_of_its_variable() {
    let environment = Environment::from([("BINDERY_PORT", "tcp://10.0.0.1:8000")]);
    let error = refusal_in("serve m", &environment);
    assert!(error.contains("BINDERY_PORT") && error.contains("enableServiceLinks"), "{error}");
}

#[test]
fn variables_that_name_no_flag_are_listed() {
    let environment = Environment::from([("BINDERY_SERVICE_HOST", "10.0.0.1"), ("PORT", "1")]);
    assert_eq!(serve_in("serve m", &environment).ignored_variables, ["BINDERY_SERVICE_HOST"]);
}

#[test]
fn impossible_values_are_refused_with_what_is_allowed() {
    for (line, wanted) in [
        ("serve m --kv-cache-dtype fp8", "float16"),
        ("serve m --load-format tensorizer", "dummy"),
        ("serve m --block-size 0", "above 0"),
        ("serve m --threads many", "above 0"),
        ("serve m --max-cpu-isa avx", "portable, avx2, avx512"),
        ("serve m --port 70000", "0 to 65535"),
        ("serve m --block-size 64 --max-model-len 32", "1 to --max-model-len (32)"),
        ("serve m --memory-bytes 1GiB --gpu-memory-utilization 0.5", "exclude each other"),
        ("serve m --gpu-memory-utilization 1.5", "at most 1"),
        ("serve m --max-model-len 1.5K", "4K"),
        ("serve m --host example.org", "localhost"),
        ("serve m --no-such-flag", "--no-such-flag"),
        ("serve hf://only-a-name", "hf://org/name"),
        ("serve m --served-model-name= ", "1 to 512"),
    ] {
        let error = refusal(line);
        assert!(error.contains(wanted), "{line}: {error}");
    }
}

#[test]
fn lengths_are_read_as_vllm_reads_them() {
    assert_eq!(serve("serve m --max-model-len 1k").max_model_len.unwrap().get(), 1000);
    assert_eq!(serve("serve m --max-model-len 32K").max_model_len.unwrap().get(), 32_768);
    assert_eq!(serve("serve m --max-model-len -1").max_model_len, None);
}

#[test]
fn secrets_are_not_in_debug_output() {
    let environment =
        Environment::from([("HF_TOKEN", "hf_secret"), ("BINDERY_API_KEY", "sk-secret")]);
    let config = serve_in("serve m", &environment);
    assert!(config.hub.token.is_some() && config.api_keys.len() == 1);
    assert!(!format!("{config:?}").contains("secret"));
}

#[test]
fn the_hub_is_configured_as_its_own_clients_are() {
    let environment =
        Environment::from([("HF_HOME", "/h"), ("HF_ENDPOINT", "http://127.0.0.1:1/")]);
    let hub = serve_in("serve m", &environment).hub;
    assert_eq!(hub.cache, Path::new("/h/hub"));
    assert_eq!(hub.endpoint, "http://127.0.0.1:1");
    let error = refusal_in("serve m", &Environment::from([("HF_ENDPOINT", "ftp://x")]));
    assert!(error.contains("HF_ENDPOINT"));
}

#[test]
fn plan_takes_the_same_flags_and_a_format() {
    match parse(words("plan m --format json --block-size 8"), &Environment::default()).unwrap() {
        Command::Plan { config, format } => {
            assert_eq!((config.block_size.get(), format), (8, PlanFormat::Json));
        }
        other => panic!("wanted plan, got {other:?}"),
    }
}

#[test]
fn the_example_names_the_bound_port_and_survives_the_shell() {
    let listen = serve("serve m --port 0 --host 0.0.0.0").listen;
    let line = listen.example(4321, "it's", &[], Example::Chat);
    assert!(
        line.contains("http://127.0.0.1:4321/v1/chat/") && !line.contains("Authorization"),
        "{line}"
    );
    let script = line.replace("curl -sS", "printf %s");
    let printed = std::process::Command::new("sh").args(["-c", &script]).output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&printed).contains("\"model\":\"it's\""), "{line}");
    let listen = serve("serve m --uds /tmp/s --api-key k").listen;
    let line = listen.example(0, "m", &[ApiKey("k".into())], Example::Completion);
    assert!(line.contains("--unix-socket '/tmp/s'") && line.contains("$KEY"), "{line}");
    assert!(line.contains("/v1/completions") && line.contains("\"prompt\""), "{line}");
}

#[test]
fn a_benchmark_in_this_process_may_name_a_model_and_asks_the_hub_of_the_environment() {
    let environment = Environment::from([("HF_ENDPOINT", "http://hub.local/")]);
    match parse(words("bench memory hf://org/name --sections live,cost"), &environment).unwrap() {
        Command::BenchMemory { model: Some(model), arguments } => {
            assert_eq!(model.hub.endpoint, "http://hub.local");
            assert_eq!(arguments.sections.len(), 2);
        }
        other => panic!("wanted bench memory with a model, got {other:?}"),
    }
    let sweep = parse(words("bench sweep --max-num-seqs 2,4"), &environment).unwrap();
    assert!(matches!(sweep, Command::BenchSweep { model: None, .. }), "{sweep:?}");
    assert!(refusal("bench memory --sections all").contains("--sections"));
}
