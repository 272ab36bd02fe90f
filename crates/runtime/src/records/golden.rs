//! Records of every build's making, read by this one: docs/versioning.md.

mod values;

use std::sync::Arc;

use a3s_box_golden::{Goldens, with_unknown_fields};
use a3s_box_store::RedbStore;
use serde_json::Value;

use self::values::{box_dir, boxes, dns, quarantined, sessions};
use super::*;

/// Keys below which there is data of a client, or ids.
const MAPS: [&str; 5] = ["labels", "annotations", "sysctls", "unified", "holders"];

const QUARANTINED: &str = "quarantined.json";

fn goldens() -> Goldens {
    Goldens::of(env!("CARGO_MANIFEST_DIR"), "records")
}

/// What an older build's golden file means to this one, where that is not the value of today.
fn box_of_age(age: u32, record: BoxRecord) -> BoxRecord {
    match age {
        // It did not note the number of the agent, knew of no user for process 1, and attached each mount for itself.
        1 => BoxRecord {
            agent_protocol: 0,
            sources: Sources::default(),
            spec: BoxSpec { init_user: None, ..record.spec },
            ..record
        },
        _ => record,
    }
}

/// The same of a session.
fn session_of_age(age: u32, record: SessionRecord) -> SessionRecord {
    match age {
        // It made no volumes of what an image declares.
        1 => SessionRecord { spec: SessionSpec { image_volumes: Vec::new(), ..record.spec }, ..record },
        _ => record,
    }
}

fn store() -> Arc<dyn Storage> {
    Arc::new(RedbStore::in_memory().unwrap())
}

fn put(storage: &dyn Storage, table: Table, key: &str, value: &Value) {
    let value = serde_json::to_vec(value).unwrap();
    storage.commit(vec![Change::Put { table, key: key.to_owned(), value }]).unwrap();
}

/// The one record in a table, as a store holds it.
fn stored(storage: &dyn Storage, table: Table) -> Vec<u8> {
    let mut records = storage.scan(table).unwrap();
    assert_eq!(records.len(), 1);
    records.remove(0).1
}

/// Reads a golden file as a daemon reads its store when it starts.
fn loaded(table: Table, record: &Value) -> Loaded {
    let storage = store();
    put(storage.as_ref(), table, "x", record);
    load(storage.as_ref()).unwrap()
}

fn value(record: &impl Serialize) -> Value {
    serde_json::to_value(record).unwrap()
}

/// A field whose name was changed made every pod's record unreadable after an upgrade, and ended the pod.
#[tokio::test]
async fn golden_records_are_what_this_build_writes() {
    for (name, record) in boxes() {
        let storage = store();
        Records::new(storage.clone()).put_box(&record).await.unwrap();
        goldens().check_json(name, &stored(storage.as_ref(), BOXES));
    }
    for (name, record) in sessions() {
        let storage = store();
        Records::new(storage.clone()).put_session(&record).await.unwrap();
        goldens().check_json(name, &stored(storage.as_ref(), SESSIONS));
    }
    let storage = store();
    put(storage.as_ref(), BOXES, "b0b0", &serde_json::json!({"id": 1}));
    load(storage.as_ref()).unwrap();
    let mut apart: Quarantined = serde_json::from_slice(&stored(storage.as_ref(), QUARANTINE)).unwrap();
    assert_eq!((apart.record.as_str(), apart.content.as_str()), ("boxes/b0b0", "{\"id\":1}"));
    // What is left of it is a time and another library's words.
    (apart.since_ns, apart.error) = (quarantined().since_ns, quarantined().error);
    goldens().check_json(QUARANTINED, &serde_json::to_vec(&apart).unwrap());
    let mut names = vec![QUARANTINED, "log-position.hex"];
    names.extend(boxes().iter().map(|(name, _)| *name));
    names.extend(sessions().iter().map(|(name, _)| *name));
    goldens().are_all_known(&names);
}

#[test]
fn golden_records_of_every_age_are_read_with_their_meaning() {
    for (name, record) in boxes() {
        for golden in goldens().ages(name) {
            let expected = value(&box_of_age(golden.age, record.clone()));
            for json in [golden.json(), with_unknown_fields(golden.json(), &MAPS)] {
                let loaded = loaded(BOXES, &json);
                assert_eq!(loaded.quarantined, [], "{}", golden.path.display());
                assert_eq!(value(&loaded.boxes[0]), expected, "{}", golden.path.display());
            }
        }
    }
    for (name, record) in sessions() {
        for golden in goldens().ages(name) {
            let expected = value(&session_of_age(golden.age, record.clone()));
            for json in [golden.json(), with_unknown_fields(golden.json(), &MAPS)] {
                let loaded = loaded(SESSIONS, &json);
                assert_eq!(loaded.quarantined, [], "{}", golden.path.display());
                assert_eq!(value(&loaded.sessions[0]), expected, "{}", golden.path.display());
            }
        }
    }
    for golden in goldens().ages(QUARANTINED) {
        for json in [golden.json(), with_unknown_fields(golden.json(), &MAPS)] {
            assert_eq!(loaded(QUARANTINE, &json).quarantined, [quarantined()]);
        }
    }
}

/// What recovery and statuses take from a record is taken from one of an older build too.
#[test]
fn a_golden_box_has_what_recovery_needs() {
    for golden in goldens().ages("box-ready.json") {
        let record = loaded(BOXES, &golden.json()).boxes.remove(0);
        let facts = record.machine.clone().unwrap();
        assert_eq!((facts.backend, facts.pid, facts.start_ticks), (BackendKind::Libkrun, 4321, 987_654_321));
        assert_eq!(record.plan.as_ref().unwrap().dir, box_dir());
        assert_eq!(record.ledger.len(), 6, "everything that is to be given back");
        assert_eq!(record.dns(), Some(&dns()));
        let status = record.status();
        assert_eq!(status.phase, BoxPhase::Ready);
        assert_eq!(status.ips.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.9.8.7", "fd00::7"]);
        assert_eq!((status.backend.as_str(), status.vmm_pid), ("libkrun", Some(4321)));
    }
}

/// A word that a newer build has added to an enum cannot be ignored: half of a record is not acted on.
#[test]
fn a_record_with_an_unknown_variant_is_set_apart() {
    let golden = goldens().ages("box-ready.json").remove(0);
    let mut json = golden.json();
    json["phase"] = serde_json::json!("Frozen");
    let loaded = loaded(BOXES, &json);
    assert!(loaded.boxes.is_empty());
    assert!(loaded.quarantined[0].error.contains("Frozen"), "{:?}", loaded.quarantined);
    let content: Value = serde_json::from_str(&loaded.quarantined[0].content).unwrap();
    assert_eq!(content, json, "nothing of it is lost");
}
