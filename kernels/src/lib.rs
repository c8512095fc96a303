//! Everything `unsafe` of Bindery, behind safe, checked calls.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod cpu;
pub mod cuda;
pub mod mapping;
