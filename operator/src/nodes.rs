//! Which nodes a model's replicas may run on, as the scheduler sees it. It decides; this is for the figures in messages.

use crds::Scheduling;
use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, Taint, Toleration,
};
use kube::ResourceExt;

/// Whether a node takes the replicas: it is not cordoned, its taints are tolerated, selector and required affinity fit.
pub fn takes(node: &Node, scheduling: &Scheduling) -> bool {
    let spec = node.spec.as_ref();
    let is_cordoned = spec.is_some_and(|spec| spec.unschedulable == Some(true));
    let selector = &scheduling.node_selector;
    let is_selected = selector.iter().all(|(key, value)| node.labels().get(key) == Some(value));
    let mut taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default().iter();
    let is_tolerated = taints.all(|taint| {
        !keeps_away(taint) || scheduling.tolerations.iter().any(|one| tolerates(one, taint))
    });
    !is_cordoned && is_selected && is_tolerated && attracts(node, scheduling)
}

/// What is merely preferred keeps nobody away.
fn keeps_away(taint: &Taint) -> bool {
    taint.effect == "NoSchedule" || taint.effect == "NoExecute"
}

/// An empty key or effect means every one.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let is_any = |word: &Option<String>| word.as_ref().is_none_or(String::is_empty);
    let exists = toleration.operator.as_deref() == Some("Exists");
    let of_key = toleration.key.as_ref() == Some(&taint.key) || (is_any(&toleration.key) && exists);
    let of_effect = is_any(&toleration.effect) || toleration.effect.as_ref() == Some(&taint.effect);
    let value = |word: &Option<String>| word.clone().unwrap_or_default();
    of_key && of_effect && (exists || value(&toleration.value) == value(&taint.value))
}

/// One of the terms must fit.
fn attracts(node: &Node, scheduling: &Scheduling) -> bool {
    let affinity =
        scheduling.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity
        .and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    required.is_none_or(|required| required.node_selector_terms.iter().any(|term| fits(node, term)))
}

/// A term without requirements fits no node.
fn fits(node: &Node, term: &NodeSelectorTerm) -> bool {
    let labels = term.match_expressions.iter().flatten();
    let fields = term.match_fields.iter().flatten();
    let name = node.name_any();
    let is_empty = labels.clone().next().is_none() && fields.clone().next().is_none();
    !is_empty
        && labels.into_iter().all(|it| meets(node.labels().get(&it.key).map(String::as_str), it))
        && fields.into_iter().all(|it| it.key == "metadata.name" && meets(Some(&name), it))
}

fn meets(found: Option<&str>, requirement: &NodeSelectorRequirement) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let is_listed = found.is_some_and(|found| values.iter().any(|value| value == found));
    let numbers = || Some((found?.parse::<i64>().ok()?, values.first()?.parse::<i64>().ok()?));
    match requirement.operator.as_str() {
        "In" => is_listed,
        "NotIn" => !is_listed,
        "Exists" => found.is_some(),
        "DoesNotExist" => found.is_none(),
        "Gt" => numbers().is_some_and(|(found, least)| found > least),
        "Lt" => numbers().is_some_and(|(found, most)| found < most),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A node of zone `a` with three disks; `spec` is its own.
    fn node(spec: Value) -> Node {
        let labels = json!({"zone": "a", "disks": "3"});
        let node = json!({"metadata": {"name": "n1", "labels": labels}, "spec": spec});
        serde_json::from_value(node).unwrap()
    }

    fn check(case: &str, spec: Value, scheduling: Value, wanted: bool) {
        let scheduling = serde_json::from_value(scheduling).unwrap();
        assert_eq!(takes(&node(spec), &scheduling), wanted, "{case}");
    }

    #[test]
    fn a_cordoned_node_takes_none() {
        check("cordoned", json!({"unschedulable": true}), json!({}), false);
        check("not cordoned", json!({}), json!({}), true);
    }

    #[test]
    fn a_selector_must_fit() {
        check("fits", json!({}), json!({"nodeSelector": {"zone": "a"}}), true);
        check("another", json!({}), json!({"nodeSelector": {"zone": "b"}}), false);
        check("none", json!({}), json!({"nodeSelector": {"gpu": "a"}}), false);
    }

    #[test]
    fn taints_must_be_tolerated() {
        let taint =
            |effect: &str| json!({"taints": [{"key": "k", "value": "v", "effect": effect}]});
        for (case, toleration, wanted) in [
            ("none", None, false),
            ("equal", Some(json!({"key": "k", "value": "v"})), true),
            ("another value", Some(json!({"key": "k", "value": "w"})), false),
            ("another key", Some(json!({"key": "l", "operator": "Exists"})), false),
            ("exists", Some(json!({"key": "k", "operator": "Exists"})), true),
            ("everything", Some(json!({"operator": "Exists"})), true),
            ("another effect", Some(json!({"operator": "Exists", "effect": "NoExecute"})), false),
        ] {
            let tolerations: Vec<_> = toleration.into_iter().collect();
            check(case, taint("NoSchedule"), json!({"tolerations": tolerations}), wanted);
        }
        check("preferred alone", taint("PreferNoSchedule"), json!({}), true);
        check("ending Pods", taint("NoExecute"), json!({}), false);
    }

    #[test]
    fn one_term_of_a_required_affinity_must_fit() {
        let terms = |terms: Value| {
            let required = json!({"nodeSelectorTerms": terms});
            let kind = "requiredDuringSchedulingIgnoredDuringExecution";
            json!({"affinity": {"nodeAffinity": {kind: required}}})
        };
        let label = |key: &str, operator: &str, values: Value| json!({"matchExpressions": [{"key": key, "operator": operator, "values": values}]});
        for (case, term, wanted) in [
            ("In", label("zone", "In", json!(["a", "b"])), true),
            ("NotIn", label("zone", "NotIn", json!(["a"])), false),
            ("NotIn without the label", label("gpu", "NotIn", json!(["a"])), true),
            ("Exists", label("gpu", "Exists", json!([])), false),
            ("DoesNotExist", label("gpu", "DoesNotExist", json!([])), true),
            ("Gt", label("disks", "Gt", json!(["2"])), true),
            ("Lt", label("disks", "Lt", json!(["3"])), false),
            ("empty", json!({}), false),
            (
                "its name",
                json!({"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}),
                true,
            ),
        ] {
            check(case, json!({}), terms(json!([term])), wanted);
            let either = json!([label("zone", "In", json!(["a"])), term]);
            check(case, json!({}), terms(either), true);
        }
    }
}
