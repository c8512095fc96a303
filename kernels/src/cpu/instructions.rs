//! The instruction set, chosen once.

use std::sync::OnceLock;

/// What the kernels are compiled for, the narrowest first. All of them give the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    Portable,
    Avx2Fma,
    /// With VNNI; processors that have AVX-512 without it run AVX2's code.
    Avx512,
}

impl InstructionSet {
    /// Those that this machine has, for tests that compare them.
    #[cfg(test)]
    pub(crate) fn all_here() -> &'static [Self] {
        let sets: &[Self] = match instruction_set() {
            Self::Portable => &[Self::Portable],
            Self::Avx2Fma => &[Self::Portable, Self::Avx2Fma],
            Self::Avx512 => &[Self::Portable, Self::Avx2Fma, Self::Avx512],
        };
        if sets.len() < 3 {
            eprintln!("NOT RUN: what this machine has no instructions for; it has {sets:?}");
        }
        sets
    }
}

static CHOSEN: OnceLock<InstructionSet> = OnceLock::new();

/// The widest instructions of this machine that the process may use.
pub fn instruction_set() -> InstructionSet {
    *CHOSEN.get_or_init(detect)
}

/// Lets this process use nothing wider than `widest`, and returns what it uses. Says nothing to kernels that ran before.
pub fn limit_instruction_set(widest: InstructionSet) -> InstructionSet {
    *CHOSEN.get_or_init(|| detect().min(widest))
}

#[cfg(target_arch = "x86_64")]
fn detect() -> InstructionSet {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512) {
        (true, true) => InstructionSet::Avx512,
        (true, false) => InstructionSet::Avx2Fma,
        (false, _) => InstructionSet::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> InstructionSet {
    InstructionSet::Portable
}

/// Defines a function that runs `$body`, a generic inlined function, compiled for the chosen instruction set.
macro_rules! dispatched {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? => $body:path) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                match $crate::cpu::instructions::instruction_set() {
                    // SAFETY: the processor has these instructions, `instruction_set` asked it.
                    $crate::cpu::InstructionSet::Avx2Fma => return unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::InstructionSet::Avx512 => return unsafe { avx512($($arg),*) },
                    $crate::cpu::InstructionSet::Portable => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use dispatched;

/// Runs `$body`, a generic inlined function whose first type is one of [`super::lanes::Lanes`], compiled for the instruction set
/// `$set` and with its vectors. `[generics] [names]` are the other types' and constants' declarations and names.
macro_rules! by_lanes {
    ($set:expr, [$($generics:tt)*] [$($names:tt)*] $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        {
            use $crate::cpu::lanes_x86::{Avx2, Avx512};
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2<$($generics)*>($($arg: $ty),*) { $body::<Avx2, $($names)*>($($arg),*) }
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
            fn avx512<$($generics)*>($($arg: $ty),*) { $body::<Avx512, $($names)*>($($arg),*) }
            match $set {
                // SAFETY: the processor has these instructions, `instruction_set` asked it.
                $crate::cpu::InstructionSet::Avx2Fma => unsafe { avx2::<$($names)*>($($arg),*) },
                // SAFETY: as above.
                $crate::cpu::InstructionSet::Avx512 => unsafe { avx512::<$($names)*>($($arg),*) },
                $crate::cpu::InstructionSet::Portable => {
                    $body::<$crate::cpu::lanes::Portable, $($names)*>($($arg),*);
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $set;
            $body::<$crate::cpu::lanes::Portable, $($names)*>($($arg),*);
        }
    }};
}
pub(crate) use by_lanes;
