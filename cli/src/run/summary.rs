//! The account of one run. Its JSON keys are a contract; keys may be added.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use farpage_agent::protocol::ProcessPeaks;
use serde::Serialize;

use crate::args::SummaryForm;
use crate::size::readable;

/// The bytes of one page.
const PAGE_BYTES: u64 = 4096;

/// What happened between a program's memory and the memory nodes. Counts are of pages unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// Touches that had to wait for the pager.
    pub(crate) faults: u64,
    /// Half of the faults took at most this long, from the kernel's message to the woken thread.
    pub(crate) fault_p50_us: f64,
    /// Ninety-nine of a hundred took at most this long.
    pub(crate) fault_p99_us: f64,
    /// Read from memory nodes, those read ahead among them.
    pub(crate) pages_fetched: u64,
    /// Of these, read before they were touched.
    pub(crate) pages_prefetched: u64,
    /// Of these, touched before they were evicted again.
    pub(crate) prefetch_hits: u64,
    /// Taken out of local memory.
    pub(crate) pages_evicted: u64,
    /// Of these, sent, as they were neither all zeros nor unchanged since they were fetched.
    pub(crate) pages_written_back: u64,
    /// Touches of pages that could not be had any more; each ended in SIGBUS.
    pub(crate) pages_poisoned: u64,
    /// Why the first of them did.
    pub(crate) loss: Option<String>,
    /// What `--local` allowed.
    pub(crate) local_limit_bytes: u64,
    /// The most anonymous memory (Pss) that the program's process tree had here at a time.
    pub(crate) local_peak_bytes: u64,
    /// The most that lay on memory nodes at a time.
    pub(crate) far_peak_bytes: u64,
    /// Slots on memory nodes still held after the end. Anything but zero is a leak, unless processes are left.
    pub(crate) far_slots_in_use_at_exit: u64,
    /// Processes of the program that outlive it. With them, far pages are not a leak.
    pub(crate) processes_left: u64,
    /// How pages travelled.
    pub(crate) fabric: String,
    /// On how many memory nodes each page was to be.
    pub(crate) replicas: u32,
    /// Extents of the agent's, of so many copies, that had fewer at the end.
    pub(crate) extents_below_replicas: u32,
    /// Processes of the program that were managed.
    pub(crate) processes: u64,
    /// Processes of the program that could not be, such as static programs that it started.
    pub(crate) processes_unmanaged: u64,
    /// The most anonymous memory that could not be managed.
    pub(crate) unmanaged_bytes: u64,
    /// The most pages that each of the largest processes had.
    pub(crate) process_peaks: Vec<ProcessPeaks>,
    /// The program's exit status; 128+N if signal N ended it.
    pub(crate) exit_status: i32,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages =
            |count: u64| format!("{count} ({})", readable(count.saturating_mul(PAGE_BYTES)));
        writeln!(
            f,
            "farpage: the program ended with status {}",
            self.exit_status
        )?;
        writeln!(
            f,
            "  local memory  {} at most, of {} allowed",
            readable(self.local_peak_bytes),
            readable(self.local_limit_bytes)
        )?;
        writeln!(
            f,
            "  far memory    {} at most, over {}{}",
            readable(self.far_peak_bytes),
            self.fabric,
            match self.replicas {
                0 | 1 => String::new(),
                copies => format!(", on {copies} nodes each"),
            }
        )?;
        if self.faults > 0 {
            writeln!(
                f,
                "  faults        {}: half took up to {:.0} us, 99 of 100 up to {:.0} us",
                self.faults, self.fault_p50_us, self.fault_p99_us
            )?;
        }
        writeln!(
            f,
            "  pages in      {} fetched, {} prefetched of which {} were used",
            pages(self.pages_fetched),
            pages(self.pages_prefetched),
            self.prefetch_hits
        )?;
        writeln!(
            f,
            "  pages out     {} evicted, {} of them sent (the rest were zeros or unchanged)",
            pages(self.pages_evicted),
            self.pages_written_back
        )?;
        write!(f, "  processes     {} managed", self.processes)?;
        if self.processes_unmanaged > 0 || self.unmanaged_bytes > 0 {
            let (count, bytes) = (self.processes_unmanaged, readable(self.unmanaged_bytes));
            write!(
                f,
                ", {count} could not be; {bytes} of memory could not be managed"
            )?;
        }
        writeln!(f)?;
        if self.processes > 1
            && let Some(largest) = self.process_peaks.first()
        {
            let size = |pages: u64| readable(pages.saturating_mul(PAGE_BYTES));
            writeln!(
                f,
                "  largest       {} (pid {}): {} in all, {} here and {} far at most",
                largest.name,
                largest.pid,
                size(largest.total_pages),
                size(largest.local_pages),
                size(largest.far_pages)
            )?;
        }
        let slots = self.far_slots_in_use_at_exit;
        if self.processes_left > 0 {
            writeln!(
                f,
                "  left running  {} of its processes, with {slots} far pages",
                self.processes_left
            )?;
        } else if slots > 0 {
            writeln!(
                f,
                "  leak          {slots} far pages were still held at the end: please report this"
            )?;
        }
        Ok(())
    }
}

