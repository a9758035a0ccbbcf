//! Every interleaving of the two places where more than one party decides: a page's cell, and the gate.
//!
//! The cell's model runs the real transitions on the real cell, with a pager's bookkeeping around them: who
//! claims carries the transfer out, and whoever takes an entry away gives its slot back. The gate's model runs
//! the real gate against a kernel of a few lines that behaves as `UFFDIO_MOVE` and the event queue were seen to.

use loom::sync::Arc;
use loom::thread;

mod cell {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicI32, AtomicU32, Ordering};
    use loom::thread;

    use crate::entry::{Entry, Slot, State};
    use crate::page_cell::PageCell;

    const SLOTS: usize = 2;
    const BYTES: u32 = 7;

    fn slot(number: usize) -> Slot {
        Slot::new(0, number as u16).unwrap()
    }

    /// A page that was written and lies far, in slot 0.
    fn far_in_slot_0() -> Entry {
        let evicting = Entry::local().claim_evict().unwrap();
        evicting.evicted_to(slot(0), 0).unwrap()
    }

    /// A page's bytes somewhere. Loom's cell reports every access that the entry's transitions do not order.
    struct Bytes {
        access: UnsafeCell<()>,
        value: AtomicU32,
    }

    impl Bytes {
        fn new(value: u32) -> Self {
            Self {
                access: UnsafeCell::new(()),
                value: AtomicU32::new(value),
            }
        }

        fn read(&self) -> u32 {
            self.access.with(|_| self.value.load(Ordering::Relaxed))
        }

        fn write(&self, value: u32) {
            self.access
                .with_mut(|_| self.value.store(value, Ordering::Relaxed));
        }
    }

    /// One page, the slots it may be in, and the books.
    struct World {
        page: PageCell,
        memory: Bytes,
        slots: [Bytes; SLOTS],
        references: [AtomicI32; SLOTS],
        owners: AtomicU32,
        fetches: AtomicU32,
        evictions: AtomicU32,
    }

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                page: PageCell::new(far_in_slot_0()),
                memory: Bytes::new(0),
                slots: [Bytes::new(BYTES), Bytes::new(0)],
                references: [AtomicI32::new(1), AtomicI32::new(0)],
                owners: AtomicU32::new(0),
                fetches: AtomicU32::new(0),
                evictions: AtomicU32::new(0),
            })
        }

        fn release(&self, slot: Option<Slot>) {
            if let Some(slot) = slot {
                let before =
                    self.references[usize::from(slot.page())].fetch_sub(1, Ordering::AcqRel);
                assert!(before > 0, "a slot was given back twice");
            }
        }

        fn read_slot(&self, slot: Slot) -> u32 {
            self.slots[usize::from(slot.page())].read()
        }

        /// A fault: whoever claims the page brings it home; who does not leaves it to that one.
        fn fault(&self) {
            if let Some((_, claimed)) = self.page.change(Entry::claim_fetch) {
                assert_eq!(self.owners.fetch_add(1, Ordering::Relaxed), 0, "two claims");
                self.memory.write(self.read_slot(claimed.slot().unwrap()));
                self.fetches.fetch_add(1, Ordering::Relaxed);
                self.owners.fetch_sub(1, Ordering::Relaxed);
                assert!(self.page.change(Entry::fetched).is_some());
            }
        }

        /// An eviction into slot 1, as if the page had been changed.
        fn evict(&self) {
            if self.page.change(Entry::claim_evict).is_some() {
                assert_eq!(self.owners.fetch_add(1, Ordering::Relaxed), 0, "two claims");
                assert_eq!(self.references[1].fetch_add(1, Ordering::AcqRel), 0);
                self.slots[1].write(self.memory.read());
                self.evictions.fetch_add(1, Ordering::Relaxed);
                self.owners.fetch_sub(1, Ordering::Relaxed);
                let (before, _) = self
                    .page
                    .change(|entry| entry.evicted_to(slot(1), 1))
                    .unwrap();
                self.release(before.slot());
            }
        }

        fn assert_no_slot_leaked(&self) {
            let named = self.page.load().slot().map(|slot| usize::from(slot.page()));
            for (number, references) in self.references.iter().enumerate() {
                let expected = i32::from(named == Some(number));
                let counted = references.load(Ordering::Acquire);
                assert_eq!(counted, expected, "slot {number}");
            }
        }
    }

    /// Two threads touch a far page while the evictor wants it out again.
    #[test]
    fn faults_and_an_eviction_claim_a_page_one_at_a_time() {
        loom::model(|| {
            let world = World::new();
            let others: [fn(&World); 2] = [World::fault, World::evict];
            let others = others.map(|role| {
                let world = Arc::clone(&world);
                thread::spawn(move || role(&world))
            });
            world.fault();
            for other in others {
                other.join().unwrap();
            }
            let entry = world.page.load();
            let fetches = world.fetches.load(Ordering::Relaxed);
            let evictions = world.evictions.load(Ordering::Relaxed);
            match entry.state() {
                State::Local => {
                    assert_eq!(fetches, evictions + 1);
                    assert_eq!(world.memory.read(), BYTES);
                }
                State::FarWrite => {
                    assert_eq!(fetches, evictions);
                    assert_eq!(world.read_slot(entry.slot().unwrap()), BYTES);
                }
                other => panic!("the page was left {other:?}"),
            }
            world.assert_no_slot_leaked();
        });
    }

    /// The same with a program that gives the page up: a transfer that the discard overtook has no say, every
    /// slot comes back once, and what was there before the discard is never what the page is afterwards.
    #[test]
    fn a_discard_overtakes_a_fault_and_an_eviction() {
        loom::model(|| {
            let world = World::new();
            let fault = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    if world.page.change(Entry::claim_fetch).is_some() {
                        // Dropped if this is `None`: the entry and its slot are the discard's.
                        let _ = world.page.change(Entry::fetched);
                    } else {
                        let _ = world.page.change(Entry::filled_with_zeros);
                    }
                })
            };
            let evict = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    let (_, claimed) = world.page.change(Entry::claim_evict)?;
                    world.references[1].fetch_add(1, Ordering::AcqRel);
                    match world.page.change(|entry| entry.evicted_to(slot(1), 1)) {
                        Some((before, _)) => world.release(before.slot()),
                        None => world.release(Some(slot(1))),
                    }
                    Some(claimed)
                })
            };
            let (before, after) = world.page.change(|entry| Some(entry.discarded())).unwrap();
            assert_eq!(after, Entry::UNTOUCHED);
            world.release(before.slot());
            fault.join().unwrap();
            let evicted = evict.join().unwrap();
            let entry = world.page.load();
            match entry.state() {
                State::Untouched => {}
                // Zeros from after the discard: a copy of the old bytes would name slot 0.
                State::Local => assert_eq!(entry.slot(), None),
                State::FarWrite => {
                    assert_eq!(entry.slot(), Some(slot(1)));
                    assert_eq!(evicted.unwrap().slot(), None, "old bytes came back");
                }
                other => panic!("the page was left {other:?}"),
            }
            world.assert_no_slot_leaked();
        });
    }

    /// An eviction that a touch turns round while its write is under way: the page stays home and gains the
    /// copy, or it goes, and in neither case is the slot lost.
    #[test]
    fn a_touch_turns_an_eviction_round() {
        loom::model(|| {
            let world = World::new();
            world.page.change(Entry::claim_fetch).unwrap();
            world.page.change(Entry::fetched).unwrap();
            let (_, claimed) = world.page.change(Entry::claim_evict).unwrap();
            world.references[1].store(1, Ordering::Release);
            let touch = {
                let world = Arc::clone(&world);
                thread::spawn(move || world.page.change(Entry::turned_round).is_some())
            };
            let written = world.page.change(|entry| entry.evicted_to(slot(1), 1));
            match written {
                Some((before, _)) => world.release(before.slot()),
                None => {
                    if world
                        .page
                        .change(|entry| entry.gained_copy(slot(1)))
                        .is_none()
                    {
                        world.release(Some(slot(1)));
                    }
                }
            }
            let turned = touch.join().unwrap();
            assert_ne!(turned, written.is_some(), "both or neither decided");
            let entry = world.page.load();
            let expected = if turned {
                State::Local
            } else {
                State::FarWrite
            };
            assert_eq!(entry.state(), expected);
            assert!(claimed.slot().is_some());
            world.assert_no_slot_leaked();
        });
    }
}

