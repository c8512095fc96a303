//! What both endpoints let a client ask of generation, read and checked.

use std::num::NonZeroU32;
use std::sync::Arc;

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use super::state::{ApiLimits, ApiState, Loaded};
use crate::model::text::{IncludeStop, SpecialTokens};
use crate::request::{BeamParams, Decoding, EarlyStopping, Request, Salt, TokenId};
use crate::sampling::Params;

/// Known fields that ask for something that is not done here, and are refused rather than ignored.
const UNSUPPORTED: [&str; 25] = [
    "tools",
    "functions",
    "suffix",
    "audio",
    "prediction",
    "web_search_options",
    "reasoning_effort",
    "chat_template",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "structured_outputs",
    "mm_processor_kwargs",
    "documents",
    "logits_processors",
    "allowed_token_ids",
    "bad_words",
    "truncate_prompt_tokens",
    "kv_transfer_params",
    "vllm_xargs",
    "prompt_embeds",
    "thinking_token_budget",
    "parallel_tool_calls",
];

/// How an answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    Stream { usage: StreamUsage },
}

/// When a stream says how many tokens were used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Never,
    AtEnd,
    Continuously,
}

/// Whether `usage` names preemptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PreemptionDetails {
    Told,
    Untold,
}

/// Whether answers carry token ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TokenIds {
    Returned,
    Left,
}

/// How many choices a client gets of how many that are computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Choices {
    Sampled { returned: NonZeroU32, computed: NonZeroU32 },
    Beams { returned: NonZeroU32, params: BeamParams },
}

impl Choices {
    /// How many choices of each prompt a client gets.
    pub(crate) fn returned(self) -> NonZeroU32 {
        match self {
            Self::Sampled { returned, .. } | Self::Beams { returned, .. } => returned,
        }
    }

    /// What choosing the best answers needs at each position.
    fn by_logprob(self) -> Option<u32> {
        match self {
            Self::Sampled { returned, computed } if computed > returned => Some(0),
            Self::Sampled { .. } | Self::Beams { .. } => None,
        }
    }
}

/// Everything but the prompt.
#[derive(Debug, Clone)]
pub(crate) struct Generation {
    pub(crate) model: String,
    pub(crate) choices: Choices,
    pub(crate) params: Params,
    /// How many of the most likely tokens the client is told at each position. More may be computed, to choose by.
    pub(crate) logprobs: Option<u32>,
    /// Absent: the endpoint's default.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) include_stop: IncludeStop,
    pub(crate) special: SpecialTokens,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) priority: i32,
    pub(crate) salt: Salt,
    pub(crate) delivery: Delivery,
    pub(crate) preemptions: PreemptionDetails,
    pub(crate) token_ids: TokenIds,
}

/// What reading a request needs to know beside its body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading<'a> {
    pub(crate) state: &'a ApiState,
    pub(crate) loaded: &'a Loaded,
    pub(crate) key: Option<&'a str>,
}

impl Generation {
    /// Reads what both endpoints share. `logprobs`: how many of the most likely tokens are told, read by the endpoint.
    pub(crate) fn read(
        fields: &mut Fields,
        reading: Reading<'_>,
        logprobs: Option<u32>,
    ) -> Result<Self, ApiError> {
        let limits = &reading.state.limits;
        refuse_unsupported(fields)?;
        let model = reading.state.served(fields.string("model", 4096)?)?;
        let delivery = read_delivery(fields)?;
        let choices = read_choices(fields, limits, delivery)?;
        let stop = fields.strings("stop", limits.stop_strings, limits.stop_string_bytes)?;
        let salt = fields.string("cache_salt", 1024)?;
        let include = fields.bool("include_stop_str_in_output", false)?;
        let skip_special = fields.bool("skip_special_tokens", true)?;
        // Accepted and without effect on byte-exact detokenizing.
        fields.bool("spaces_between_special_tokens", true)?;
        let params = read_params(fields, reading, logprobs.or_else(|| choices.by_logprob()))?;
        let generation = Self {
            model,
            choices,
            params,
            logprobs,
            max_tokens: None,
            stop,
            include_stop: if include { IncludeStop::Yes } else { IncludeStop::No },
            special: if skip_special { SpecialTokens::Skip } else { SpecialTokens::Keep },
            prompt_logprobs: fields.count("prompt_logprobs", 0..=limits.top_logprobs)?,
            priority: i32::try_from(
                fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.unwrap_or(0),
            )
            .unwrap_or(0),
            salt: reading.state.salt(salt.as_deref(), reading.key),
            delivery,
            preemptions: match fields.bool("include_preemptions", false)? {
                true => PreemptionDetails::Told,
                false => PreemptionDetails::Untold,
            },
            token_ids: if fields.bool("return_token_ids", false)? {
                TokenIds::Returned
            } else {
                TokenIds::Left
            },
        };
        generation.check_combinations(reading.loaded)?;
        Ok(generation)
    }

