//! The vocabulary that users, operator and node agents share through the API server: types alone, no client, no I/O.
#![forbid(unsafe_code)]

mod condition;
mod inference_model;
mod quantity;
mod replica;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_yaml_ng::Value;

pub use condition::{ConditionType, Reason};
pub use inference_model::{
    Device, Dtype, Engine, InferenceModel, InferenceModelSpec, InferenceModelStatus, KvCacheDtype,
    PodMetadata, Rollout, Scheduling, SecretName, Source,
};
pub use quantity::{Bytes, QuantityError};
pub use replica::ReplicaState;

/// The API group of everything here.
pub const GROUP: &str = "bindery.dev";
/// Its version.
pub const VERSION: &str = "v1alpha1";

/// Every definition, for the generator.
pub fn all() -> Vec<CustomResourceDefinition> {
    vec![InferenceModel::crd()]
}

/// Every definition as the YAML that the chart carries.
///
/// # Errors
/// When a definition cannot be written, which the tests rule out.
pub fn yaml() -> Result<String, serde_yaml_ng::Error> {
    let head = "# Written by `cargo crdgen`. Do not edit.\n";
    all().iter().try_fold(head.to_owned(), |text, crd| {
        Ok(text + "---\n" + &serde_yaml_ng::to_string(&kept(crd)?)?)
    })
}

/// A definition that stays when the chart goes: deleting it would delete every model.
fn kept(crd: &CustomResourceDefinition) -> Result<Value, serde_yaml_ng::Error> {
    let mut crd = crd.clone();
    let keep = ("helm.sh/resource-policy".to_owned(), "keep".to_owned());
    crd.metadata.annotations.get_or_insert_default().extend([keep]);
    let mut value = serde_yaml_ng::to_value(crd)?;
    tidy(&mut value);
    Ok(value)
}

/// Sorts the fields, whose order would else depend on what is compiled together, and drops the unsigned formats, which the
/// API server does not know and warns of; the bounds that come with them say the same.
fn tidy(value: &mut Value) {
    match value {
        Value::Mapping(fields) => {
            let is_unsigned =
                |format: &Value| format.as_str().is_some_and(|it| it.starts_with("uint"));
            if fields.get("format").is_some_and(is_unsigned) {
                fields.remove("format");
            }
            let mut sorted: Vec<_> = std::mem::take(fields).into_iter().collect();
            sorted.sort_by(|one, other| one.0.as_str().cmp(&other.0.as_str()));
            fields.extend(sorted);
            fields.values_mut().for_each(tidy);
        }
        Value::Sequence(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[test]
    fn the_chart_has_these_definitions() {
        let chart = include_str!("../../charts/bindery/templates/crds.yaml");
        let same = chart == crate::yaml().unwrap();
        assert!(same, "run: cargo crdgen > charts/bindery/templates/crds.yaml");
    }

    /// Whether everything that is written is read: a field that does not exist would be passed over.
    fn is_read(written: &Value, read: &Value) -> bool {
        match (written, read) {
            (Value::Mapping(written), Value::Mapping(read)) => written
                .iter()
                .all(|(key, value)| read.get(key).is_some_and(|read| is_read(value, read))),
            _ => written == read,
        }
    }

    #[test]
    fn the_examples_are_models() {
        let mut n_models = 0;
        for file in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples")).unwrap()
        {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            for document in serde_yaml_ng::Deserializer::from_str(&text) {
                let written = Value::deserialize(document).unwrap();
                if written["kind"] == "InferenceModel" {
                    let model: InferenceModel = serde_yaml_ng::from_value(written.clone()).unwrap();
                    let read = serde_yaml_ng::to_value(model.spec).unwrap();
                    assert!(is_read(&written["spec"], &read), "{written:?}");
                    n_models += 1;
                }
            }
        }
        assert!(n_models >= 4, "{n_models} models");
    }
}
