use std::sync::Arc;

use crds::{ConditionType, ReplicaState};
use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::config::Switch;
use crate::desired::tests::{config, model};
use crate::observe::{Counted, NodeSeen};
use crate::reconcile::Watched;

/// A Pod that is not ready and says nothing.
pub(crate) fn pod(name: &str) -> PodSeen {
    PodSeen {
        name: name.into(),
        template: "new".into(),
        created: Some(Timestamp::UNIX_EPOCH),
        ready: false,
        deleting: false,
        failed: false,
        unscheduled: None,
        waiting: None,
        state: None,
        ip: None,
    }
}

fn ready(name: &str) -> PodSeen {
    PodSeen { ready: true, ..pod(name) }
}

fn saying(name: &str, reason: Reason, message: &str) -> PodSeen {
    PodSeen { state: Some(ReplicaState::new(reason, message)), ..pod(name) }
}

/// A Deployment that has seen what is asked, with these counts.
fn deployment(replicas: i32, updated: i32, ready: i32) -> Option<Arc<Deployment>> {
    let deployment = json!({
        "metadata": {"name": "tiny", "generation": 2},
        "spec": {"replicas": 1, "selector": {}, "template": {}},
        "status": {"observedGeneration": 2, "replicas": replicas, "updatedReplicas": updated, "readyReplicas": ready},
    });
    Some(Arc::new(serde_json::from_value(deployment).unwrap()))
}

fn seen(pods: Vec<PodSeen>, deployment: Option<Arc<Deployment>>) -> Observed {
    Observed { pods, deployment, ..Observed::default() }
}

/// Type, status, reason and message of each condition.
fn conditions(plan: &Plan) -> Vec<(String, String, String, String)> {
    let conditions = plan.status.conditions.iter().cloned();
    conditions.map(|it| (it.type_, it.status, it.reason, it.message)).collect()
}

/// What `Ready` says, and whether the model is stalled.
fn verdict(observed: &Observed) -> (String, String, String, bool) {
    let plan = plan(&model(json!({})), observed, &config());
    let all = conditions(&plan);
    let (_, status, reason, message) =
        all.iter().find(|it| it.0 == "Ready").cloned().expect("Ready is always there");
    let stalled = all.iter().any(|it| it.0 == ConditionType::Stalled.to_string() && it.1 == "True");
    (status, reason, message, stalled)
}

#[test]
fn a_model_is_ready_when_what_is_asked_answers() {
    let (status, reason, message, _) = verdict(&seen(vec![ready("a")], deployment(1, 1, 1)));
    assert_eq!((status.as_str(), reason.as_str()), ("True", "AllReplicasReady"));
    assert_eq!(message, "1 of 1 replicas answer");
}

#[test]
fn a_model_that_drains_longer_than_its_agents_is_told_so() {
    let told = |agents_drain_seconds| {
        let observed = seen(vec![ready("a")], deployment(1, 1, 1));
        verdict(&Observed { agents_drain_seconds, ..observed })
    };
    let (status, _, message, _) = told(Some(60));
    assert!(message.contains("rollout.drainSeconds is 120") && message.contains("after 60 s"));
    assert_eq!(status, "True");
    for enough in [None, Some(120)] {
        assert_eq!(told(enough).2, "1 of 1 replicas answer");
    }
}

#[test]
fn a_model_is_not_ready_by_the_replicas_of_before() {
    let old = PodSeen { template: "old".into(), ..ready("old") };
    let new = saying("new", Reason::Loading, "loaded 1 of 2 MiB");
    let (status, reason, message, stalled) = verdict(&seen(vec![new, old], deployment(2, 1, 1)));
    assert_eq!((status.as_str(), reason.as_str(), stalled), ("False", "Loading", false));
    assert_eq!(message, "loaded 1 of 2 MiB; 1 replicas of before serve on");
}