    /// Refuses what is asked for together and would be without effect.
    fn check_combinations(&self, loaded: &Loaded) -> Result<(), ApiError> {
        let Self { params, .. } = self;
        let streamed = matches!(self.delivery, Delivery::Stream { .. });
        if streamed && self.prompt_logprobs.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "cannot be streamed"));
        }
        if !matches!(self.choices, Choices::Beams { .. }) {
            return Ok(());
        }
        // Beams are not drawn: temperature, seed, top_k, top_p and min_p have no meaning, as in vLLM. What would change
        // which beams are best, or what is told of them, is refused.
        let repetition = loaded.text.sampling_defaults().repetition_penalty.unwrap_or(1.0);
        let penalties = [
            params.presence_penalty,
            params.frequency_penalty,
            params.repetition_penalty - repetition,
        ];
        let without_effect = [
            ("stop", !self.stop.is_empty()),
            ("logprobs", self.logprobs.is_some()),
            ("logit_bias", !params.logit_bias.is_empty()),
            ("min_tokens", params.min_tokens > 0),
            ("presence_penalty, frequency_penalty and repetition_penalty", penalties != [0.0; 3]),
        ];
        match without_effect.iter().find(|(_, asked)| *asked) {
            Some((param, _)) => {
                Err(ApiError::invalid(*param, "is not supported with use_beam_search"))
            }
            None => Ok(()),
        }
    }

    /// Refuses an answer that would hold too many log-probabilities of `tokens` prompt tokens.
    pub(crate) fn check_prompt_logprobs(
        &self,
        tokens: usize,
        limits: &ApiLimits,
    ) -> Result<(), ApiError> {
        let most = limits.prompt_logprobs;
        let entries = self.prompt_logprobs.map_or(0, |top| tokens * (top as usize + 1));
        if entries > most {
            let message = format!("the answer would hold {entries} of them, wanted at most {most}");
            return Err(ApiError::invalid("prompt_logprobs", message));
        }
        Ok(())
    }

    /// The request for one of the client's prompts.
    ///
    /// # Errors
    /// When prompt and answer do not fit the model's context.
    pub(crate) fn request(
        &self,
        loaded: &Loaded,
        prompt: Vec<TokenId>,
        prompt_index: u32,
        default_max_tokens: Option<u32>,
    ) -> Result<Request, ApiError> {
        let limit = loaded.handle.capacity().max_model_len as usize;
        let room = u32::try_from(limit.saturating_sub(prompt.len())).unwrap_or(u32::MAX);
        let stated = self.max_tokens.map(|tokens| tokens.max(1));
        let output = stated.unwrap_or(1);
        if output > room {
            let (prompt, output) = (prompt.len(), output as usize);
            return Err(ApiError::ContextLength { prompt, output, limit });
        }
        // As in vLLM: what the model's authors say bounds what clients say, and a default never fails a request.
        let most = loaded.text.sampling_defaults().max_new_tokens.unwrap_or(room).min(room);
        let wanted = stated.or(default_max_tokens).unwrap_or(room).min(most);
        let max_tokens = NonZeroU32::new(wanted).unwrap_or(NonZeroU32::MIN);
        if self.params.min_tokens > max_tokens.get() {
            return Err(ApiError::invalid(
                "min_tokens",
                format!("wanted at most max_tokens ({max_tokens})"),
            ));
        }
        let params = Params { prompt_index, ..self.params.clone() };
        let stop_tokens = Arc::clone(&params.stop_tokens);
        let decoding = match self.choices {
            Choices::Sampled { computed, .. } => {
                Decoding::Sample { params: Arc::new(params), choices: computed }
            }
            Choices::Beams { params, .. } => Decoding::Beam(params),
        };
        Ok(Request {
            id: loaded.handle.next_id(),
            prompt: prompt.into(),
            decoding,
            max_tokens,
            stop_tokens,
            priority: self.priority,
            salt: self.salt,
            prompt_logprobs: self.prompt_logprobs,
        })
    }
}

