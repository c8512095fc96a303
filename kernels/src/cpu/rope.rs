//! Rotary position embedding on halves: (x[i], x[i + d/2]) turns by the angle of i. Su et al., arXiv 2104.09864.

/// Turns every head of every token in place. `x`: [tokens, heads * head_dim]; `cos`, `sin`: [tokens, head_dim / 2].
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32]) {
    let half = head_dim / 2;
    let angles = cos.chunks_exact(half.max(1)).zip(sin.chunks_exact(half.max(1)));
    for (token, (cos, sin)) in x.chunks_exact_mut((heads * head_dim).max(1)).zip(angles) {
        for head in token.chunks_exact_mut(head_dim.max(1)) {
            let (first, second) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_turn_moves_the_first_half_to_the_second() {
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        rope(&mut x, 2, 4, &[0.0, 0.0], &[1.0, 1.0]);
        assert_eq!(x, [-3.0, -4.0, 1.0, 2.0, -7.0, -8.0, 5.0, 6.0]);
    }
}