/// What is mapped at the one address that the models of the gate are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapping {
    Old,
    Gone,
    New,
}

/// Every interleaving with three preemptions of a program that uses the address anew, a helper that says what it took there, and a
/// pager. The breakages that the models show need one.
fn explore<W: Send + Sync + 'static>(
    new: fn() -> Arc<W>,
    program: fn(&W),
    helper: fn(&W) -> Option<Mapping>,
    pager: impl Fn(&W) + Send + Sync + 'static,
) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = new();
        let shared = Arc::clone(&world);
        let program = thread::spawn(move || program(&shared));
        let shared = Arc::clone(&world);
        let helper = thread::spawn(move || helper(&shared));
        pager(&world);
        program.join().unwrap();
        assert_ne!(
            helper.join().unwrap(),
            Some(Mapping::New),
            "the helper moved a page of the new mapping"
        );
    });
}

mod gate {
    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::{Mapping, explore};
    use crate::gate::Gate;

    /// The kernel's part: an unmap is announced, then done, then waits for its event to be read; MOVE is
    /// refused from the announcement to the read, and otherwise takes whatever is there.
    struct Kernel {
        mapping: Mapping,
        announced: bool,
        read: bool,
    }

    struct World {
        kernel: Mutex<Kernel>,
        event_read: Condvar,
        command: AtomicU32,
        taken: AtomicU32,
    }

