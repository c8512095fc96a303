//! What every handler sees.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

use super::error::ApiError;
use crate::engine::handle::Handle;
use crate::metrics::Metrics;
use crate::model::text::Text;
use crate::request::Salt;

/// Whose requests share cached blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheScope {
    /// Those with the same API key: how long an answer takes tells nobody else what was asked before.
    Key,
    /// All of them.
    All,
}

/// What a request may ask for at most.
#[derive(Debug, Clone, Copy)]
pub struct ApiLimits {
    pub body_bytes: usize,
    /// Choices of one prompt, and beams.
    pub choices: u32,
    pub prompts: usize,
    pub stop_strings: usize,
    pub stop_string_bytes: usize,
    pub stop_tokens: usize,
    pub logit_biases: usize,
    pub top_logprobs: u32,
    /// Log-probabilities of prompt tokens that one answer may hold: each is an object of some 100 bytes.
    pub prompt_logprobs: usize,
    /// Log-probabilities of generated tokens that an answer may hold that is not streamed.
    pub whole_logprobs: u64,
    /// A body must have come by then.
    pub body_timeout: Duration,
    /// A request that is not answered by then is cancelled.
    pub request_timeout: Duration,
}

impl ApiLimits {
    /// The limits that hold unless flags say otherwise, for bodies of at most `body_bytes`.
    pub fn with_body_bytes(body_bytes: usize) -> Self {
        Self {
            body_bytes,
            choices: 64,
            prompts: 128,
            stop_strings: 16,
            stop_string_bytes: 1024,
            stop_tokens: 128,
            logit_biases: 1024,
            top_logprobs: 20,
            prompt_logprobs: 1 << 18,
            whole_logprobs: 1 << 20,
            body_timeout: Duration::from_secs(30),
            request_timeout: Duration::from_secs(3600),
        }
    }
}

/// A model that can answer.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub handle: Handle,
    pub text: Arc<Text>,
    /// Names what computes: the same fingerprint, seed and prompt give the same answer.
    pub fingerprint: String,
    /// Bytes of the longest token: a text with more than this many bytes per allowed token cannot fit.
    pub longest_token: usize,
    /// Places for the work of templates and tokenizers, which take a processor each.
    pub readers: Arc<Semaphore>,
}

impl Loaded {
    /// Places for as much reading at once as the machine has processors.
    pub fn readers() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, NonZeroUsize::get)))
    }
}

/// Whom the server answers.
#[derive(Debug)]
enum Keys {
    /// Nobody yet: they are still to be told.
    Untold,
    Anybody,
    HoldersOf(Vec<String>),
}

impl Keys {
    fn of(keys: Vec<String>) -> Self {
        if keys.is_empty() { Self::Anybody } else { Self::HoldersOf(keys) }
    }
}

/// Where the seeds of requests come from that bring none.
#[derive(Debug)]
pub enum Seeds {
    /// A new one each, from the operating system.
    Random,
    /// Those that follow from `seed`, one after the other: the same requests in the same order get the same ones.
    From { seed: u64, used: AtomicU64 },
}

impl Seeds {
    /// Those that follow from `seed`, or random ones.
    pub fn new(seed: Option<u64>) -> Self {
        seed.map_or(Self::Random, |seed| Self::From { seed, used: AtomicU64::new(0) })
    }
}

/// What every handler sees. The model comes when it is loaded.
#[derive(Debug)]
pub struct ApiState {
    pub served_model_names: Vec<String>,
    pub limits: ApiLimits,
    pub scope: CacheScope,
    pub metrics: Arc<Metrics>,
    pub created: u64,
    /// Seeds of requests that bring none.
    pub seeds: Seeds,
    /// Room for the bytes of larger bodies while they are read, see [`super::body`].
    pub(super) bodies: Arc<Semaphore>,
    keys: RwLock<Keys>,
    loaded: OnceLock<Loaded>,
}

impl ApiState {
    /// A state without a model. The first of the names is the one that answers carry.
    pub fn new(
        served_model_names: Vec<String>,
        keys: Vec<String>,
        limits: ApiLimits,
        scope: CacheScope,
        metrics: Arc<Metrics>,
    ) -> Self {
        let seeds = Seeds::Random;
        let created =
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (keys, loaded) = (RwLock::new(Keys::of(keys)), OnceLock::new());
        let bodies = Arc::new(Semaphore::new(limits.body_bytes.min(Semaphore::MAX_PERMITS)));
        Self { served_model_names, limits, scope, metrics, created, seeds, bodies, keys, loaded }
    }

