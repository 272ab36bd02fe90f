//! The state store on a disk that forgets: what was written and not synced is lost, or is there in part, when the
//! power goes.
//!
//! Guards: after a cut at any write or sync the store opens, everything that was answered is there, and the commit under
//! way is there as a whole or not at all.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

use redb::StorageBackend;

use a3s_box_core::storage::{Change, Storage, Table};

use crate::RedbStore;

const TABLES: [Table; 2] = [Table("boxes"), Table("sessions")];

/// The least that a disk writes as a whole.
const SECTOR: usize = 512;

/// What a disk holds, and what is on the way to it.
#[derive(Debug)]
struct Disk {
    safe: Vec<u8>,
    /// As its user sees it.
    now: Vec<u8>,
    /// Since the last sync, in order.
    pending: Vec<Write>,
    /// Writes and syncs until the power goes; then all of them fail.
    left: usize,
}

#[derive(Debug)]
enum Write {
    Sector(usize, Vec<u8>),
    Length(usize),
}

impl Write {
    fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Length(length) => image.resize(*length, 0),
            Self::Sector(offset, bytes) => {
                let end = offset + bytes.len();
                image.resize(image.len().max(end), 0);
                image[*offset..end].copy_from_slice(bytes);
            }
        }
    }
}

impl Disk {
    fn spend(&mut self) -> io::Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| io::Error::other("the power is gone"))?;
        Ok(())
    }

    fn take(&mut self, write: Write) {
        write.apply(&mut self.now);
        self.pending.push(write);
    }

    /// What the next boot finds if only these writes outlived the cut, by their numbers since the last sync.
    fn after_cut(&self, outlived: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut image = self.safe.clone();
        let kept = self.pending.iter().enumerate().filter(|(number, _)| outlived(*number));
        kept.for_each(|(_, write)| write.apply(&mut image));
        image
    }
}

#[derive(Debug, Clone)]
struct Power(Arc<Mutex<Disk>>);

impl Power {
    fn on(image: Vec<u8>, left: usize) -> Self {
        Self(Arc::new(Mutex::new(Disk { safe: image.clone(), now: image, pending: Vec::new(), left })))
    }
}

impl StorageBackend for Power {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().now.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let disk = self.0.lock().unwrap();
        let from = offset as usize;
        let bytes = disk.now.get(from..from + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        disk.take(Write::Length(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        disk.safe = disk.now.clone();
        disk.pending.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        let mut at = offset as usize;
        for sector in data.chunks(SECTOR) {
            disk.take(Write::Sector(at, sector.to_vec()));
            at += sector.len();
        }
        Ok(())
    }
}

type Contents = BTreeMap<(&'static str, String), Vec<u8>>;

/// The changes of one commit: pods come, change and go as in a daemon's life.
fn changes(step: usize) -> Vec<Change> {
    let put = |table: Table, key: usize| Change::Put {
        table,
        key: format!("{key}"),
        value: format!("{step}/{key} ").repeat(40 * (step % 5 + 1)).into_bytes(),
    };
    let [boxes, sessions] = TABLES;
    match step % 4 {
        0 => vec![put(boxes, step)],
        1 => vec![put(sessions, step), put(sessions, step + 1), put(boxes, step - 1)],
        2 => vec![put(boxes, step - 2)],
        _ => vec![
            Change::Delete { table: sessions, key: format!("{}", step - 2) },
            Change::Delete { table: boxes, key: format!("{}", step.saturating_sub(7)) },
        ],
    }
}

fn apply(contents: &mut Contents, changes: Vec<Change>) {
    for change in changes {
        match change {
            Change::Put { table, key, value } => drop(contents.insert((table.0, key), value)),
            Change::Delete { table, key } => drop(contents.remove(&(table.0, key))),
        }
    }
}

fn contents(store: &RedbStore) -> Contents {
    let mut found = Contents::new();
    for table in TABLES {
        found.extend(store.scan(table).unwrap().into_iter().map(|(key, value)| ((table.0, key), value)));
    }
    found
}

#[test]
fn after_a_power_cut_at_any_moment_what_was_answered_is_there() {
    const STEPS: usize = 12;
    let mut cuts = 0;
    for left in 1.. {
        let power = Power::on(Vec::new(), left);
        let (mut answered, mut under_way) = (Contents::new(), None);
        let handle = power.clone();
        let all_done = match RedbStore::on(move || handle.clone()) {
            Err(_) => false,
            Ok(store) => (0..STEPS).all(|step| {
                let mut next = answered.clone();
                apply(&mut next, changes(step));
                let committed = store.commit(changes(step)).is_ok();
                match committed {
                    true => answered = next,
                    false => under_way = Some(next),
                }
                committed
            }),
        };
        if all_done {
            break;
        }
        cuts += 1;
        let disk = power.0.lock().unwrap();
        // Nothing, everything, the first half, and two kinds of every other sector.
        let half = disk.pending.len() / 2;
        let outcomes: [&dyn Fn(usize) -> bool; 5] =
            [&|_| false, &|_| true, &|n| n < half, &|n| n % 2 == 0, &|n| n * 7 % 5 < 2];
        for (kind, outlived) in outcomes.iter().enumerate() {
            let image = disk.after_cut(outlived);
            let fresh = image.is_empty() || answered.is_empty() && under_way.is_none();
            let next = Power::on(image, usize::MAX);
            let store = match RedbStore::on(move || next.clone()) {
                Ok(store) => store,
                // A store gets its name when it is made: see `RedbStore::open`.
                Err(_) if fresh => continue,
                Err(error) => panic!("cut {left}, outcome {kind}: {error}"),
            };
            let found = contents(&store);
            let right = found == answered || under_way.as_ref() == Some(&found);
            assert!(right, "cut {left}, outcome {kind}: {:?}", found.keys());
            store.commit(changes(STEPS)).unwrap();
        }
    }
    assert!(cuts > STEPS * 3, "only {cuts} cuts: the model does not see the writes");
}

#[test]
fn a_disk_that_fails_for_a_while_stops_the_store_for_that_while() {
    for left in 0..12 {
        let power = Power::on(Vec::new(), usize::MAX);
        let handle = power.clone();
        let store = RedbStore::on(move || handle.clone()).unwrap();
        let mut answered = Contents::new();
        store.commit(changes(0)).unwrap();
        apply(&mut answered, changes(0));
        power.0.lock().unwrap().left = left;
        while store.commit(changes(2)).is_ok() {}
        store.commit(changes(3)).unwrap_err();
        power.0.lock().unwrap().left = usize::MAX;
        // The commit that failed may have got as far as the disk.
        let (found, mut next) = (contents(&store), answered.clone());
        apply(&mut next, changes(2));
        assert!(found == answered || found == next, "after {left} writes: {:?}", found.keys());
        store.commit(changes(4)).unwrap();
        assert!(contents(&store).contains_key(&("boxes", "4".to_owned())));
    }
}
