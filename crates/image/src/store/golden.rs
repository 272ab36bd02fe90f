//! Records of every build's making, read by this one: docs/versioning.md.
//!
//! The values here name every field, so that a field which is added must be given a meaning here too.

use std::path::Path;

use a3s_box_core::image::ImageConfig;
use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_golden::{Goldens, with_unknown_fields};
use serde_json::Value;

use super::*;
use crate::record::LayerRecord;

const FULL: &str = "image-full.json";
const BARE: &str = "image-bare.json";
/// Keys below which there is data of an image's author.
const MAPS: [&str; 2] = ["labels", "annotations"];

/// Records in memory.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<(&'static str, String), Vec<u8>>>);

impl Storage for Memory {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(locked(&self.0).get(&(table.0, key.to_owned())).cloned())
    }

    fn scan(&self, table: Table) -> Result<Vec<Record>, StorageError> {
        let records = locked(&self.0);
        let of_table = records.iter().filter(|((name, _), _)| *name == table.0);
        Ok(of_table.map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        let mut records = locked(&self.0);
        for change in changes {
            match change {
                Change::Put { table, key, value } => drop(records.insert((table.0, key), value)),
                Change::Delete { table, key } => drop(records.remove(&(table.0, key))),
            }
        }
        Ok(())
    }
}

fn goldens() -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), "records")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(ToString::to_string).collect()
}

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

fn digest(byte: &str) -> String {
    format!("sha256:{}", byte.repeat(32))
}

fn layer(file: String, empty: bool) -> LayerRecord {
    LayerRecord { diff_id: digest("1a"), digest: digest("1b"), file, size: 5, empty }
}

/// An image of which everything is known.
fn full() -> ImageRecord {
    ImageRecord {
        id: digest("ee"),
        repo_tags: words(&["registry.example/web:2"]),
        repo_digests: vec![format!("registry.example/web@{}", digest("aa"))],
        other_names: words(&["oci:/srv/images/web"]),
        manifest_digest: digest("aa"),
        size: 1234,
        config: ImageConfig {
            entrypoint: words(&["/srv/web"]),
            cmd: words(&["--help"]),
            env: words(&["PATH=/bin"]),
            working_dir: "/srv".to_owned(),
            user: "app".to_owned(),
            stop_signal: "SIGQUIT".to_owned(),
            labels: map(&[("version", "2")]),
            volumes: words(&["/data"]),
            exposed_ports: words(&["80/tcp"]),
        },
        layers: vec![
            layer(format!("{}.erofs", "1a".repeat(32)), false),
            layer(format!("chain-{}.erofs", "2a".repeat(32)), true),
        ],
        platform: "linux/amd64".to_owned(),
        created: "2026-11-23T14:48:00Z".to_owned(),
        annotations: map(&[("org.example", "x")]),
        pinned: true,
        pulled_at: 1_760_000_000,
    }
}

fn bare() -> ImageRecord {
    ImageRecord {
        id: digest("dd"),
        repo_tags: Vec::new(),
        repo_digests: Vec::new(),
        other_names: Vec::new(),
        manifest_digest: digest("cc"),
        size: 0,
        config: ImageConfig::default(),
        layers: Vec::new(),
        platform: "linux/amd64".to_owned(),
        created: String::new(),
        annotations: BTreeMap::new(),
        pinned: false,
        pulled_at: 0,
    }
}

fn images() -> [(&'static str, ImageRecord); 2] {
    [(FULL, full()), (BARE, bare())]
}

fn config(root: &Path) -> ImageStoreConfig {
    ImageStoreConfig { pinned: words(&["registry.example/web:2"]), ..ImageStoreConfig::new(root) }
}

/// The files that a record names.
fn place_files(root: &Path, record: &ImageRecord) {
    for key in files::keys(record) {
        let path = root.join("images").join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, b"erofs").unwrap();
    }
}

/// A change of the record's form made a node pull all of its images again after an upgrade.
#[test]
fn golden_images_are_what_this_build_writes() {
    for (name, record) in images() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Arc::new(Memory::default());
        let store = ImageStore::open(config(dir.path()), storage.clone()).unwrap();
        store.inner.record(record.clone()).unwrap();
        goldens().check_json(name, &storage.get(IMAGES, &record.id).unwrap().unwrap());
    }
    goldens().are_all_known(&[FULL, BARE, "image-file.json", "image-file-sealed.json"]);
}

#[test]
fn golden_images_of_every_age_are_read_with_their_meaning() {
    for (name, record) in images() {
        for golden in goldens().ages(name) {
            for json in [golden.json(), with_unknown_fields(golden.json(), &MAPS)] {
                let dir = tempfile::tempdir().unwrap();
                place_files(dir.path(), &record);
                let read = opened(dir.path(), &record.id, &json);
                assert_eq!(read.list(), std::slice::from_ref(&record), "{}", golden.path.display());
                let resolved = read.resolve(&record.id).unwrap();
                assert_eq!(resolved.config, record.config);
                assert_eq!(resolved.layers.len(), record.layers.iter().filter(|layer| !layer.empty).count());
            }
        }
    }
}

fn opened(root: &Path, id: &str, json: &Value) -> ImageStore {
    let storage = Memory::default();
    let value = serde_json::to_vec(json).unwrap();
    storage.commit(vec![Change::Put { table: IMAGES, key: id.to_owned(), value }]).unwrap();
    ImageStore::open(config(root), Arc::new(storage)).unwrap()
}
