//! Everything that can go wrong for a client: one enum, its message, its stable label and its status.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::engine::handle::Refused;
use crate::model::text::TextError;

/// A request that gets no answer of its own.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApiError {
    #[error("the body is not valid JSON: {0}")]
    InvalidJson(String),
    #[error("the body has more than {limit} bytes")]
    BodyTooLarge { limit: usize },
    #[error("{param}: {message}")]
    Invalid { param: String, message: String },
    #[error("{param} is not supported")]
    Unsupported { param: String },
    #[error(
        "the model takes at most {limit} tokens: the prompt has {prompt} and {output} are asked for; shorten either"
    )]
    ContextLength { prompt: usize, output: usize, limit: usize },
    #[error("the chat template failed: {0}")]
    Template(String),
    #[error("the model {0:?} does not exist")]
    UnknownModel(String),
    #[error("there is no {method} {path}")]
    NotFound { method: String, path: String },
    #[error("{path} does not answer {method}")]
    MethodNotAllowed { method: String, path: String },
    #[error("an API key is needed: send it as 'Authorization: Bearer KEY'")]
    Unauthorized,
    #[error("{message}; retry later")]
    Overloaded { message: String, limit: &'static str, retry_after: Duration },
    #[error("the model is loading; retry later")]
    Loading,
    #[error("the server is shutting down; retry elsewhere")]
    Draining { retry_after: Duration },
    #[error("the request took longer than {} s", limit.as_secs())]
    Timeout { limit: Duration },
    #[error("the body did not come within {} s", limit.as_secs())]
    SlowBody { limit: Duration },
    #[error("the body cannot be read: the connection broke off")]
    BrokenBody,
    #[error("the engine has stopped")]
    EngineStopped,
}

/// How long a client should wait for a model that loads.
const LOADING_RETRY: Duration = Duration::from_secs(5);

impl ApiError {
    /// A parameter whose value is impossible.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: param.into(), message: message.into() }
    }

    /// Stable label: the `code` in the body and the `reason` of the metric.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidJson(_) => "invalid_json",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::Invalid { .. } => "invalid_value",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::ContextLength { .. } => "context_length_exceeded",
            Self::Template(_) => "chat_template_failed",
            Self::UnknownModel(_) => "model_not_found",
            Self::NotFound { .. } => "not_found",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::Unauthorized => "invalid_api_key",
            Self::Overloaded { .. } => "overloaded",
            Self::Loading => "model_loading",
            Self::Draining { .. } => "draining",
            Self::Timeout { .. } => "timeout",
            Self::SlowBody { .. } => "body_too_slow",
            Self::BrokenBody => "body_broken",
            Self::EngineStopped => "engine_stopped",
        }
    }

    /// OpenAI's class of error.
    fn kind(&self) -> &'static str {
        match self.status() {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::InvalidJson(_)
            | Self::Invalid { .. }
            | Self::Unsupported { .. }
            | Self::ContextLength { .. }
            | Self::BrokenBody
            | Self::Template(_) => StatusCode::BAD_REQUEST,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UnknownModel(_) | Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Overloaded { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Timeout { .. } | Self::SlowBody { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::Loading | Self::Draining { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::EngineStopped => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. } | Self::Draining { retry_after } => {
                Some(*retry_after)
            }
            Self::Loading => Some(LOADING_RETRY),
            _ => None,
        }
    }

    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid { param, .. } | Self::Unsupported { param } => Some(param),
            Self::UnknownModel(_) => Some("model"),
            _ => None,
        }
    }

    /// The body in OpenAI's shape.
    pub fn body(&self) -> serde_json::Value {
        json!({"error": {
            "message": self.to_string(), "type": self.kind(), "param": self.param(), "code": self.code(),
        }})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self == Self::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> Self {
        let message = refused.to_string();
        match refused {
            Refused::TooManyRequests { retry_after, .. } => {
                Self::Overloaded { message, limit: "max_num_queued_reqs", retry_after }
            }
            Refused::TooManyTokens { retry_after, .. } => {
                Self::Overloaded { message, limit: "max_num_queued_tokens", retry_after }
            }
            Refused::Draining { retry_after } => Self::Draining { retry_after },
            Refused::Stopped => Self::EngineStopped,
            Refused::NeverFits { .. } => Self::invalid("max_tokens", message),
            Refused::TooWide { .. } => Self::invalid("n", message),
            Refused::TooManyAtOnce { .. } => Self::invalid("prompt", message),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Template { reason } => Self::Template(reason),
            TextError::NoTemplate => {
                Self::invalid("messages", "the model has no chat template: use /v1/completions")
            }
            other => Self::invalid("prompt", other.to_string()),
        }
    }
}
