//! The coordinator's metrics.

use std::fmt;

use farpage_server::coordinator::{ClusterFigures, CoordinatorObserver};

use super::endpoint::Source;
use super::page::{Figures, Kind, Page, text};

impl Source for CoordinatorObserver {
    async fn page(&self) -> Option<String> {
        text(self.figures().await?).ok()
    }
}

impl Figures for ClusterFigures {
    fn tell(&self, page: &mut Page<'_>) -> fmt::Result {
        let nodes = [
            ("live", self.nodes_live),
            ("unreachable", self.nodes_unreachable),
        ];
        page.each(
            Kind::Gauge,
            "coordinator_nodes",
            "Memory nodes, by whether they are heard of.",
            nodes.map(|(health, count)| (vec![("health", health.to_owned())], count)),
        )?;
        let in_bytes = [
            (
                "coordinator_capacity",
                "Memory that nodes lend, silent ones included.",
                self.capacity_bytes,
            ),
            (
                "coordinator_unreachable",
                "What of the capacity is on silent nodes.",
                self.unreachable_bytes,
            ),
            (
                "coordinator_granted",
                "Memory granted to agents.",
                self.granted_bytes,
            ),
            (
                "coordinator_pending",
                "Memory being granted, or not yet scrubbed.",
                self.pending_bytes,
            ),
        ];
        for (name, help, bytes) in in_bytes {
            page.one(Kind::Bytes, name, help, bytes)?;
        }
        let counts = [
            (
                "coordinator_leases",
                "Leases, one for each agent.",
                self.leases,
            ),
            (
                "coordinator_extents",
                "Extents on record: granted, pending or lost.",
                self.extents,
            ),
            (
                "coordinator_extents_lost",
                "Extents whose contents are gone while a lease still names them.",
                self.extents_lost,
            ),
        ];
        for (name, help, count) in counts {
            page.one(Kind::Gauge, name, help, count)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_memory_and_leases_are_told() {
        let figures = ClusterFigures {
            nodes_live: 2,
            nodes_unreachable: 1,
            capacity_bytes: 192 << 20,
            unreachable_bytes: 64 << 20,
            granted_bytes: 32 << 20,
            pending_bytes: 16 << 20,
            leases: 4,
            extents: 5,
            extents_lost: 2,
        };
        let text = text(figures).unwrap();
        for line in [
            r#"farpage_coordinator_nodes{health="live"} 2"#,
            r#"farpage_coordinator_nodes{health="unreachable"} 1"#,
            "farpage_coordinator_capacity_bytes 201326592",
            "farpage_coordinator_unreachable_bytes 67108864",
            "farpage_coordinator_granted_bytes 33554432",
            "farpage_coordinator_pending_bytes 16777216",
            "farpage_coordinator_leases 4",
            "farpage_coordinator_extents 5",
            "farpage_coordinator_extents_lost 2",
        ] {
            assert!(
                text.lines().any(|is| is == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