    /// The helper goes home without having moved anything.
    const NO_BATCH: u32 = u32::MAX;

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                kernel: Mutex::new(Kernel {
                    mapping: Mapping::Old,
                    announced: false,
                    read: false,
                }),
                event_read: Condvar::new(),
                command: AtomicU32::new(0),
                taken: AtomicU32::new(0),
            })
        }

        /// The program unmaps the address and, as soon as it may run on, uses it for something else.
        fn program(&self) {
            self.kernel.lock().unwrap().announced = true;
            let mut kernel = self.kernel.lock().unwrap();
            kernel.mapping = Mapping::Gone;
            while !kernel.read {
                kernel = self.event_read.wait(kernel).unwrap();
            }
            kernel.mapping = Mapping::New;
        }

        /// The helper: waits for the batch, moves the page, publishes. Returns what it took.
        fn helper(&self) -> Option<Mapping> {
            let command = loop {
                match self.command.load(Ordering::Acquire) {
                    0 => thread::yield_now(),
                    command => break command,
                }
            };
            if command == NO_BATCH {
                return None;
            }
            let took = {
                let kernel = self.kernel.lock().unwrap();
                let refused = kernel.announced && !kernel.read;
                (!refused && kernel.mapping != Mapping::Gone).then_some(kernel.mapping)
            };
            self.taken.store(command, Ordering::Release);
            took
        }

        /// Reads the uffd: whether the unmap's event was there. The program runs on.
        fn read_event(&self) -> bool {
            let mut kernel = self.kernel.lock().unwrap();
            // The event is queued once the unmap is done, not when it is announced.
            if kernel.read || kernel.mapping != Mapping::Gone {
                return false;
            }
            kernel.read = true;
            self.event_read.notify_one();
            true
        }

        /// The pager: looks for events, hands over the page if it is still its own to give, and goes on
        /// reading events. `gated` is whether it asks the gate before the last.
        fn pager(&self, gated: bool) {
            let mut gate = Gate::default();
            let stale = gate.epoch();
            gate.read_events(&self.taken).unwrap();
            let mut read = self.read_event();
            assert_eq!(gate.take_out(stale, &self.taken), None, "a stale choice");
            if read {
                // The event has taken the page out of the table: there is no victim to choose.
                self.command.store(NO_BATCH, Ordering::Release);
            } else {
                let chosen = gate.epoch();
                let command = gate.take_out(chosen, &self.taken).unwrap();
                self.command.store(command, Ordering::Release);
            }
            while !read {
                if !gated || gate.read_events(&self.taken).is_ok() {
                    read = self.read_event();
                }
                if !read {
                    thread::yield_now();
                }
            }
        }
    }

    fn run(gated: bool) {
        let pager = move |world: &World| world.pager(gated);
        explore(World::new, World::program, World::helper, pager);
    }

    #[test]
    fn the_helper_never_moves_a_page_of_a_new_mapping() {
        run(true);
    }

    /// What the gate is for: without it the same program loses a page of its new mapping.
    #[test]
    #[should_panic(expected = "the helper moved a page of the new mapping")]
    fn reading_without_the_gate_lets_the_helper_take_the_new_page() {
        run(false);
    }
}

mod between {
    use std::collections::VecDeque;

    use loom::sync::atomic::{AtomicU32, Ordering};
    use loom::sync::{Arc, Condvar, Mutex};
    use loom::thread;

    use super::{Mapping, explore};
    use crate::gate::{Gate, Remaps};

    const COMMAND: u32 = 1;

    #[derive(Debug, PartialEq, Eq)]
    enum Event {
        Unmap,
        Remap,
    }

