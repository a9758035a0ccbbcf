//! The memory node's metrics.

use std::fmt;

use farpage_server::node::{Connections, NodeFigures, NodeObserver};

use super::endpoint::Source;
use super::page::{Figures, Kind, Labels, Page, text};

impl Source for NodeObserver {
    async fn page(&self) -> Option<String> {
        text(self.figures()?).ok()
    }
}

impl Figures for NodeFigures {
    fn tell(&self, page: &mut Page<'_>) -> fmt::Result {
        let in_bytes = [
            ("node_capacity", "Memory lent.", self.capacity_bytes),
            (
                "node_granted",
                "Memory granted to agents.",
                self.granted_bytes,
            ),
            (
                "node_pending_scrub",
                "Memory whose grant has ended and that is not known to be zero yet.",
                self.pending_scrub_bytes,
            ),
        ];
        for (name, help, bytes) in in_bytes {
            page.one(Kind::Bytes, name, help, bytes)?;
        }
        type Count = fn(&Connections) -> u64;
        let outcomes: [(&str, Count); 4] = [
            ("admitted", |all| all.admitted),
            ("turned_away", |all| all.turned_away),
            ("refused", |all| all.refused),
            ("broken", |all| all.broken),
        ];
        let series = self.connections.iter().flat_map(|(fabric, all)| {
            outcomes.map(|(outcome, count)| {
                let labels: Labels = vec![
                    ("fabric", fabric.to_string()),
                    ("outcome", outcome.to_owned()),
                ];
                (labels, count(all))
            })
        });
        page.each(
            Kind::Counter,
            "node_connections",
            "Connections to the data path: let in, turned away for want of a place, refused for what they said first or who \
             they are, and of those let in the ones that broke the protocol or failed.",
            series,
        )
    }
}

#[cfg(test)]
mod tests {
    use farpage_proto::FabricKind;

    use super::*;

    #[test]
    fn memory_and_connections_are_told() {
        let connections = Connections {
            admitted: 5,
            turned_away: 1,
            ..Connections::default()
        };
        let figures = NodeFigures {
            capacity_bytes: 64 << 20,
            granted_bytes: 32 << 20,
            pending_scrub_bytes: 16 << 20,
            connections: vec![(FabricKind::Tcp, connections)],
        };
        let text = text(figures).unwrap();
        for line in [
            "farpage_node_capacity_bytes 67108864",
            "farpage_node_granted_bytes 33554432",
            "farpage_node_pending_scrub_bytes 16777216",
            r#"farpage_node_connections_total{fabric="tcp",outcome="admitted"} 5"#,
            r#"farpage_node_connections_total{fabric="tcp",outcome="turned_away"} 1"#,
            r#"farpage_node_connections_total{fabric="tcp",outcome="broken"} 0"#,
        ] {
            assert!(
                text.lines().any(|is| is == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
