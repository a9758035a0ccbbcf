//! Fork: the table is cloned, every slot gains a reference, and what was writable becomes readable in both.

use std::sync::Arc;

use super::{Pager, Registered};
use crate::entry::State;
use crate::sys::uffd::Uffd;
use crate::table::{Page, PageTable, pages_of};

impl Pager {
    /// The program has forked; reading the event has let the parent go on, and the child may run. Neither can
    /// get at a far page but through us, so the clone below is as if made at that moment: pages on their way
    /// out are settled first, pages on their way in are found far by the child.
    pub(super) fn forked(&mut self, uffd: Uffd) {
        let kept = self.settle(super::SETTLE_DEADLINE);
        let (table, local) = self.clone_table();
        let registered = self.registered.clone();
        match self.start_child(uffd, table, registered) {
            Ok(()) => self.job.charge(local as i64),
            Err(error) => {
                tracing::error!(%error, pid = self.pid(), "a forked child cannot be served");
            }
        }
        self.keep_messages(kept);
    }

    fn clone_table(&mut self) -> (PageTable, u64) {
        let left_out: Vec<_> = self
            .process
            .as_ref()
            .and_then(|process| crate::sys::process::ranges_not_inherited(process.pid()).ok())
            .unwrap_or_default()
            .into_iter()
            .map(pages_of)
            .collect();
        let mut child = PageTable::default();
        let everything = Page(0)..Page(u64::MAX >> 12);
        for (page, entry) in self.table.touched(everything).collect::<Vec<_>>() {
            if left_out.iter().any(|range| range.contains(&page)) {
                continue;
            }
            let Some((ours, theirs)) = entry.forked() else {
                continue;
            };
            self.table.change(page, |_| Some(ours));
            child.change(page, |_| Some(theirs));
            if let Some(slot) = theirs.slot() {
                self.shared.far.share(slot);
                self.job.charge_far(1);
            }
        }
        let local = child.local_pages();
        (child, local)
    }

    fn start_child(
        &self,
        uffd: Uffd,
        table: PageTable,
        registered: Registered,
    ) -> std::io::Result<()> {
        let handle = self.shared.spawner.new_handle(0)?;
        let mut child = Pager::new(
            self.shared.clone(),
            Arc::clone(&self.job),
            Arc::clone(&handle),
            None,
            uffd,
        )?;
        for (page, entry) in table.touched(Page(0)..Page(u64::MAX >> 12)) {
            if entry.state() == State::Local {
                child.residents.arrived(page);
            }
        }
        child.table = table;
        child.registered = registered;
        self.shared
            .spawner
            .start_forked(self.handle.id, child, handle)
    }
}
