//! The agent's metrics.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use farpage_agent::protocol::ProcessFigures;
use farpage_agent::{AgentFigures, Observer};
use farpage_proto::limits;

use super::endpoint::Source;
use super::page::{Figures, Kind, Labels, Page, text};

const PAGE_BYTES: u64 = 4096;

impl Source for Observer {
    async fn page(&self) -> Option<String> {
        text(self.figures()).ok()
    }
}

impl Figures for AgentFigures {
    fn tell(&self, page: &mut Page<'_>) -> fmt::Result {
        processes(self, page)?;
        counters(self, page)?;
        let histogram = self.counted.latencies.histogram();
        page.durations(
            "agent_fault_duration",
            "How long faults took from the kernel's message to the wake-up. The sum is right to within 1/16.",
            &histogram,
        )?;
        let at_the_moment = [
            ("agent_jobs", "Jobs that are open.", self.jobs),
            (
                "agent_processes",
                "Processes that are served, those included that are too many to be told apart here.",
                self.spaces,
            ),
            (
                "agent_slots_used",
                "Slots of 4096 bytes that pages lie in.",
                self.slots_used,
            ),
            (
                "agent_slots_free",
                "Slots of 4096 bytes that are free in extents whose nodes answer.",
                self.slots_free,
            ),
        ];
        for (name, help, value) in at_the_moment {
            page.one(Kind::Gauge, name, help, value)?;
        }
        let extents = &self.extents;
        let usable = extents.held - extents.lost - extents.unreachable;
        let by_condition = [
            ("usable", usable),
            ("unreachable", extents.unreachable),
            ("lost", extents.lost),
        ];
        page.each(
            Kind::Gauge,
            "agent_extents",
            "Extents held, by the condition that their nodes were last heard to be in.",
            by_condition
                .map(|(condition, count)| (vec![("condition", condition.to_owned())], count)),
        )
    }
}

/// What there is of each process, as [`limits::MAX_PROCESSES`] of them are told apart, like in reports.
fn processes(figures: &AgentFigures, page: &mut Page<'_>) -> fmt::Result {
    type Pages = fn(&ProcessFigures) -> u64;
    let in_pages: [(&str, &str, Pages); 6] = [
        (
            "process_local",
            "Resident anonymous memory as the kernel counts it, managed or not.",
            |process| process.local_pages,
        ),
        (
            "process_managed",
            "Memory present in managed mappings, the kernel's page of zeros included.",
            |process| process.managed_pages,
        ),
        (
            "process_far",
            "Memory held far or on its way, and zeros held nowhere.",
            |process| process.far_pages,
        ),
        (
            "process_shared_far",
            "What of the far memory lies in slots that other processes name too since a fork.",
            |process| process.shared_far_pages,
        ),
        (
            "process_zero",
            "What of the far memory is zeros held nowhere.",
            |process| process.zero_pages,
        ),
        (
            "process_total",
            "Local and far memory: what would be resident without farpage.",
            |process| process.local_pages.saturating_add(process.far_pages),
        ),
    ];
    let told = || figures.processes.iter().take(limits::MAX_PROCESSES);
    for (name, help, pages) in in_pages {
        let series = told().map(|process| {
            let bytes = pages(process).saturating_mul(PAGE_BYTES);
            (labels(process), bytes)
        });
        page.each(Kind::Bytes, name, help, series)?;
    }
    page.each(
        Kind::Bytes,
        "process_local_limit",
        "What of its job's memory may be local, of all its processes together.",
        told().map(|process| (labels(process), process.local_limit_bytes)),
    )?;
    page.each(
        Kind::Counter,
        "process_faults",
        "Faults answered.",
        told().map(|process| (labels(process), process.faults)),
    )
}

fn labels(process: &ProcessFigures) -> Labels {
    vec![
        ("pid", process.pid.to_string()),
        ("comm", process.name.clone()),
    ]
}

