//! Templates as models bring them, and as somebody might who means harm.

use serde_json::{Map, Value, json};

use super::{Ordering, STUCK, Template, cut_at_marker};
use crate::model::text::{ChatRequest, SpecialTexts, TextError};

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

fn chat<'a>(messages: &'a Value, kwargs: &'a Map<String, Value>) -> ChatRequest<'a> {
    ChatRequest {
        messages,
        add_generation_prompt: true,
        continue_final_message: false,
        kwargs,
        template: None,
    }
}

fn render(source: &str, messages: &Value) -> Result<String, TextError> {
    let kwargs = Map::new();
    let specials = SpecialTexts { bos: Some("<s>".to_owned()), ..SpecialTexts::default() };
    Template::parse(source)?.render(&chat(messages, &kwargs), &specials)
}

fn check(source: &str, wanted: &str) {
    let messages = json!([{"role": "user", "content": "hi"}]);
    assert_eq!(render(source, &messages).unwrap(), wanted);
}

fn reason(source: &str) -> String {
    match render(source, &json!([{"role": "user", "content": "hi"}])) {
        Err(TextError::Template { reason }) => reason,
        other => panic!("wanted a template error, got {other:?}"),
    }
}

#[test]
fn a_chat_becomes_a_prompt() {
    check(CHATML, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
    check("{{ bos_token }}{{ messages[0].content }}", "<s>hi");
}

#[test]
fn blocks_leave_no_lines_behind() {
    check("{% if true %}\n  {% set x = 1 %}\na\n{% endif %}\nb", "a\nb");
}

#[test]
fn tojson_is_written_as_python_writes_it() {
    check(
        "{{ {'a': [1, 2.5, none], 'b': 'é<\"'} | tojson }}",
        "{\"a\": [1, 2.5, null], \"b\": \"é<\\\"\"}",
    );
    check("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", "{\"a\": 2, \"b\": 1}");
    check("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}");
    check("{{ 'é😀' | tojson(ensure_ascii=true) }}", "\"\\u00e9\\ud83d\\ude00\"");
    check("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]");
}

#[test]
fn python_methods_loop_controls_and_generation_tags_are_known() {
    check("{{ ' a '.strip() ~ 'b,c'.split(',')[1] }}", "ac");
    check("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01");
    check("{{ '{}-{:3}'.format(1, 2) }}", "1-  2");
    check("a {%- generation %} b {%- endgeneration -%} c", "a bc");
}

#[test]
fn raise_exception_says_the_templates_words() {
    let reason = reason("{{ raise_exception('roles must alternate') }}");
    assert!(reason.contains("roles must alternate"), "{reason}");
}

#[test]
fn kwargs_are_variables_but_shadow_nothing() {
    let messages = json!([]);
    let kwargs = |value: Value| value.as_object().unwrap().clone();
    let template = Template::parse("{{ enable_thinking }}{{ messages | length }}").unwrap();
    let good = kwargs(json!({"enable_thinking": 7}));
    let prompt = template.render(&chat(&messages, &good), &SpecialTexts::default());
    assert_eq!(prompt.unwrap(), "70");
    let bad = kwargs(json!({"messages": [1, 2]}));
    let prompt = template.render(&chat(&messages, &bad), &SpecialTexts::default());
    assert!(matches!(prompt, Err(TextError::Template { .. })));
}

fn proceed(source: &str, content: &str) -> Result<String, TextError> {
    let messages =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]);
    let kwargs = Map::new();
    let chat = ChatRequest {
        add_generation_prompt: false,
        continue_final_message: true,
        ..chat(&messages, &kwargs)
    };
    Template::parse(source)?.render(&chat, &SpecialTexts::default())
}

#[test]
fn a_continued_prompt_ends_with_the_final_message() {
    let start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(proceed(CHATML, "Sure, ").unwrap(), format!("{start}Sure, "));
    assert_eq!(proceed(CHATML, "").unwrap(), start);
    let trims = CHATML.replace("message['content']", "message['content'].strip()");
    assert_eq!(proceed(&trims, "Sure, ").unwrap(), format!("{start}Sure,"));
    assert!(proceed("nothing", "Sure").is_err());
    assert!(cut_at_marker("").is_err());
}

#[test]
fn bombs_and_endless_work_are_refused() {
    let loops =
        "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
    let double = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    let repeat = "{{ 'x' * 90000000000 }}{{ ('x' * 90000000) | length }}";
    let json = "{% set ns = namespace(s=['x']) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}";
    let calls = "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}";
    let capture = "{% set x %}yyyyyyyy{% endset %}{% macro d(x, n) %}{% if n %}{{ d(x ~ x, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ d(x, 50) }}";
    let wide = "{{ '{:99999999}'.format(1) }}";
    for source in [loops, double, repeat, json, calls, capture, wide] {
        let reason = reason(source);
        assert!(!reason.is_empty() && reason.len() < 4096, "{source}: {reason}");
    }
}

#[test]
fn deep_templates_are_refused_without_a_crash() {
    for (open, close) in [("(", ")"), ("[", "]"), ("{% if true %}", "{% endif %}")] {
        let deep = |n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
        let source = if open == "(" || open == "[" {
            format!("{{{{ {} }}}}", deep(20_000))
        } else {
            deep(20_000)
        };
        reason(&source);
    }
}

/// What fuel does not count: each level compares two lists twice that are each other's parts.
fn shared_lists_compared(levels: u32) -> String {
    let deeper = "{% set a.x = [a.x, a.x] %}{% set b.x = [b.x, b.x] %}".repeat(levels as usize);
    format!(
        "{{% set a = namespace(x=[0]) %}}{{% set b = namespace(x=[0]) %}}{deeper}{{{{ a.x == b.x }}}}"
    )
}

#[test]
fn a_template_that_does_not_end_fails_at_its_deadline() {
    let mut template = Template::parse(&shared_lists_compared(20)).unwrap();
    let (messages, kwargs) = (json!([{"role": "user", "content": "x"}]), Map::new());
    template.limit = std::time::Duration::from_millis(20);
    let refused = template.render(&chat(&messages, &kwargs), &SpecialTexts::default()).unwrap_err();
    assert!(refused.to_string().contains("did not end within 0.02 s"), "{refused}");
    // It ends in the background, and then nothing is stuck.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while STUCK.load(Ordering::Relaxed) > 0 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(STUCK.load(Ordering::Relaxed), 0);
    assert_eq!(
        Template::parse(&shared_lists_compared(3))
            .unwrap()
            .render(&chat(&messages, &kwargs), &SpecialTexts::default())
            .unwrap(),
        "True"
    );
}
