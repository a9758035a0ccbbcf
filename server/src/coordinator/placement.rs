//! Which node an extent comes from.

use std::cmp::Reverse;
use std::collections::BTreeSet;

/// A node that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Extents that it has free.
    pub(crate) free: u32,
    /// Bytes of each.
    pub(crate) extent_bytes: u64,
}

/// Spreads `count` extents with `copies` copies each: they come from the candidates with the most free bytes at that point, the
/// first in order among equals, and copies of one from different ones whose extents have one size. Returns which candidate
/// gives each, copies of one next to each other, or `None` when there are too few.
pub(crate) fn spread(candidates: &[Candidate], count: u32, copies: u32) -> Option<Vec<usize>> {
    let mut left = candidates.to_vec();
    let mut chosen = Vec::with_capacity(count.saturating_mul(copies) as usize);
    for _ in 0..count {
        let set = choose(&left, copies as usize)?;
        for &at in &set {
            left.get_mut(at)?.free -= 1;
        }
        chosen.extend(set);
    }
    Some(chosen)
}

/// The candidates for the copies of one extent.
fn choose(candidates: &[Candidate], copies: usize) -> Option<Vec<usize>> {
    let able = candidates.iter().enumerate().filter(|(_, c)| c.free > 0);
    let mut by_room: Vec<(usize, &Candidate)> = able.collect();
    by_room.sort_by_key(|(_, c)| Reverse(u64::from(c.free).saturating_mul(c.extent_bytes)));
    let mut sizes_tried = BTreeSet::new();
    by_room.iter().find_map(|(_, first)| {
        if !sizes_tried.insert(first.extent_bytes) {
            return None;
        }
        let of_size = by_room
            .iter()
            .filter(|(_, c)| c.extent_bytes == first.extent_bytes);
        let set: Vec<usize> = of_size.take(copies).map(|(at, _)| *at).collect();
        (set.len() == copies).then_some(set)
    })
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

    fn counts(taken: &[usize], nodes: usize) -> Vec<u32> {
        let mut counts = vec![0; nodes];
        taken.iter().for_each(|at| counts[*at] += 1);
        counts
    }

    proptest! {
        #[test]
        fn takes_what_is_asked_and_no_more_than_is_there(candidates in candidates(), count in 0u32..100) {
            let all: u32 = candidates.iter().map(|c| c.free).sum();
            match spread(&candidates, count, 1) {
                None => prop_assert!(count > all),
                Some(taken) => {
                    prop_assert_eq!(taken.len() as u32, count);
                    for (gives, candidate) in counts(&taken, candidates.len()).iter().zip(&candidates) {
                        prop_assert!(*gives <= candidate.free);
                    }
                }
            }
        }

        #[test]
        fn copies_lie_on_different_nodes_and_have_one_size(
            candidates in candidates(), count in 0u32..20, copies in 1u32..5,
        ) {
            let Some(taken) = spread(&candidates, count, copies) else { return Ok(()) };
            prop_assert_eq!(taken.len() as u32, count * copies);
            for set in taken.chunks(copies as usize) {
                let nodes: BTreeSet<_> = set.iter().collect();
                prop_assert_eq!(nodes.len(), set.len());
                let sizes: BTreeSet<_> = set.iter().map(|at| candidates[*at].extent_bytes).collect();
                prop_assert_eq!(sizes.len(), 1);
            }
            for (gives, candidate) in counts(&taken, candidates.len()).iter().zip(&candidates) {
                prop_assert!(*gives <= candidate.free);
            }
        }

        #[test]
        fn equal_nodes_share_equally(nodes in 1usize..6, each in 1u32..10) {
            let candidates = vec![Candidate { free: 50, extent_bytes: 1 << 24 }; nodes];
            let taken = spread(&candidates, each * nodes as u32, 1).unwrap();
            prop_assert!(counts(&taken, nodes).iter().all(|&gives| gives == each));
        }
    }

    #[test]
    fn a_node_with_much_does_not_stand_in_for_a_second_one() {
        let of = |free| Candidate {
            free,
            extent_bytes: 1 << 24,
        };
        assert_eq!(spread(&[of(50), of(0)], 1, 2), None);
        assert_eq!(spread(&[of(50), of(2)], 3, 2), None);
        assert_eq!(spread(&[of(50), of(2)], 2, 2), Some(vec![0, 1, 0, 1]));
        // Where sizes differ the emptiest may be alone with its own.
        let large = Candidate {
            free: 9,
            extent_bytes: 1 << 28,
        };
        assert_eq!(spread(&[large, of(1), of(1)], 1, 2), Some(vec![1, 2]));
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
        assert_eq!(spread(&candidates, 3, 1), Some(vec![1, 1, 1]));
    }
}