fn refuse_unsupported(fields: &mut Fields) -> Result<(), ApiError> {
    let is_empty = |value: &Value| match value {
        Value::Array(items) => items.is_empty(),
        Value::String(text) => text.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(on) => !on,
        _ => false,
    };
    UNSUPPORTED.iter().try_for_each(|name| {
        fields.refuse(name, |value| is_empty(value) || *name == "parallel_tool_calls")
    })?;
    for name in ["tool_choice", "function_call"] {
        fields.refuse(name, |value| matches!(value.as_str(), Some("none" | "auto")))?;
    }
    fields.refuse("response_format", |value| {
        value.get("type").and_then(Value::as_str) == Some("text")
    })?;
    fields.refuse("modalities", |value| *value == serde_json::json!(["text"]))?;
    // Known to OpenAI's API and without a meaning for an answer's content.
    for name in [
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "request_id",
    ] {
        fields.take(name);
    }
    Ok(())
}

fn read_delivery(fields: &mut Fields) -> Result<Delivery, ApiError> {
    let stream = fields.bool("stream", false)?;
    let Some(options) = fields.object("stream_options")? else {
        let usage = StreamUsage::Never;
        return Ok(if stream { Delivery::Stream { usage } } else { Delivery::Whole });
    };
    if !stream {
        return Err(ApiError::invalid("stream_options", "wanted only with stream: true"));
    }
    let mut options = Fields::of(options);
    let at_end = options.bool("include_usage", false)?;
    let continuously = options.bool("continuous_usage_stats", false)?;
    options.bool("include_obfuscation", false)?;
    options.ignore_rest();
    let usage = match (at_end, continuously) {
        (true, true) => StreamUsage::Continuously,
        (true, false) => StreamUsage::AtEnd,
        (false, _) => StreamUsage::Never,
    };
    Ok(Delivery::Stream { usage })
}

fn read_choices(
    fields: &mut Fields,
    limits: &ApiLimits,
    delivery: Delivery,
) -> Result<Choices, ApiError> {
    let n =
        fields.count("n", 1..=limits.choices)?.and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MIN);
    let best_of =
        fields.count("best_of", 1..=limits.choices)?.and_then(NonZeroU32::new).unwrap_or(n);
    let beam = fields.bool("use_beam_search", false)?;
    let length_penalty = fields.number("length_penalty", -10.0..=10.0)?.unwrap_or(1.0);
    let early_stopping = read_early_stopping(fields)?;
    let whole_only = |param: &str| match delivery {
        Delivery::Stream { .. } => {
            Err(ApiError::invalid(param, "an answer that is chosen at the end cannot be streamed"))
        }
        Delivery::Whole => Ok(()),
    };
    if best_of < n {
        return Err(ApiError::invalid(
            "best_of",
            format!("wanted at least n ({n}), got {best_of}"),
        ));
    }
    if beam {
        whole_only("use_beam_search")?;
        let params = BeamParams { width: best_of, length_penalty, early_stopping };
        return Ok(Choices::Beams { returned: n, params });
    }
    if best_of > n {
        whole_only("best_of")?;
    }
    Ok(Choices::Sampled { returned: n, computed: best_of })
}