#[test]
fn a_model_that_cannot_be_read_is_told_so_and_ends_no_list() {
    let mut unread = serde_json::to_value(model(json!({}))).unwrap();
    for memory in ["+2Gi", "2147483648.", "2147483648e0"] {
        unread["spec"]["memory"] = json!(memory);
        let list = json!([unread, model(json!({}))]);
        let list: Vec<Watched> = serde_json::from_value(list).unwrap();
        assert!(list[1].0.is_ok());
        let invalid = list[0].0.as_ref().unwrap_err();
        let status =
            status::unreadable(invalid, deployment(3, 2, 1).as_deref(), Timestamp::UNIX_EPOCH);
        let told: Vec<_> = status.conditions.iter().map(|it| it.reason.as_str()).collect();
        assert_eq!(told, ["InvalidSpec", "InvalidSpec"]);
        assert!(status.conditions[0].message.contains(memory), "{:?}", status.conditions);
        assert_eq!((status.observed_generation, status.ready_replicas), (Some(3), 1));
        assert_eq!(status.selector.as_deref(), Some("bindery.dev/model=tiny"));
    }
}

#[test]
fn a_deployment_that_has_not_seen_the_change_is_not_believed() {
    let mut behind = (*deployment(1, 1, 1).unwrap()).clone();
    behind.metadata.generation = Some(3);
    let (status, ..) = verdict(&seen(vec![ready("a")], Some(Arc::new(behind))));
    assert_eq!(status, "False");
}

#[test]
fn a_failure_that_does_not_pass_stalls_the_model() {
    for reason in Reason::ALL.into_iter().filter(|reason| reason.is_terminal()) {
        let waits = saying("a", Reason::Waiting, "waits");
        let fails = saying("b", reason, "the cause");
        let (status, told, message, stalled) =
            verdict(&seen(vec![waits, fails], deployment(2, 2, 0)));
        assert_eq!((status.as_str(), told, stalled), ("False", reason.to_string(), true));
        assert_eq!(message, "the cause");
    }
}

#[test]
fn missing_memory_is_told_with_figures() {
    let lacking = PodSeen {
        unscheduled: Some(
            "0/2 nodes are available: 2 Insufficient bindery.dev/cpu-memory-gib. no new claims"
                .into(),
        ),
        ..pod("a")
    };
    let mut observed = seen(vec![lacking], deployment(1, 1, 0));
    assert!(verdict(&observed).2.contains("no matching node lends bindery.dev/cpu-memory-gib"));
    observed.nodes = vec![
        NodeSeen { name: "n1".into(), lends_gib: 4, granted_gib: 3 },
        NodeSeen { name: "n2".into(), lends_gib: 8, granted_gib: 8 },
    ];
    let (_, reason, message, stalled) = verdict(&observed);
    assert_eq!((reason.as_str(), stalled), ("InsufficientMemory", false));
    assert_eq!(message, "asked 2Gi of one node, free: n1 1 of 4 GiB, n2 0 of 8 GiB");
    observed.counted = Counted::Listed;
    assert!(verdict(&observed).2.ends_with("8 GiB (less what Pods of other namespaces hold)"));
}

#[test]
fn a_rollout_without_free_memory_says_what_to_set() {
    let lacking =
        PodSeen { unscheduled: Some("Insufficient bindery.dev/cpu-memory-gib".into()), ..pod("a") };
    let old = PodSeen { template: "old".into(), ..ready("old") };
    let mut observed = seen(vec![lacking, old], deployment(2, 1, 1));
    observed.nodes = vec![NodeSeen { name: "n1".into(), lends_gib: 2, granted_gib: 2 }];
    let (_, _, message, _) = verdict(&observed);
    assert!(message.contains("rollout.maxSurge to 0"), "{message}");
}

