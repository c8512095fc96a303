//! Later and later, and not all at once.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::pods::Key;

/// Times that double from the first to the longest, and up to half as much again by a name.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    pub first: Duration,
    pub longest: Duration,
}

impl Backoff {
    /// How long to wait for the `n`th time, which counts from 1. The same name waits the same; others wait other times.
    pub fn wait(self, n: u32, name: &str) -> Duration {
        let mut hasher = DefaultHasher::new();
        (name, n).hash(&mut hasher);
        let percent = u32::try_from(hasher.finish() % 50).unwrap_or(0);
        let doubled = self.first.saturating_mul(1 << n.saturating_sub(1).min(16));
        let wait = doubled.min(self.longest);
        wait + wait * percent / 100
    }
}

/// How often each model has failed in a row.
#[derive(Debug, Default)]
pub struct Counts(Mutex<HashMap<Key, u32>>);

impl Counts {
    /// One more, which is counted.
    pub fn add(&self, model: &Key) -> u32 {
        let mut counts = self.counts();
        let count = counts.entry(model.clone()).or_default();
        *count = count.saturating_add(1);
        *count
    }

    pub fn of(&self, model: &Key) -> u32 {
        self.counts().get(model).copied().unwrap_or(0)
    }

    pub fn clear(&self, model: &Key) {
        self.counts().remove(model);
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Key, u32>> {
        // Every change is one call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_up_to_a_limit_and_are_spread() {
        let backoff =
            Backoff { first: Duration::from_millis(500), longest: Duration::from_secs(60) };
        let waits: Vec<_> = (1..20).map(|n| backoff.wait(n, "a")).collect();
        assert!(waits[0] >= backoff.first && waits[0] <= backoff.first * 3 / 2);
        assert!(waits[3] > waits[0]);
        assert!(waits.iter().all(|wait| *wait <= backoff.longest * 3 / 2));
        assert_ne!(backoff.wait(5, "a"), backoff.wait(5, "b"), "models are spread");
    }

    #[test]
    fn counts_are_kept_by_model_until_they_are_cleared() {
        let (counts, [one, other]) =
            (Counts::default(), ["a", "b"].map(|name| ("n".to_owned(), name.to_owned())));
        assert_eq!((counts.add(&one), counts.add(&one), counts.add(&other)), (1, 2, 1));
        counts.clear(&one);
        assert_eq!((counts.of(&one), counts.of(&other)), (0, 1));
    }
}
