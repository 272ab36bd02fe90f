//! What owners of records rely on.

use std::time::{Duration, Instant};

use a3s_box_core::storage::{Change, Storage, Table};
use a3s_box_golden::{Goldens, sparse, unsparse};
use a3s_box_store::{FaultyStore, OpenError, RedbStore, SCHEMA_VERSION};
use redb::{Database, ReadableDatabase, TableDefinition};

const BOXES: Table = Table("boxes");
const NAMES: Table = Table("names");

fn put(table: Table, key: &str, value: &str) -> Change {
    Change::Put { table, key: key.to_owned(), value: value.as_bytes().to_vec() }
}

#[test]
fn records_outlive_the_process_that_wrote_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/state.redb");
    {
        let store = RedbStore::open(&path, Duration::ZERO).unwrap();
        store.commit(vec![put(BOXES, "b", "2"), put(BOXES, "a", "1"), put(NAMES, "x", "b")]).unwrap();
        store.commit(vec![Change::Delete { table: BOXES, key: "missing".to_owned() }]).unwrap();
    }
    let store = RedbStore::open(&path, Duration::ZERO).unwrap();
    let records = store.scan(BOXES).unwrap();
    assert_eq!(records, [("a".to_owned(), b"1".to_vec()), ("b".to_owned(), b"2".to_vec())]);
    assert_eq!(store.get(NAMES, "x").unwrap().as_deref(), Some(&b"b"[..]));
    assert_eq!(store.scan(Table("never-written")).unwrap(), []);
    assert_eq!(store.get(Table("never-written"), "x").unwrap(), None);
}

#[test]
fn a_store_in_use_is_waited_for_and_then_named_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let _holder = RedbStore::open(&path, Duration::ZERO).unwrap();
    let start = Instant::now();
    let error = RedbStore::open(&path, Duration::from_millis(120)).unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(120));
    assert!(matches!(error, OpenError::InUse { .. }));
    assert!(error.to_string().contains("--root"), "{error}");
}

#[test]
fn a_store_that_becomes_free_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let holder = RedbStore::open(&path, Duration::ZERO).unwrap();
    let waiting = std::thread::spawn({
        let path = path.clone();
        move || RedbStore::open(&path, Duration::from_secs(20)).map(drop)
    });
    std::thread::sleep(Duration::from_millis(100));
    drop(holder);
    waiting.join().unwrap().unwrap();
}

#[test]
fn a_file_that_is_no_store_is_an_error_and_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    std::fs::write(&path, vec![7; 8192]).unwrap();
    let error = RedbStore::open(&path, Duration::ZERO).unwrap_err();
    assert!(matches!(error, OpenError::Database { .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), vec![7; 8192]);
}

#[test]
fn a_store_that_was_half_made_when_the_power_went_is_made_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    std::fs::write(dir.path().join("state.redb.new-4711"), b"half").unwrap();
    drop(RedbStore::open(&path, Duration::ZERO).unwrap());
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["state.redb"]);
}

#[test]
fn a_failed_commit_changes_nothing_and_the_next_one_succeeds() {
    let store = FaultyStore::new(RedbStore::in_memory().unwrap());
    store.fail_at(2);
    store.commit(vec![put(BOXES, "a", "1")]).unwrap();
    store.commit(vec![put(BOXES, "b", "2"), put(NAMES, "x", "b")]).unwrap_err();
    assert_eq!(store.scan(BOXES).unwrap().len(), 1);
    assert_eq!(store.get(NAMES, "x").unwrap(), None);
    assert_eq!(store.heal(), 4);
    store.commit(vec![put(BOXES, "b", "2")]).unwrap();
    assert_eq!(store.scan(BOXES).unwrap().len(), 2);
}

/// A store that a later build cannot open loses every pod of the node at an upgrade.
#[test]
fn golden_stores_of_every_age_are_opened_with_their_records() {
    const NAME: &str = "state.redb.sparse";
    let goldens = Goldens::of(env!("CARGO_MANIFEST_DIR"), "records");
    let records = [put(BOXES, "b0b0", "{\"id\":\"b0b0\"}"), put(NAMES, "x", "b0b0")];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.redb");
    RedbStore::open(&path, Duration::ZERO).unwrap().commit(records.to_vec()).unwrap();
    // The database's own pages may lie otherwise; the layout's number and the tables are ours.
    goldens.check_by(NAME, sparse(&std::fs::read(&path).unwrap()).as_bytes(), |golden| {
        let path = dir.path().join("golden.redb");
        std::fs::write(&path, bytes_of(&golden.bytes)).unwrap();
        layout_of(&path) == SCHEMA_VERSION
    });
    goldens.are_all_known(&[NAME]);
    for golden in goldens.ages(NAME) {
        let path = dir.path().join(format!("v{}.redb", golden.age));
        std::fs::write(&path, bytes_of(&golden.bytes)).unwrap();
        {
            let store = RedbStore::open(&path, Duration::ZERO).unwrap();
            assert_eq!(store.get(BOXES, "b0b0").unwrap().as_deref(), Some(&b"{\"id\":\"b0b0\"}"[..]));
            assert_eq!(store.scan(NAMES).unwrap(), [("x".to_owned(), b"b0b0".to_vec())]);
            store.commit(vec![put(BOXES, "b1b1", "{}")]).unwrap();
        }
        assert_eq!(layout_of(&path), SCHEMA_VERSION, "it is brought to the newest layout");
    }
}

fn bytes_of(golden: &[u8]) -> Vec<u8> {
    unsparse(std::str::from_utf8(golden).unwrap()).unwrap()
}

/// The layout's number, as every build that ever was reads it.
fn layout_of(path: &std::path::Path) -> u32 {
    let database = Database::open(path).unwrap();
    let table = TableDefinition::<&str, u32>::new("schema");
    let open = database.begin_read().unwrap().open_table(table).unwrap();
    open.get("version").unwrap().unwrap().value()
}
