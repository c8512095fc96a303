//! The memory over time: users that ask again and again, weighted by steps, after a start that is left out.

use std::num::NonZeroU32;

use anyhow::{Context, Result};

use super::first_fit::FirstFit;
use super::held::{Held, Method};
use super::snapshot::max_length_block;
use super::users::Users;
use crate::backend::Backend;
use crate::bench::made_up::MadeUp;
use crate::bench::stepped::{Room, Stepping};

/// The steps of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// Users come one after the other, evenly over these steps.
    pub(super) arrivals: usize,
    /// Steps before the first that counts.
    pub(super) warm_up: usize,
    /// Steps that count.
    pub(super) counted: usize,
}

impl Span {
    pub(super) const USUAL: Self = Self { arrivals: 1000, warm_up: 1500, counted: 4000 };
}

/// What a run showed.
#[derive(Debug, Clone, Default)]
pub(super) struct Live {
    /// The sum over the steps that count.
    pub(super) sum: Held,
    pub(super) steps: usize,
    /// The share of all slots without a token when a sequence was first refused room: kept waiting or preempted.
    pub(super) empty_at_refusal: Option<f64>,
    /// Requests that ended in the steps that count.
    pub(super) ended: usize,
    /// After each step, those before the count included.
    pub(super) course: Vec<Held>,
}

impl Live {
    /// Sequences with memory, on average.
    pub(super) fn users(&self) -> f64 {
        super::held::share(self.sum.users, self.steps)
    }

    fn note(&mut self, held: Held, counts: bool, is_refused: bool) {
        if is_refused {
            self.empty_at_refusal.get_or_insert(held.empty_share());
        }
        if counts {
            self.sum += held;
            self.steps += 1;
        }
        self.course.push(held);
    }
}

/// What holds the memory: an engine or a simulation.
enum Memory<B: Backend> {
    Engine { method: Method, engine: Box<Stepping<B>> },
    Simulation(FirstFit),
}

/// One step's end.
struct Stepped {
    held: Held,
    is_refused: bool,
    ended: Vec<usize>,
}

impl<B: Backend> Memory<B> {
    fn ask(&mut self, users: Users, user: usize, turn: usize) -> Result<()> {
        match self {
            Self::Engine { engine, .. } => engine.ask(&users.ask(user, turn)),
            Self::Simulation(memory) => {
                memory.ask(user, users.lengths(user, turn));
                Ok(())
            }
        }
    }

    fn step(&mut self) -> Result<Stepped> {
        match self {
            Self::Engine { method, engine } => {
                let step = engine.step()?.context("somebody always asks")?;
                let stats = step.stats;
                let held = Held::of_blocks(*method, &stats.blocks, stats.running);
                let is_refused = stats.waiting > 0 || stats.preemptions > 0;
                let ended = step.ended.iter().map(|answer| answer.user).collect();
                Ok(Stepped { held, is_refused, ended })
            }
            Self::Simulation(memory) => {
                let ended = memory.step();
                Ok(Stepped { held: memory.held(), is_refused: memory.refuses(), ended })
            }
        }
    }
}

/// Users in a memory of `slots` slots, held by `method`; lengths alone matter.
pub(super) fn live(
    method: Method,
    users: Users,
    slots: u32,
    block_size: NonZeroU32,
    span: Span,
) -> Result<Live> {
    let engine = |room| Box::new(Stepping::new(MadeUp::new(1), room));
    let memory = match method {
        Method::ExactSize | Method::PowersOfTwo => {
            Memory::Simulation(FirstFit::new(method, slots as usize))
        }
        Method::MaxLength => {
            let room = Room::of_slots(slots, max_length_block()?);
            Memory::Engine { method, engine: engine(room) }
        }
        Method::Paged => {
            Memory::Engine { method, engine: engine(Room::of_slots(slots, block_size)) }
        }
    };
    run(memory, users, span)
}

/// Users of an engine that holds its memory by `method`.
pub(super) fn live_on<B: Backend>(
    method: Method,
    engine: Stepping<B>,
    users: Users,
    span: Span,
) -> Result<Live> {
    run(Memory::Engine { method, engine: Box::new(engine) }, users, span)
}

fn run<B: Backend>(mut memory: Memory<B>, users: Users, span: Span) -> Result<Live> {
    let mut turns = vec![0; users.count];
    let mut live = Live::default();
    let mut arrived = 0;
    for step in 0..span.warm_up + span.counted {
        while arrived < users.count && arrived * span.arrivals / users.count <= step {
            memory.ask(users, arrived, 0)?;
            arrived += 1;
        }
        let Stepped { held, is_refused, ended } = memory.step()?;
        let counts = step >= span.warm_up;
        live.note(held, counts, is_refused);
        live.ended += if counts { ended.len() } else { 0 };
        for user in ended {
            turns[user] += 1;
            memory.ask(users, user, turns[user])?;
        }
    }
    Ok(live)
}

/// L / (L + half of what a last block may lack): the share of slots that paging fills.
pub(super) fn expected_share(mean_length: f64, block_size: NonZeroU32) -> f64 {
    mean_length / (mean_length + f64::from(block_size.get() - 1) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOTS: u32 = 16 * 2048;
    const SPAN: Span = Span { arrivals: 800, warm_up: 1200, counted: 1500 };

    fn block_size(tokens: u32) -> NonZeroU32 {
        NonZeroU32::new(tokens).unwrap()
    }

    fn saturated(method: Method, tokens: u32) -> Live {
        live(method, Users::new(200, 0), SLOTS, block_size(tokens), SPAN).unwrap()
    }

    #[test]
    fn a_saturated_paged_memory_wastes_what_last_blocks_lack_and_holds_four_times_the_users() {
        let (paged, contiguous) = (saturated(Method::Paged, 16), saturated(Method::MaxLength, 16));
        let (got, wanted) =
            (paged.sum.filled_share(), expected_share(paged.sum.mean_length(), block_size(16)));
        assert!((got - wanted).abs() < 0.002, "filled {got}, wanted {wanted}");
        assert!(got > 0.96, "{got}");
        assert!((15.9..=16.0).contains(&contiguous.users()), "{}", contiguous.users());
        assert!(paged.users() >= 4.0 * contiguous.users(), "{} users", paged.users());
        assert!(paged.empty_at_refusal.unwrap() < 0.06, "{:?}", paged.empty_at_refusal);
        assert!(contiguous.empty_at_refusal.unwrap() > 0.9);
    }

    #[test]
    fn simulations_of_contiguous_room_lie_between() {
        let users = |method| saturated(method, 16).users();
        let (exact, powers) = (users(Method::ExactSize), users(Method::PowersOfTwo));
        assert!(16.0 < powers && powers < exact && exact < 70.0, "{powers}, {exact}");
    }

    #[test]
    fn a_memory_that_all_fit_into_refuses_nobody() {
        let live = live(Method::Paged, Users::new(10, 0), SLOTS, block_size(16), SPAN).unwrap();
        assert_eq!(live.empty_at_refusal, None);
        assert_eq!((live.steps, live.course.len()), (1500, 2700));
        assert!(live.ended > 20);
    }
}