    /// The seed of the next request that brings none.
    ///
    /// # Errors
    /// When the operating system has no randomness.
    pub fn next_seed(&self) -> Result<u64, ApiError> {
        match &self.seeds {
            Seeds::Random => getrandom::u64().map_err(|_| ApiError::EngineStopped),
            Seeds::From { seed, used } => {
                let mut hasher = blake3::Hasher::new_derive_key("bindery 2026 seed of a request");
                hasher.update(&seed.to_le_bytes());
                hasher.update(&used.fetch_add(1, Ordering::Relaxed).to_le_bytes());
                let mut bytes = [0; 8];
                hasher.finalize_xof().fill(&mut bytes);
                Ok(u64::from_le_bytes(bytes))
            }
        }
    }

    /// From now on requests are answered. A second call changes nothing.
    pub fn set_loaded(&self, loaded: Loaded) {
        // The first model stays: a process serves one.
        let _ = self.loaded.set(loaded);
    }

    /// The model, when it can answer.
    ///
    /// # Errors
    /// [`ApiError::Loading`] before [`ApiState::set_loaded`].
    pub fn loaded(&self) -> Result<&Loaded, ApiError> {
        self.loaded.get().ok_or(ApiError::Loading)
    }

    /// Answers nobody until [`ApiState::set_keys`].
    pub fn await_keys(&self) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Keys::Untold;
    }

    /// Replaces the keys that clients may show. None: every client may ask.
    pub fn set_keys(&self, keys: Vec<String>) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Keys::of(keys);
    }

    /// Whether a client with this key may ask. Takes the same time for every key of one length.
    pub fn admits(&self, shown: Option<&str>) -> bool {
        use subtle::ConstantTimeEq;
        let shown = shown.unwrap_or_default().as_bytes();
        match &*self.keys.read().unwrap_or_else(PoisonError::into_inner) {
            Keys::Untold => false,
            Keys::Anybody => true,
            Keys::HoldersOf(keys) => {
                let is_shown = |key: &String| bool::from(key.as_bytes().ct_eq(shown));
                keys.iter().fold(false, |found, key| found | is_shown(key))
            }
        }
    }

    /// What separates the caches of clients: their own salt, else their key, by the scope.
    pub fn salt(&self, cache_salt: Option<&str>, key: Option<&str>) -> Salt {
        let derive = |context, text: &str| Salt(blake3::derive_key(context, text.as_bytes()));
        let of_key = match (self.scope, key) {
            (CacheScope::Key, Some(key)) => derive("bindery 2026 prefix cache: api key", key),
            (CacheScope::Key, None) | (CacheScope::All, _) => Salt::default(),
        };
        match cache_salt {
            None => of_key,
            // Within the scope: two keys that send one salt still share nothing.
            Some(salt) => {
                let own = derive("bindery 2026 prefix cache: salt", salt);
                let mut hasher = blake3::Hasher::new_keyed(&of_key.0);
                Salt(*hasher.update(&own.0).finalize().as_bytes())
            }
        }
    }

    /// Refuses names that are not served. An absent name is the first one.
    ///
    /// # Errors
    /// [`ApiError::UnknownModel`].
    pub fn served(&self, name: Option<String>) -> Result<String, ApiError> {
        match name {
            None => Ok(self.served_model_names.first().cloned().unwrap_or_default()),
            Some(name) if self.served_model_names.contains(&name) => Ok(name),
            Some(name) => Err(ApiError::UnknownModel(name.chars().take(200).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_answered_until_the_keys_are_told() {
        let metrics = Arc::new(Metrics::new("tiny").unwrap());
        let limits = ApiLimits::with_body_bytes(1 << 20);
        let state = ApiState::new(vec![], vec![], limits, CacheScope::Key, metrics);
        assert!(state.admits(None) && state.admits(Some("x")));
        state.await_keys();
        assert!(!state.admits(None) && !state.admits(Some("")));
        state.set_keys(vec!["a".to_owned(), "b".to_owned()]);
        assert!(state.admits(Some("b")) && !state.admits(Some("c")) && !state.admits(None));
        state.set_keys(vec![]);
        assert!(state.admits(None));
    }

    #[test]
    fn a_seeded_server_gives_the_same_seeds_again_and_no_two_alike() {
        let seeds = |seed| {
            let metrics = Arc::new(Metrics::new("tiny").unwrap());
            let limits = ApiLimits::with_body_bytes(1 << 20);
            let mut state = ApiState::new(vec![], vec![], limits, CacheScope::Key, metrics);
            state.seeds = Seeds::new(seed);
            [state.next_seed().unwrap(), state.next_seed().unwrap()]
        };
        assert_eq!(seeds(Some(7)), seeds(Some(7)));
        assert_ne!(seeds(Some(7)), seeds(Some(8)));
        assert_ne!(seeds(Some(7))[0], seeds(Some(7))[1]);
        assert_ne!(seeds(None), seeds(None));
    }
}
