//! The operator: observe, plan, apply.
#![forbid(unsafe_code)]

pub mod admin;
pub mod apply;
pub mod ask;
pub mod backoff;
pub mod check;
pub mod config;
pub mod controller;
pub mod desired;
pub mod lease;
pub mod metrics;
pub mod moves;
pub mod nodes;
pub mod observe;
pub mod plan;
pub mod pods;
#[cfg(test)]
mod rbac;
pub mod reconcile;
pub mod status;
