//! The `bindery` command.
#![forbid(unsafe_code)]

fn main() {}
