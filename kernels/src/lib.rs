//! Everything `unsafe` of Bindery, behind safe, checked calls.

pub mod cpu;
