//! An integer digest of a replica's state that detects damage and disagreement.
//!
//! It is a wrapping sum, over the 32-bit little-endian words of the state, of each word mixed with
//! its position. A sum can be formed in any order and from any slices: ranks digest their own parts
//! and the coordinator adds them up; a GPU can form it in one pass. It is no defence against an
//! adversary, who is kept out by other means.

/// Digest of `bytes`, which begin at word `first_word` of the whole. A last, incomplete word counts
/// as padded with zeros.
///
/// The digest of a whole is the wrapping sum of the digests of its slices.
pub fn of_slice(first_word: u64, bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(4);
    let rest = words.remainder();
    let mut sum = 0u64;
    let mut index = first_word;
    for word in words {
        let word = u32::from_le_bytes(word.try_into().expect("chunks_exact(4) yields 4 bytes"));
        sum = sum.wrapping_add(mix(index, word));
        index = index.wrapping_add(1);
    }
    if !rest.is_empty() {
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        sum = sum.wrapping_add(mix(index, u32::from_le_bytes(last)));
    }
    sum
}

/// A bijection of the word for each index (the SplitMix64 finaliser's steps), so that any change of
/// one word changes the sum, and words that change places do too.
#[inline]
fn mix(index: u64, word: u32) -> u64 {
    let x = u64::from(word) ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = x ^ (x >> 31);
    x.wrapping_mul(0x94D0_49BB_1331_11EB)
}

#[cfg(test)]
mod tests {
    use super::of_slice;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn slices_add_up(bytes in prop::collection::vec(any::<u8>(), 0..400), cut in 0usize..100, start in any::<u64>()) {
            let cut = (cut * 4).min(bytes.len() / 4 * 4);
            let (left, right) = bytes.split_at(cut);
            let parts = of_slice(start, left).wrapping_add(of_slice(start.wrapping_add(cut as u64 / 4), right));
            prop_assert_eq!(of_slice(start, &bytes), parts);
        }

        #[test]
        fn one_flipped_bit_changes_it(mut bytes in prop::collection::vec(any::<u8>(), 1..200), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let before = of_slice(7, &bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert_ne!(before, of_slice(7, &bytes));
        }

        #[test]
        fn words_that_change_places_change_it(words in prop::collection::vec(any::<u32>(), 2..50), i in any::<prop::sample::Index>(), j in any::<prop::sample::Index>()) {
            let (i, j) = (i.index(words.len()), j.index(words.len()));
            prop_assume!(words[i] != words[j]);
            let bytes = |w: &[u32]| w.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
            let mut swapped = words.clone();
            swapped.swap(i, j);
            prop_assert_ne!(of_slice(0, &bytes(&words)), of_slice(0, &bytes(&swapped)));
        }
    }
}
