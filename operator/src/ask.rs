//! What replicas that are not ready say of themselves. Those of a model take a second at most, all together, and who stays
//! silent is asked later and later: a reconciliation that waits for them keeps others waiting.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crds::ReplicaState;
use futures_util::StreamExt;
use k8s_openapi::jiff::Timestamp;
use reqwest::redirect::Policy;

use crate::backoff::Backoff;
use crate::desired::HEALTH_PORT;
use crate::pods::{Key, PodSeen};

/// The longest that the replicas of a model may take to say how they are.
const PATIENCE: Duration = Duration::from_secs(1);
/// Replicas that are asked at once, and no more than these.
const AT_MOST: usize = 8;
/// From a silence to the next question.
const SILENCE: Backoff =
    Backoff { first: Duration::from_secs(4), longest: Duration::from_secs(60) };
/// A Pod of which nothing was noted for this long is gone, or answers.
const FORGOTTEN: Duration = Duration::from_secs(300);
/// The largest answer of a replica.
const LARGEST_STATE: u64 = 16 << 10;

/// Asks replicas, and remembers who was silent.
#[derive(Debug)]
pub struct Asker {
    http: reqwest::Client,
    silences: Mutex<HashMap<Key, Silence>>,
}

#[derive(Debug, Clone, Copy)]
struct Silence {
    n: u32,
    until: Timestamp,
}

/// A Pod that is asked.
struct Question<'a> {
    pod: &'a mut PodSeen,
    /// It has said something, or refused the connection: neither takes time.
    is_over: bool,
}

impl Asker {
    /// # Errors
    /// When no client can be made.
    pub fn new() -> reqwest::Result<Self> {
        // A replica that points elsewhere would have the operator ask there.
        let http = reqwest::Client::builder().no_proxy().redirect(Policy::none()).build()?;
        Ok(Self { http, silences: Mutex::default() })
    }

    /// Asks those that run and are not ready.
    pub async fn ask(&self, namespace: &str, pods: &mut [PodSeen], now: Timestamp) {
        let mut questions = self.choose(namespace, pods, now);
        let asked = futures_util::stream::iter(&mut questions).for_each_concurrent(
            None,
            |question| async {
                let state = self.state_of(question.pod.ip.as_deref().unwrap_or_default()).await;
                question.is_over = true;
                question.pod.state = state.or(question.pod.state.take());
            },
        );
        // What was said until then is kept.
        let _ = tokio::time::timeout(PATIENCE, asked).await;
        for question in &questions {
            self.note(namespace, question, now);
        }
    }

    /// The first that may be asked: always the same ones while they answer, so that what is told of the model stays.
    fn choose<'a>(
        &self,
        namespace: &str,
        pods: &'a mut [PodSeen],
        now: Timestamp,
    ) -> Vec<Question<'a>> {
        let silences = self.silences();
        let may_be_asked = |pod: &&mut PodSeen| {
            let silence = silences.get(&(namespace.to_owned(), pod.name.clone()));
            let runs = pod.ip.is_some() && pod.waiting.is_none();
            let unready = !pod.ready && !pod.deleting && !pod.failed;
            runs && unready && silence.is_none_or(|silence| silence.until <= now)
        };
        let chosen = pods.iter_mut().filter(may_be_asked).take(AT_MOST);
        chosen.map(|pod| Question { pod, is_over: false }).collect()
    }

    fn note(&self, namespace: &str, question: &Question<'_>, now: Timestamp) {
        let mut silences = self.silences();
        let key = (namespace.to_owned(), question.pod.name.clone());
        if question.is_over {
            silences.remove(&key);
            return;
        }
        silences.retain(|_, silence| silence.until + FORGOTTEN > now);
        let n = silences.get(&key).map_or(1, |silence| silence.n.saturating_add(1));
        let until = now + SILENCE.wait(n, &question.pod.name);
        silences.insert(key, Silence { n, until });
    }

    async fn state_of(&self, ip: &str) -> Option<ReplicaState> {
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{HEALTH_PORT}/state");
        let answer = self.http.get(url).send().await.ok()?;
        if answer.content_length().is_none_or(|length| length > LARGEST_STATE) {
            return None;
        }
        answer.json().await.ok()
    }

    fn silences(&self) -> MutexGuard<'_, HashMap<Key, Silence>> {
        // Every change is whole when the lock is let go.
        self.silences.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::pod;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(seconds).unwrap()
    }

    fn running(n: usize) -> Vec<PodSeen> {
        let one = |index| PodSeen { ip: Some("10.0.0.1".into()), ..pod(&format!("p{index}")) };
        (0..n).map(one).collect()
    }

    /// Asks nobody: notes who would be asked, and that `silent` ones say nothing.
    fn round(asker: &Asker, pods: &mut [PodSeen], seconds: i64, silent: &[&str]) -> Vec<String> {
        let mut questions = asker.choose("n", pods, at(seconds));
        for question in &mut questions {
            question.is_over = !silent.contains(&question.pod.name.as_str());
            asker.note("n", question, at(seconds));
        }
        questions.iter().map(|question| question.pod.name.clone()).collect()
    }

    #[test]
    fn few_are_asked_and_always_the_same_while_they_answer() {
        let asker = Asker::new().unwrap();
        let mut pods = running(20);
        let first = round(&asker, &mut pods, 0, &[]);
        assert_eq!(first.len(), AT_MOST);
        assert_eq!(round(&asker, &mut pods, 2, &[]), first);
    }

    #[test]
    fn the_silent_are_asked_later_and_later_and_others_in_their_place() {
        let asker = Asker::new().unwrap();
        let mut pods = running(9);
        let mut asked_at = Vec::new();
        for second in 0..300 {
            let asked = round(&asker, &mut pods, second, &["p0"]);
            if asked.contains(&"p0".to_owned()) {
                asked_at.push(second);
            } else {
                assert!(asked.contains(&"p8".to_owned()));
            }
        }
        assert!(asked_at.len() < 10, "{asked_at:?}");
        let gaps: Vec<_> = asked_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(gaps[0] >= 4 && gaps[2] > gaps[0], "{gaps:?}");
        assert_eq!(round(&asker, &mut pods, 1000, &[])[0], "p0");
        assert!(asker.silences().is_empty(), "one that answers is no longer remembered");
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let asker = Asker::new().unwrap();
        round(&asker, &mut running(1), 0, &["p0"]);
        let mut other = vec![PodSeen { name: "other".into(), ..running(1).remove(0) }];
        round(&asker, &mut other, 1000, &["other"]);
        assert_eq!(asker.silences().len(), 1);
    }

    #[test]
    fn those_that_cannot_answer_are_not_asked() {
        let asker = Asker::new().unwrap();
        let one = || running(1).remove(0);
        let mut pods = vec![
            PodSeen { ready: true, ..one() },
            PodSeen { deleting: true, ..one() },
            PodSeen { failed: true, ..one() },
            PodSeen { ip: None, ..one() },
            PodSeen { waiting: Some("ContainerCreating".into()), ..one() },
        ];
        assert!(round(&asker, &mut pods, 0, &[]).is_empty());
    }
}