fn counters(figures: &AgentFigures, page: &mut Page<'_>) -> fmt::Result {
    let counters = &figures.counted.counters;
    let told: [(&str, &str, &AtomicU64); 9] = [
        ("agent_faults", "Faults answered.", &counters.faults),
        (
            "agent_pages_fetched",
            "Pages read from memory nodes, those read ahead included.",
            &counters.pages_fetched,
        ),
        (
            "agent_pages_prefetched",
            "Pages read ahead of their fault.",
            &counters.pages_prefetched,
        ),
        (
            "agent_prefetch_hits",
            "Pages read ahead that a later fault proved used.",
            &counters.prefetch_hits,
        ),
        (
            "agent_pages_evicted",
            "Pages taken out of programs' memory.",
            &counters.pages_evicted,
        ),
        (
            "agent_pages_written_back",
            "Pages written to memory nodes.",
            &counters.pages_written_back,
        ),
        (
            "agent_pages_poisoned",
            "Pages lost, whose fault was answered with SIGBUS.",
            &counters.pages_poisoned,
        ),
        (
            "agent_processes_attached",
            "Processes that attached.",
            &counters.processes,
        ),
        (
            "agent_processes_unmanaged",
            "Processes of a job that did not attach.",
            &counters.processes_unmanaged,
        ),
    ];
    for (name, help, count) in told {
        page.one(Kind::Counter, name, help, count.load(Ordering::Relaxed))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: i32, name: &str) -> ProcessFigures {
        ProcessFigures {
            pid,
            name: name.to_owned(),
            local_pages: 3,
            managed_pages: 2,
            far_pages: 4,
            shared_far_pages: 1,
            zero_pages: 1,
            faults: 9,
            local_limit_bytes: 1 << 20,
        }
    }

    #[test]
    fn a_process_is_told_in_bytes_and_by_its_pid_and_name() {
        let figures = AgentFigures {
            processes: vec![process(7, "sort")],
            spaces: 1,
            jobs: 1,
            ..AgentFigures::default()
        };
        figures
            .counted
            .latencies
            .add(std::time::Duration::from_micros(3));
        let text = text(figures).unwrap();
        for line in [
            "# TYPE farpage_process_local_bytes gauge",
            r#"farpage_process_local_bytes{pid="7",comm="sort"} 12288"#,
            r#"farpage_process_managed_bytes{pid="7",comm="sort"} 8192"#,
            r#"farpage_process_far_bytes{pid="7",comm="sort"} 16384"#,
            r#"farpage_process_shared_far_bytes{pid="7",comm="sort"} 4096"#,
            r#"farpage_process_zero_bytes{pid="7",comm="sort"} 4096"#,
            r#"farpage_process_total_bytes{pid="7",comm="sort"} 28672"#,
            r#"farpage_process_local_limit_bytes{pid="7",comm="sort"} 1048576"#,
            r#"farpage_process_faults_total{pid="7",comm="sort"} 9"#,
            "farpage_agent_processes 1",
            r#"farpage_agent_extents{condition="lost"} 0"#,
            "farpage_agent_fault_duration_seconds_count 1",
            r#"farpage_agent_fault_duration_seconds_bucket{le="+Inf"} 1"#,
        ] {
            assert!(
                text.lines().any(|is| is == line),
                "{line} is not in\n{text}"
            );
        }
    }

    #[test]
    fn a_name_cannot_forge_a_line() {
        let figures = AgentFigures {
            processes: vec![process(7, "a\"} 1\nfarpage_agent_jobs 99\n\\")],
            ..AgentFigures::default()
        };
        let text = text(figures).unwrap();
        let escaped = r#"comm="a\"} 1\nfarpage_agent_jobs 99\n\\"} 12288"#;
        assert!(text.contains(escaped), "{text}");
        let forged = text.lines().filter(|line| line.ends_with(" 99"));
        assert_eq!(forged.count(), 0, "{text}");
    }

    #[test]
    fn no_more_processes_are_told_apart_than_reports_may_have() {
        let many = 2 * limits::MAX_PROCESSES as i32;
        let figures = AgentFigures {
            processes: (1..=many).map(|pid| process(pid, "many")).collect(),
            spaces: many as u64,
            ..AgentFigures::default()
        };
        let text = text(figures).unwrap();
        let told = text
            .lines()
            .filter(|line| line.starts_with("farpage_process_far_bytes{"));
        assert_eq!(told.count(), limits::MAX_PROCESSES);
        assert!(text.contains(&format!("farpage_agent_processes {many}\n")));
    }
}