/// The summary's file cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("--summary-file {}: {source}; name a file that can be written", .path.display())]
pub(crate) struct SinkError {
    path: PathBuf,
    source: io::Error,
}

/// Where the summary goes, opened before the program starts so that a bad path costs nobody a long run.
#[derive(Debug)]
pub(crate) struct SummarySink {
    form: SummaryForm,
    file: Option<File>,
}

impl SummarySink {
    /// Opens the file, if one is named, and leaves what it held until there is something new to write.
    pub(crate) fn open(form: SummaryForm, path: Option<&Path>) -> Result<Self, SinkError> {
        let open = |path: &Path| {
            let opened = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path);
            opened.map_err(|source| SinkError {
                path: path.to_owned(),
                source,
            })
        };
        Ok(Self {
            form,
            file: path.map(open).transpose()?,
        })
    }

    /// Writes the summary. A reader that has gone away is no reason to spoil the program's exit status.
    pub(crate) fn write(&mut self, summary: &Summary) {
        let text = match self.form {
            SummaryForm::None => return,
            SummaryForm::Text => summary.to_string(),
            SummaryForm::Json => match serde_json::to_string(summary) {
                Ok(line) => line + "\n",
                Err(_) => return,
            },
        };
        let written = match &mut self.file {
            Some(file) => replace(file, text.as_bytes()),
            None => io::stderr().write_all(text.as_bytes()),
        };
        if let (Err(error), Some(_)) = (written, &self.file) {
            let _ = writeln!(
                io::stderr(),
                "farpage: the summary could not be written: {error}\n{text}"
            );
        }
    }
}

fn replace(file: &mut File, text: &[u8]) -> io::Result<()> {
    if file.metadata()?.is_file() {
        file.set_len(0)?;
        return file.write_all_at(text, 0);
    }
    // A pipe or a terminal; seeking is refused and needless.
    let _ = file.rewind();
    file.write_all(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_has_the_contracts_keys() {
        let value = serde_json::to_value(Summary::default()).unwrap();
        let keys: Vec<_> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let mut contract = [
            "faults",
            "fault_p50_us",
            "fault_p99_us",
            "pages_fetched",
            "pages_prefetched",
            "prefetch_hits",
            "pages_evicted",
            "pages_written_back",
            "pages_poisoned",
            "loss",
            "local_limit_bytes",
            "local_peak_bytes",
            "far_peak_bytes",
            "far_slots_in_use_at_exit",
            "replicas",
            "extents_below_replicas",
            "processes_left",
            "fabric",
            "processes",
            "processes_unmanaged",
            "unmanaged_bytes",
            "process_peaks",
            "exit_status",
        ];
        contract.sort_unstable();
        let mut keys = keys;
        keys.sort_unstable();
        assert_eq!(keys, contract);
    }

    #[test]
    fn a_longer_file_is_replaced_whole() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "#".repeat(10_000)).unwrap();
        let mut sink = SummarySink::open(SummaryForm::Json, Some(file.path())).unwrap();
        assert_eq!(std::fs::metadata(file.path()).unwrap().len(), 10_000);
        sink.write(&Summary::default());
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert!(text.ends_with("}\n") && !text.contains('#'), "{text}");
    }
}