#[test]
fn a_rollout_that_waits_too_long_is_stuck_and_a_long_download_is_not() {
    let old = || PodSeen { template: "old".into(), ..ready("old") };
    let reason = |spec: Value, said: Reason, seconds: i64| {
        let mut observed = seen(vec![saying("new", said, "why"), old()], deployment(2, 1, 1));
        observed.now = Timestamp::from_second(seconds).unwrap();
        conditions(&plan(&model(spec), &observed, &config()))[0].2.clone()
    };
    let ten = || json!({"rollout": {"progressDeadlineSeconds": 10}});
    assert_eq!(reason(json!({}), Reason::SourceUnreachable, 599), "SourceUnreachable");
    assert_eq!(reason(json!({}), Reason::SourceUnreachable, 600), "RolloutStuck");
    assert_eq!(reason(ten(), Reason::SourceUnreachable, 9), "SourceUnreachable");
    assert_eq!(reason(ten(), Reason::SourceUnreachable, 10), "RolloutStuck");
    assert_eq!(reason(ten(), Reason::Downloading, 100_000), "Downloading");
}

#[test]
fn pods_that_the_api_server_refuses_are_told_in_its_words() {
    let mut refused = (*deployment(0, 0, 0).unwrap()).clone();
    let failure =
        json!([{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]);
    refused.status.as_mut().unwrap().conditions = serde_json::from_value(failure).unwrap();
    let (_, reason, message, _) = verdict(&seen(Vec::new(), Some(Arc::new(refused))));
    assert_eq!((reason.as_str(), message.as_str()), ("ApplyFailed", "exceeded quota"));
}

#[test]
fn zero_replicas_are_a_wish_that_is_met() {
    let model = model(json!({"replicas": 0}));
    let mut none = (*deployment(0, 0, 0).unwrap()).clone();
    none.spec.as_mut().unwrap().replicas = Some(0);
    let plan = plan(&model, &seen(Vec::new(), Some(Arc::new(none))), &config());
    assert_eq!(conditions(&plan)[0].2, "ScaledToZero");
    assert_eq!(plan.look_again, LATER);
}

/// The Pods that a plan deletes at this second.
fn deleted(observed: Observed, second: i64) -> Vec<String> {
    let observed = Observed { now: Timestamp::from_second(second).unwrap(), ..observed };
    let plan = plan(&model(json!({})), &observed, &config());
    let names = plan.changes.into_iter().filter_map(|change| match change {
        Change::DeletePod { name, .. } => Some(name),
        _ => None,
    });
    names.collect()
}

#[test]
fn pods_that_will_not_come_back_are_deleted_and_no_others() {
    let failed = PodSeen { failed: true, ..pod("failed") };
    let spread = saying("spread", Reason::Fragmented, "over two devices");
    let young = PodSeen {
        created: Some(Timestamp::from_second(90).unwrap()),
        ..saying("young", Reason::Fragmented, "over two devices")
    };
    let going = PodSeen { name: "going".into(), deleting: true, ..failed.clone() };
    let pods = vec![ready("a"), pod("b"), failed, spread, young, going];
    assert_eq!(deleted(seen(pods, deployment(1, 1, 1)), 100), ["failed", "spread"]);
}

#[test]
fn each_fragmented_replica_in_a_row_may_grow_older() {
    let age = |n_fragmented| {
        let pods = vec![saying("spread", Reason::Fragmented, "over two devices")];
        let observed = Observed { n_fragmented, ..seen(pods, deployment(1, 1, 0)) };
        (0..2000).find(|second| !deleted(observed.clone(), *second).is_empty()).unwrap()
    };
    let ages: Vec<_> = (0..8).map(age).collect();
    assert!((30..=45).contains(&ages[0]), "{ages:?}");
    assert!(ages[1] >= 60 && ages[2] >= 120 && ages[7] <= 1350, "{ages:?}");
}

#[test]
fn only_a_policy_of_the_model_is_deleted() {
    let off = Config { network_policies: Switch::Off, ..config() };
    let model = model(json!({}));
    let head = |uid: &str| {
        serde_json::from_value(json!({
            "name": "tiny",
            "ownerReferences": [{"apiVersion": "v1", "kind": "K", "name": "tiny", "uid": uid, "controller": true}],
        }))
        .unwrap()
    };
    let deletes = |uid: &str| {
        let mut observed = Observed::default();
        observed.heads.insert(Child::NetworkPolicy, head(uid));
        let changes = plan(&model, &observed, &off).changes;
        changes.iter().any(|change| matches!(change, Change::DeleteNetworkPolicy { .. }))
    };
    assert!(deletes("1234") && !deletes("of-another"));
}

#[test]
fn times_of_conditions_that_have_not_changed_stay() {
    let observed = seen(vec![ready("a")], deployment(1, 1, 1));
    let mut model = model(json!({}));
    model.status = Some(plan(&model, &observed, &config()).status);
    let later = Observed { now: Timestamp::from_second(1000).unwrap(), ..observed };
    assert_eq!(Some(plan(&model, &later, &config()).status), model.status);
}

fn any_pod() -> impl Strategy<Value = PodSeen> {
    let state = prop::option::of(prop::sample::select(Reason::ALL.to_vec()));
    (any::<[bool; 4]>(), state, 0..3_u8).prop_map(
        |([ready, deleting, failed, unscheduled], state, n)| PodSeen {
            ready,
            deleting,
            failed,
            template: format!("t{n}"),
            unscheduled: unscheduled.then(|| "Insufficient bindery.dev/cpu-memory-gib".into()),
            state: state.map(|reason| ReplicaState::new(reason, "m")),
            ..pod(&format!("p{n}"))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_same_facts_give_the_same_plan_and_one_verdict(
        pods in prop::collection::vec(any_pod(), 0..6),
        counts in (0..4_i32, 0..4_i32, 0..4_i32),
    ) {
        let observed = seen(pods, deployment(counts.0, counts.1, counts.2));
        let model = model(json!({}));
        let first = plan(&model, &observed, &config());
        prop_assert_eq!(&first, &plan(&model, &observed, &config()));
        let types: Vec<_> = conditions(&first).into_iter().map(|it| (it.0, it.1)).collect();
        let is = |type_: &str, status: &str| types.contains(&(type_.to_owned(), status.to_owned()));
        prop_assert!(is("Ready", "True") != is("Ready", "False"));
        prop_assert_eq!(is("Ready", "False"), is("Reconciling", "True") || is("Stalled", "True"));
        prop_assert!(!(is("Reconciling", "True") && is("Stalled", "True")));
    }
}

/// The image that a plan gives a model whose Deployment was made of `generation` with the image of before.
fn planned_image(may_move: bool, generation: Option<i64>) -> Option<String> {
    let deployment = generation.map(|generation| {
        let mut before = model(json!({}));
        before.metadata.generation = Some(generation);
        Arc::new(Children::of(&before, &config(), "localhost/bindery:0").deployment)
    });
    let observed = Observed { may_move, ..seen(Vec::new(), deployment) };
    let planned = plan(&model(json!({})), &observed, &config());
    assert_eq!(planned.look_again, SOON);
    planned.changes.iter().find_map(|change| match change {
        Change::ApplyDeployment(found) => image_of(found).map(str::to_owned),
        _ => None,
    })
}

#[test]
fn replicas_move_to_a_new_image_only_when_they_may() {
    assert_eq!(planned_image(true, Some(3)).as_deref(), Some("localhost/bindery:1"));
    assert_eq!(planned_image(false, None).as_deref(), Some("localhost/bindery:1"), "a new model");
}

#[test]
fn an_old_image_keeps_its_whole_template_until_a_user_edits_the_model() {
    assert_eq!(planned_image(false, Some(3)), None, "the Deployment is not written");
    assert_eq!(planned_image(false, Some(2)).as_deref(), Some("localhost/bindery:0"));
}
