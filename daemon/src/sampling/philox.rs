//! Random numbers by counter: Philox4x32-10 (Salmon et al., SC 2011). The same key and counter give the same number,
//! whatever else is drawn.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words of a key and a counter.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let (mut key, mut state) = (key, counter);
    for _ in 0..ROUNDS {
        let (high_0, low_0) = multiply(MULTIPLIERS[0], state[0]);
        let (high_1, low_1) = multiply(MULTIPLIERS[1], state[2]);
        state = [high_1 ^ state[1] ^ key[0], low_1, high_0 ^ state[3] ^ key[1], low_0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    state
}

/// High and low word of a product.
fn multiply(a: u32, b: u32) -> (u32, u32) {
    let product = (u64::from(a) * u64::from(b)).to_le_bytes();
    let word = |at: usize| {
        u32::from_le_bytes([product[at], product[at + 1], product[at + 2], product[at + 3]])
    };
    (word(4), word(0))
}

/// One number in [0, 1) for a token: `seed` is the key, prompt, choice and position are the counter.
pub fn uniform(seed: u64, prompt_index: u32, choice: u32, position: u32) -> f32 {
    let seed = seed.to_le_bytes();
    let word = |at: usize| u32::from_le_bytes([seed[at], seed[at + 1], seed[at + 2], seed[at + 3]]);
    let words = philox([word(0), word(4)], [prompt_index, choice, position, 0]);
    // 24 bits: exact in an f32.
    (words[0] >> 8) as f32 * (1.0 / 16_777_216.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers published with the Random123 library.
    #[test]
    fn the_published_answers_come_out() {
        let ones = u32::MAX;
        let answers = [
            ([0; 2], [0; 4], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 2], [ones; 4], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0xa409_3822, 0x299f_31d0],
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (key, counter, words) in answers {
            assert_eq!(philox(key, counter), words);
        }
    }

    #[test]
    fn every_part_of_the_counter_changes_the_number() {
        let all = [
            uniform(1, 0, 0, 0),
            uniform(2, 0, 0, 0),
            uniform(1 << 32, 0, 0, 0),
            uniform(1, 1, 0, 0),
            uniform(1, 0, 1, 0),
            uniform(1, 0, 0, 1),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!((0.0..1.0).contains(a));
            assert!(all[..i].iter().all(|b| a != b));
        }
    }
}
