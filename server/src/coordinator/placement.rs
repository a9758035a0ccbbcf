//! Which node an extent comes from.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// A node that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Extents that it has free.
    pub(crate) free: u32,
    /// Bytes of each.
    pub(crate) extent_bytes: u64,
}

/// Spreads `count` extents: each comes from the candidate with the most free bytes at that point, the first in order
/// among equals. Returns how many each candidate gives, or `None` when all together have too few.
pub(crate) fn spread(candidates: &[Candidate], count: u32) -> Option<Vec<u32>> {
    let mut taken = vec![0; candidates.len()];
    let mut heap: BinaryHeap<_> = candidates
        .iter()
        .enumerate()
        .filter(|(_, c)| c.free > 0)
        .map(|(at, c)| {
            (
                u64::from(c.free).saturating_mul(c.extent_bytes),
                Reverse(at),
            )
        })
        .collect();
    for _ in 0..count {
        let (free_bytes, Reverse(at)) = heap.pop()?;
        let (candidate, gives) = (candidates.get(at)?, taken.get_mut(at)?);
        *gives += 1;
        if *gives < candidate.free {
            heap.push((
                free_bytes.saturating_sub(candidate.extent_bytes),
                Reverse(at),
            ));
        }
    }
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0u32..20, 20u32..24).prop_map(|(free, shift)| Candidate {
            free,
            extent_bytes: 1 << shift,
        });
        prop::collection::vec(one, 0..8)
    }

    proptest! {
        #[test]
        fn takes_what_is_asked_and_no_more_than_is_there(candidates in candidates(), count in 0u32..100) {
            let all: u32 = candidates.iter().map(|c| c.free).sum();
            match spread(&candidates, count) {
                None => prop_assert!(count > all),
                Some(taken) => {
                    prop_assert_eq!(taken.iter().sum::<u32>(), count);
                    for (gives, candidate) in taken.iter().zip(&candidates) {
                        prop_assert!(*gives <= candidate.free);
                    }
                }
            }
        }

        #[test]
        fn equal_nodes_share_equally(nodes in 1usize..6, each in 1u32..10) {
            let candidates = vec![Candidate { free: 50, extent_bytes: 1 << 24 }; nodes];
            let taken = spread(&candidates, each * nodes as u32).unwrap();
            prop_assert!(taken.iter().all(|&gives| gives == each));
        }
    }

    #[test]
    fn the_emptiest_gives_first() {
        let candidates = [
            Candidate {
                free: 1,
                extent_bytes: 1 << 24,
            },
            Candidate {
                free: 9,
                extent_bytes: 1 << 24,
            },
        ];
        assert_eq!(spread(&candidates, 3), Some(vec![0, 3]));
    }
}