    /// The kernel's part: `mremap` takes whatever is there, and returns when its event has been read. `mapping` is at the second
    /// of the batch's pages; the program leaves the first alone.
    struct Kernel {
        mapping: Mapping,
        announced: bool,
        events: VecDeque<Event>,
        unmap_read: bool,
        remaps_read: u32,
        /// The call whose pages lie in the landing range.
        moved: u32,
    }

    struct World {
        kernel: Mutex<Kernel>,
        event_read: Condvar,
        begun: AtomicU32,
        over: AtomicU32,
        read_in: AtomicU32,
        given_up: AtomicU32,
        taken: AtomicU32,
    }

    impl World {
        fn new() -> Arc<Self> {
            Arc::new(Self {
                kernel: Mutex::new(Kernel {
                    mapping: Mapping::Old,
                    announced: false,
                    events: VecDeque::new(),
                    unmap_read: false,
                    remaps_read: 0,
                    moved: 0,
                }),
                event_read: Condvar::new(),
                begun: AtomicU32::new(0),
                over: AtomicU32::new(0),
                read_in: AtomicU32::new(0),
                given_up: AtomicU32::new(0),
                taken: AtomicU32::new(0),
            })
        }

        fn program(&self) {
            let mut kernel = self.kernel.lock().unwrap();
            kernel.announced = true;
            kernel.mapping = Mapping::Gone;
            kernel.events.push_back(Event::Unmap);
            while !kernel.unmap_read {
                kernel = self.event_read.wait(kernel).unwrap();
            }
            kernel.mapping = Mapping::New;
        }

        /// The helper takes both pages, one after the other. Returns what it took of the second.
        fn helper(&self) -> Option<Mapping> {
            let took = [1, 2].into_iter().map_while(|call| self.take(call)).nth(1);
            self.taken.store(COMMAND, Ordering::Release);
            took
        }

        fn take(&self, call: u32) -> Option<Mapping> {
            let is_given_up = || self.given_up.load(Ordering::SeqCst) == COMMAND;
            {
                // Protecting is refused while an event is unread.
                let kernel = self.kernel.lock().unwrap();
                if kernel.announced && !kernel.unmap_read {
                    return None;
                }
            }
            self.begun.fetch_add(1, Ordering::SeqCst);
            let took = (!is_given_up()).then(|| self.mremap(call)).flatten();
            self.over.fetch_add(1, Ordering::SeqCst);
            took
        }

        fn mremap(&self, call: u32) -> Option<Mapping> {
            let mut kernel = self.kernel.lock().unwrap();
            let took = match call {
                1 => Mapping::Old,
                _ => kernel.mapping,
            };
            if took == Mapping::Gone {
                return None;
            }
            kernel.moved = call;
            kernel.events.push_back(Event::Remap);
            while kernel.remaps_read < call {
                kernel = self.event_read.wait(kernel).unwrap();
            }
            Some(took)
        }

        /// The pager, until the program's event has been read and the batch is over. `gated` is whether it asks the gate.
        fn pager(&self, gated: bool) {
            let mut gate = Gate::default();
            let command = gate.take_out(gate.epoch(), &self.taken).unwrap();
            assert_eq!(command, COMMAND);
            loop {
                let is_taken = gate.read_events(&self.taken).is_ok();
                let remaps = Remaps {
                    begun: &self.begun,
                    over: &self.over,
                    read_in: &self.read_in,
                };
                let has_moved = |call| self.kernel.lock().unwrap().moved == call;
                let may_read = is_taken || !gated || gate.read_between(remaps, has_moved).is_ok();
                let event = may_read.then(|| self.read_event()).flatten();
                match event {
                    Some(Event::Remap) => gate.own_event_is_read(),
                    Some(Event::Unmap) => gate.give_up(&self.given_up),
                    None if is_taken && self.kernel.lock().unwrap().unmap_read => return,
                    None => thread::yield_now(),
                }
            }
        }

        fn read_event(&self) -> Option<Event> {
            let mut kernel = self.kernel.lock().unwrap();
            let event = kernel.events.pop_front()?;
            match event {
                Event::Unmap => kernel.unmap_read = true,
                Event::Remap => kernel.remaps_read += 1,
            }
            self.event_read.notify_all();
            Some(event)
        }
    }

    fn run(gated: bool) {
        let pager = move |world: &World| world.pager(gated);
        explore(World::new, World::program, World::helper, pager);
    }

    #[test]
    fn between_moves_the_program_is_not_let_go_ahead_of_the_helper() {
        run(true);
    }

    #[test]
    #[should_panic(expected = "the helper moved a page of the new mapping")]
    fn reading_whenever_there_is_something_lets_the_helper_take_the_new_page() {
        run(false);
    }
}
