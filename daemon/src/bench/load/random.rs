//! Random numbers for load: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

/// A stream of random numbers; the same seed gives the same stream.
#[derive(Debug, Clone)]
pub(in crate::bench) struct Random(u64);

impl Random {
    pub(in crate::bench) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(in crate::bench) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub(in crate::bench) fn between(&mut self, low: u32, high: u32) -> u32 {
        let width = u64::from(high.saturating_sub(low)) + 1;
        let drawn = ((self.next() >> 32) * width) >> 32;
        low + u32::try_from(drawn).expect("the product of 32-bit numbers, shifted, has 32 bits")
    }

    /// A number from the exponential distribution with mean 1.
    pub(in crate::bench) fn exponential(&mut self) -> f64 {
        let upper = u32::try_from(self.next() >> 32).expect("the upper half has 32 bits");
        // Never 0, so that the logarithm is finite.
        -((f64::from(upper) + 0.5) / 4_294_967_296.0).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stay_between_their_bounds_and_reach_them() {
        let mut random = Random::new(1);
        let drawn: Vec<u32> = (0..1000).map(|_| random.between(3, 5)).collect();
        assert!((3..=5).all(|number| drawn.contains(&number)));
        assert!(drawn.iter().all(|number| (3..=5).contains(number)));
        assert_eq!(random.between(7, 7), 7);
    }

    #[test]
    fn exponential_numbers_have_mean_one() {
        let mut random = Random::new(2);
        let mean = (0..20_000).map(|_| random.exponential()).sum::<f64>() / 20_000.0;
        assert!((0.95..1.05).contains(&mean), "{mean}");
    }
}