fn read_early_stopping(fields: &mut Fields) -> Result<EarlyStopping, ApiError> {
    match fields.take("early_stopping") {
        None | Some(Value::Bool(false)) => Ok(EarlyStopping::Heuristic),
        Some(Value::Bool(true)) => Ok(EarlyStopping::Always),
        Some(Value::String(text)) if text == "never" => Ok(EarlyStopping::Never),
        Some(_) => Err(ApiError::invalid("early_stopping", "wanted true, false or \"never\"")),
    }
}

fn read_params(
    fields: &mut Fields,
    reading: Reading<'_>,
    logprobs: Option<u32>,
) -> Result<Params, ApiError> {
    let defaults = reading.loaded.text.sampling_defaults();
    let temperature = fields.number("temperature", 0.0..=2.0)?;
    let stop_tokens = read_stop_tokens(fields, reading)?;
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?;
    let default_top_k = defaults.top_k.map(i64::from);
    Ok(Params {
        temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
        top_k: top_k
            .or(default_top_k)
            .and_then(|k| u32::try_from(k).ok())
            .and_then(NonZeroU32::new),
        top_p: fields.number("top_p", f32::MIN_POSITIVE..=1.0)?.or(defaults.top_p).unwrap_or(1.0),
        min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        repetition_penalty: fields
            .number("repetition_penalty", 0.01..=100.0)?
            .or(defaults.repetition_penalty)
            .unwrap_or(1.0),
        logit_bias: read_logit_bias(fields, reading)?,
        seed: read_seed(fields, reading.state)?,
        prompt_index: 0,
        min_tokens: fields.count("min_tokens", 0..=u32::MAX)?.unwrap_or(0),
        stop_tokens,
        logprobs,
    })
}

/// The model's end tokens unless they are to be ignored, and the client's own.
fn read_stop_tokens(fields: &mut Fields, reading: Reading<'_>) -> Result<Arc<[TokenId]>, ApiError> {
    let vocab = reading.loaded.text.vocab_size();
    let mut tokens = fields.tokens("stop_token_ids", reading.state.limits.stop_tokens, vocab)?;
    if !fields.bool("ignore_eos", false)? {
        tokens.extend_from_slice(reading.loaded.text.end_tokens());
    }
    tokens.sort_unstable();
    tokens.dedup();
    Ok(tokens.into())
}

fn read_logit_bias(
    fields: &mut Fields,
    reading: Reading<'_>,
) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let (vocab, most) = (reading.loaded.text.vocab_size(), reading.state.limits.logit_biases);
    if map.len() > most {
        return Err(ApiError::invalid(
            "logit_bias",
            format!("wanted at most {most} tokens, got {}", map.len()),
        ));
    }
    let mut biases = Vec::with_capacity(map.len());
    for (name, value) in map {
        let id = name.parse::<u32>().ok().filter(|&id| (id as usize) < vocab);
        let id = id.ok_or_else(|| {
            let name: String = name.chars().take(40).collect();
            ApiError::invalid("logit_bias", format!("{name:?} is not a token id below {vocab}"))
        })?;
        let mut one = Fields::of([("logit_bias".to_owned(), value)].into_iter().collect());
        let bias = one.number("logit_bias", -100.0..=100.0)?.unwrap_or(0.0);
        biases.push((TokenId(id), bias));
    }
    biases.sort_unstable_by_key(|(token, _)| *token);
    biases.dedup_by_key(|(token, _)| *token);
    Ok(biases)
}

/// The client's seed, else the server's next one.
fn read_seed(fields: &mut Fields, state: &ApiState) -> Result<u64, ApiError> {
    match fields.integer("seed", i64::MIN..=i64::MAX)? {
        Some(seed) => Ok(u64::from_ne_bytes(seed.to_ne_bytes())),
        None => state.next_seed(),
    }
}
