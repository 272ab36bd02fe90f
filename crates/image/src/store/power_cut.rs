//! Power cuts after each call of two pulls that makes something last. What was not synced before the cut is gone: the
//! bytes of files always, their names in one of two variants, as disks may write names early.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use tempfile::NamedTempFile;

use super::disk::{Disk, RealDisk};
use super::{IMAGES, ImageStore, locked};
use crate::build::{BuildRequest, build};
use crate::config::ImageStoreConfig;

type Records = BTreeMap<(&'static str, String), Vec<u8>>;

/// What happened, in order.
#[derive(Debug, Clone)]
enum Event {
    /// The bytes of a file last.
    Synced { inode: u64, bytes: Vec<u8> },
    /// A file got a name, which does not last yet.
    Renamed { inode: u64, to: PathBuf },
    /// The names in a directory last.
    Names(PathBuf),
    /// Records were committed, which lasts at once: the state store's own promise.
    Committed(Records),
}

/// Works on the real files and writes down what it is asked for.
#[derive(Debug, Default)]
struct Recorder {
    events: Mutex<Vec<Event>>,
    records: Mutex<Records>,
}

impl Recorder {
    fn note(&self, event: Event) {
        locked(&self.events).push(event);
    }
}

impl Disk for Recorder {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        let metadata = file.metadata()?;
        let mut bytes = vec![0; metadata.len() as usize];
        file.read_exact_at(&mut bytes, 0)?;
        self.note(Event::Synced { inode: metadata.ino(), bytes });
        Ok(())
    }

    fn rename(&self, file: NamedTempFile, to: &Path) -> io::Result<()> {
        let inode = file.as_file().metadata()?.ino();
        RealDisk.rename(file, to)?;
        self.note(Event::Renamed { inode, to: to.to_owned() });
        Ok(())
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        self.note(Event::Names(directory.to_owned()));
        Ok(())
    }
}

impl Storage for Recorder {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(locked(&self.records).get(&(table.0, key.to_owned())).cloned())
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        let records = locked(&self.records);
        let ours = records.iter().filter(|((name, _), _)| *name == table.0);
        Ok(ours.map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        let mut records = locked(&self.records);
        for change in changes {
            match change {
                Change::Put { table, key, value } => records.insert((table.0, key), value),
                Change::Delete { table, key } => records.remove(&(table.0, key)),
            };
        }
        self.note(Event::Committed(records.clone()));
        Ok(())
    }
}

/// What is on the disk after the power came back.
#[derive(Default)]
struct Survivors {
    files: BTreeMap<PathBuf, Vec<u8>>,
    records: Records,
}

impl Survivors {
    fn of(events: &[Event], names_were_early: bool) -> Self {
        let (mut bytes, mut names, mut pending) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let mut survivors = Self::default();
        for event in events {
            match event {
                Event::Synced { inode, bytes: synced } => drop(bytes.insert(*inode, synced)),
                Event::Renamed { inode, to } => pending.push((to, *inode)),
                Event::Names(directory) => pending.retain(|(to, inode)| {
                    let synced = to.parent() == Some(directory.as_path());
                    if synced {
                        names.insert(*to, *inode);
                    }
                    !synced
                }),
                Event::Committed(records) => survivors.records.clone_from(records),
            }
        }
        if names_were_early {
            names.extend(pending);
        }
        let content = |inode: u64| bytes.get(&inode).map_or(Vec::new(), |bytes| bytes.to_vec());
        survivors.files = names.into_iter().map(|(to, inode)| (to.clone(), content(inode))).collect();
        survivors
    }

    /// Starts again with them: no image that was committed is lost, none is bad, and pulls complete.
    async fn start(self, former: &Path, images: &[String]) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        for (path, bytes) in &self.files {
            let path = directory.path().join(path.strip_prefix(former).unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let committed: BTreeSet<String> =
            self.records.keys().filter(|(table, _)| *table == IMAGES.0).map(|(_, id)| id.clone()).collect();
        let storage = Arc::new(Recorder { records: Mutex::new(self.records), ..Recorder::default() });
        let store = ImageStore::open(ImageStoreConfig::new(directory.path()), storage).unwrap();
        let present: BTreeSet<String> = store.list().into_iter().map(|record| record.id).collect();
        if committed != present {
            return Err(format!("committed were {committed:?}, and there are {present:?}"));
        }
        for _ in 0..2 {
            let verified = store.verify().await.unwrap();
            if !verified.damaged.is_empty() {
                return Err(format!("{verified:?}"));
            }
            for image in images {
                store.pull(image, None, None).await.map_err(|e| e.to_string())?;
            }
            store.settle().await;
        }
        Ok(())
    }
}

/// Two images with a layer in common.
fn images(directory: &Path) -> Vec<String> {
    fs::write(directory.join("common"), vec![7; 20_000]).unwrap();
    let image = |name: &str| {
        fs::write(directory.join(name), name).unwrap();
        let file = directory.join(format!("{name}.file"));
        fs::write(&file, format!("FROM scratch\nCOPY common /\nCOPY {name} /\n")).unwrap();
        let context = directory.to_owned();
        let request = BuildRequest { file, context, base: None, names: Vec::new(), epoch: 0 };
        let layout = directory.join(format!("{name}.image"));
        build(&request, &layout).unwrap();
        format!("oci:{}", layout.display())
    };
    ["a", "b"].map(image).to_vec()
}

#[tokio::test]
async fn after_a_power_cut_at_any_point_every_image_is_whole_and_pulls_complete() {
    let (source, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (images, recorder) = (images(source.path()), Arc::new(Recorder::default()));
    let config = ImageStoreConfig::new(directory.path());
    let store = ImageStore::open_on(config, Arc::clone(&recorder) as _, Arc::clone(&recorder) as _).unwrap();
    for image in &images {
        store.pull(image, None, None).await.unwrap();
        store.settle().await;
    }
    let events = locked(&recorder.events).clone();
    // Each image has a manifest, a config and a layer of its own; one layer is in both. Each file is synced,
    // renamed, and its directory synced.
    let renamed = events.iter().filter(|event| matches!(event, Event::Renamed { .. })).count();
    assert_eq!(renamed, 7);
    for cut in 0..=events.len() {
        for names_were_early in [false, true] {
            let survivors = Survivors::of(&events[..cut], names_were_early);
            let outcome = survivors.start(directory.path(), &images).await;
            assert_eq!(outcome, Ok(()), "cut after {cut} of {} events", events.len());
        }
    }
    // The model can tell: without one kind of sync, or with the record first, images are lost.
    let without = |drop: fn(&Event) -> bool| -> Vec<Event> {
        events.iter().filter(|event| !drop(event)).cloned().collect()
    };
    for careless in [
        without(|event| matches!(event, Event::Synced { .. })),
        without(|event| matches!(event, Event::Names(_))),
        without(|event| !matches!(event, Event::Committed(_))),
    ] {
        let survivors = Survivors::of(&careless, false);
        assert!(survivors.start(directory.path(), &images).await.is_err());
    }
}
