//! What builds have written, kept so that later builds are tested against it: docs/versioning.md.
//!
//! ```text
//! tests/records/v1/NAME    what a build wrote; once released, never changed and never removed
//! tests/records/v2/NAME    the same where a later build writes it differently
//! ```
//!
//! A test asks two things: whether what this build writes is what the newest golden file has ([`Goldens::check`]), and
//! what every golden file, of whatever age, means to this build's reader ([`Goldens::ages`]). This crate is for tests
//! only and panics as they do.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// When set to `vN`, what differs from the newest golden file is written into that folder instead of failing.
const WRITE: &str = "A3S_BOX_GOLDEN";

/// The golden files of one crate.
#[derive(Debug, Clone)]
pub struct Goldens {
    dir: PathBuf,
    write: Option<u32>,
}

/// One golden file.
#[derive(Debug, Clone)]
pub struct Golden {
    /// N of the folder `vN`.
    pub age: u32,
    /// Where it lies.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl Golden {
    /// Its content as JSON.
    pub fn json(&self) -> Value {
        let parsed = serde_json::from_slice(&self.bytes);
        parsed.unwrap_or_else(|error| panic!("{} is no JSON: {error}", self.path.display()))
    }

    /// Its bytes, which the file has as hexadecimal digits.
    pub fn unhex(&self) -> Vec<u8> {
        unhex(&String::from_utf8_lossy(&self.bytes))
            .unwrap_or_else(|| panic!("{} is not hexadecimal", self.path.display()))
    }
}

impl Goldens {
    /// Those of the crate whose manifest lies in `crate_dir` (`env!("CARGO_MANIFEST_DIR")`), below `tests/` in `folder`.
    pub fn of(crate_dir: &str, folder: &str) -> Self {
        let write = std::env::var(WRITE).ok().filter(|value| !value.is_empty());
        let write = write.map(|value| {
            number(&value).unwrap_or_else(|| panic!("{WRITE}={value:?} names no folder such as v2"))
        });
        Self { dir: Path::new(crate_dir).join("tests").join(folder), write }
    }

    /// The file of this name of every age, the oldest first. At least one.
    pub fn ages(&self, name: &str) -> Vec<Golden> {
        let found: Vec<Golden> = self
            .folders()
            .into_iter()
            .filter_map(|age| {
                let path = self.dir.join(format!("v{age}")).join(name);
                fs::read(&path).ok().map(|bytes| Golden { age, path, bytes })
            })
            .collect();
        assert!(!found.is_empty(), "there is no golden file {name} in {}", self.dir.display());
        found
    }

    /// Panics if there is a golden file that is not one of `names`, so that none is forgotten by its test.
    pub fn are_all_known(&self, names: &[&str]) {
        let known: BTreeSet<&str> = names.iter().copied().collect();
        for age in self.folders() {
            let folder = self.dir.join(format!("v{age}"));
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                assert!(known.contains(name.as_str()), "no test reads {}", entry.path().display());
            }
        }
    }

    /// Panics unless `written`, which is JSON, says what the newest golden file of this name says.
    pub fn check_json(&self, name: &str, written: &[u8]) {
        let written: Value =
            serde_json::from_slice(written).unwrap_or_else(|error| panic!("{name} is no JSON: {error}"));
        let mut pretty = serde_json::to_vec_pretty(&written).unwrap_or_default();
        pretty.push(b'\n');
        self.compare(name, &pretty, |golden| first_difference("", golden.json(), written.clone()));
    }

    /// Panics unless `written` is what the newest golden file of this name is, byte for byte.
    pub fn check(&self, name: &str, written: &[u8]) {
        self.compare(name, written, |golden| {
            (golden.bytes != written).then(|| Difference {
                place: String::new(),
                golden: String::from_utf8_lossy(&golden.bytes).into_owned(),
                written: String::from_utf8_lossy(written).into_owned(),
            })
        });
    }

    /// The same for bytes that the file has as hexadecimal digits.
    pub fn check_hex(&self, name: &str, written: &[u8]) {
        self.check(name, hex(written).as_bytes());
    }

    /// For bytes that mean the same in more than one form: `same` says whether the newest golden file of this name still
    /// stands for what this build writes. A new one would be `written`.
    pub fn check_by(&self, name: &str, written: &[u8], same: impl FnOnce(&Golden) -> bool) {
        self.compare(name, written, |golden| {
            (!same(golden))
                .then(|| Difference { written: "another form".to_owned(), ..Difference::default() })
        });
    }

    fn compare(&self, name: &str, text: &[u8], difference: impl FnOnce(&Golden) -> Option<Difference>) {
        let newest = self.folders().into_iter().rev().find_map(|age| {
            let path = self.dir.join(format!("v{age}")).join(name);
            fs::read(&path).ok().map(|bytes| Golden { age, path, bytes })
        });
        let found = match &newest {
            Some(golden) => difference(golden),
            None => Some(Difference::default()),
        };
        let Some(found) = found else { return };
        if let Some(age) = self.write {
            self.write(age, name, text, newest.as_ref());
            return;
        }
        match newest {
            Some(golden) => panic!("{}", Changed { name, golden: &golden.path, found }),
            None => panic!(
                "{name} has no golden file in {}; {WRITE}=v1 makes it (docs/versioning.md)",
                self.dir.display()
            ),
        }
    }

    fn write(&self, age: u32, name: &str, text: &[u8], newest: Option<&Golden>) {
        if let Some(newest) = newest {
            assert!(newest.age <= age, "{} is newer than v{age}", newest.path.display());
        }
        let path = self.dir.join(format!("v{age}")).join(name);
        let folder = path.parent().unwrap_or(&self.dir);
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&path, text));
        written.unwrap_or_else(|error| panic!("writing {}: {error}", path.display()));
        eprintln!("{} is written", path.display());
    }

    /// N of all folders `vN`, in order.
    fn folders(&self) -> BTreeSet<u32> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| number(&entry.file_name().to_string_lossy())).collect()
    }
}

fn number(folder: &str) -> Option<u32> {
    folder.strip_prefix('v')?.parse().ok().filter(|age| *age > 0)
}

/// The first place where two values differ.
#[derive(Debug, Default, PartialEq, Eq)]
struct Difference {
    place: String,
    golden: String,
    written: String,
}

struct Changed<'a> {
    name: &'a str,
    golden: &'a Path,
    found: Difference,
}

impl fmt::Display for Changed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { place, golden, written } = &self.found;
        write!(
            f,
            "what this build writes as {} is not what {} has{}{place}\n  golden file: {golden}\n  this build:  {written}\n\
             Boxes and their records outlive the build that made them, so this is a contract. docs/versioning.md says which \
             changes are allowed. If this one is: {WRITE}=vN cargo nextest run -p CRATE golden, with N one more than the \
             newest folder that was released, writes the new form beside the old one, which stays and must be read for ever.",
            self.name,
            self.golden.display(),
            if place.is_empty() { "" } else { ", first at " },
        )
    }
}

fn first_difference(place: &str, golden: Value, written: Value) -> Option<Difference> {
    match (golden, written) {
        (Value::Object(golden), Value::Object(mut written)) => {
            for (key, value) in golden {
                let place = format!("{place}/{key}");
                match written.remove(&key) {
                    Some(other) => {
                        if let Some(found) = first_difference(&place, value, other) {
                            return Some(found);
                        }
                    }
                    None => {
                        return Some(Difference {
                            place,
                            golden: value.to_string(),
                            written: "nothing".to_owned(),
                        });
                    }
                }
            }
            written.into_iter().next().map(|(key, value)| Difference {
                place: format!("{place}/{key}"),
                golden: "nothing".to_owned(),
                written: value.to_string(),
            })
        }
        (Value::Array(golden), Value::Array(written)) if golden.len() == written.len() => {
            let pairs = golden.into_iter().zip(written).enumerate();
            pairs.into_iter().find_map(|(at, (golden, written))| {
                first_difference(&format!("{place}/{at}"), golden, written)
            })
        }
        (golden, written) => (golden != written).then(|| Difference {
            place: place.to_owned(),
            golden: golden.to_string(),
            written: written.to_string(),
        }),
    }
}

/// The key that [`with_unknown_fields`] adds.
pub const UNKNOWN_FIELD: &str = "of_a_newer_build";

/// A record as a newer build might write it: every structure in it has one more field. `maps` are the keys under which
/// there are maps, whose keys are data. What serde writes for a variant or a duration is left as it is.
pub fn with_unknown_fields(record: Value, maps: &[&str]) -> Value {
    match record {
        Value::Object(fields) => {
            let is_variant = fields.len() == 1
                && fields.keys().all(|key| key.starts_with(|c: char| c.is_ascii_uppercase()));
            let is_duration =
                fields.len() == 2 && fields.contains_key("secs") && fields.contains_key("nanos");
            let mut grown: serde_json::Map<String, Value> = fields
                .into_iter()
                .map(|(key, value)| {
                    let value =
                        if maps.contains(&key.as_str()) { value } else { with_unknown_fields(value, maps) };
                    (key, value)
                })
                .collect();
            if !is_variant && !is_duration {
                grown.insert(UNKNOWN_FIELD.to_owned(), serde_json::json!({ "x": [1] }));
            }
            Value::Object(grown)
        }
        Value::Array(items) => {
            Value::Array(items.into_iter().map(|item| with_unknown_fields(item, maps)).collect())
        }
        other => other,
    }
}

/// Bytes as hexadecimal digits, 32 of them a line.
pub fn hex(bytes: &[u8]) -> String {
    let line = |line: &[u8]| line.iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n";
    bytes.chunks(32).map(line).collect()
}

/// The bytes of hexadecimal digits; white space between them means nothing.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

/// Octets of a row of [`sparse`].
const ROW: usize = 64;

/// Bytes of which most are the same: their number, then the rows that are not zero, each with the place where it begins and
/// with how often it follows itself there.
pub fn sparse(bytes: &[u8]) -> String {
    let rows: Vec<&[u8]> = bytes.chunks(ROW).collect();
    let mut text = format!("{}\n", bytes.len());
    let mut at = 0;
    for run in rows.chunk_by(|a, b| a == b) {
        if run[0].iter().any(|byte| *byte != 0) {
            let digits: String = run[0].iter().map(|byte| format!("{byte:02x}")).collect();
            text.push_str(&format!("{at} {} {digits}\n", run.len()));
        }
        at += run.len() * ROW;
    }
    text
}

/// The bytes of such a text.
pub fn unsparse(text: &str) -> Option<Vec<u8>> {
    let mut lines = text.lines();
    let mut bytes = vec![0; lines.next()?.parse().ok()?];
    for line in lines {
        let mut words = line.split(' ');
        let (at, count): (usize, usize) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let run = unhex(words.next()?)?.repeat(count);
        bytes.get_mut(at..at.checked_add(run.len())?)?.copy_from_slice(&run);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn goldens(write: Option<u32>) -> (tempfile::TempDir, Goldens) {
        let dir = tempfile::tempdir().unwrap();
        let goldens = Goldens { dir: dir.path().to_owned(), write };
        (dir, goldens)
    }

    fn message(work: impl FnOnce() + std::panic::UnwindSafe) -> String {
        *std::panic::catch_unwind(work).unwrap_err().downcast::<String>().unwrap()
    }

    #[test]
    fn a_changed_format_fails_with_the_place_and_with_what_to_do() {
        let (_dir, mut goldens) = goldens(Some(1));
        goldens.check_json("box.json", br#"{"id":"x","sizes":[1,{"mib":2}]}"#);
        goldens.write = None;
        goldens.check_json("box.json", br#"{"sizes":[1,{"mib":2}],"id":"x"}"#);
        for (written, place) in [
            (
                &br#"{"id":"x","sizes":[1,{"mib":3}]}"#[..],
                "first at /sizes/1/mib\n  golden file: 2\n  this build:  3",
            ),
            (br#"{"id":"x"}"#, "first at /sizes\n  golden file: [1,{\"mib\":2}]\n  this build:  nothing"),
            (
                br#"{"id":"x","new":1,"sizes":[1,{"mib":2}]}"#,
                "first at /new\n  golden file: nothing\n  this build:  1",
            ),
        ] {
            let goldens = goldens.clone();
            let message = message(move || goldens.check_json("box.json", written));
            assert!(message.contains(place) && message.contains("docs/versioning.md"), "{message}");
        }
    }

    #[test]
    fn a_new_form_is_written_beside_the_old_one_and_both_are_read() {
        let (_dir, mut goldens) = goldens(Some(1));
        goldens.check_hex("bytes.hex", &[0xa3, 5]);
        goldens.write = Some(2);
        goldens.check_hex("bytes.hex", &[0xa3, 5]);
        assert_eq!(goldens.ages("bytes.hex").len(), 1, "what is the same is not written again");
        goldens.check_hex("bytes.hex", &[0xa3, 6]);
        let ages = goldens.ages("bytes.hex").into_iter().map(|golden| (golden.age, golden.unhex()));
        assert_eq!(ages.collect::<Vec<_>>(), [(1, vec![0xa3, 5]), (2, vec![0xa3, 6])]);
        goldens.write = Some(1);
        let older = goldens.clone();
        assert!(message(move || older.check_hex("bytes.hex", &[0])).contains("is newer than v1"));
        goldens.are_all_known(&["bytes.hex"]);
        assert!(message(move || goldens.are_all_known(&[])).contains("no test reads"));
    }

    #[test]
    fn unknown_fields_are_added_where_fields_are_and_nowhere_else() {
        let record =
            json!({"labels": {"a": "b"}, "took": {"secs": 1, "nanos": 0}, "phase": {"Exited": {"code": 1}}});
        let grown = with_unknown_fields(record, &["labels"]);
        let unknown = json!({ "x": [1] });
        assert_eq!(
            grown,
            json!({"labels": {"a": "b"}, "took": {"secs": 1, "nanos": 0},
                "phase": {"Exited": {"code": 1, UNKNOWN_FIELD: unknown}}, UNKNOWN_FIELD: unknown})
        );
    }

    #[test]
    fn bytes_that_are_mostly_zero_are_read_back() {
        let mut bytes = vec![0; 1000];
        (bytes[70], bytes[999]) = (1, 255);
        bytes[200..700].fill(255);
        assert_eq!(sparse(&bytes).lines().count(), 6);
        assert_eq!(unsparse(&sparse(&bytes)), Some(bytes));
        assert_eq!(unsparse("4\n3 1 0102\n"), None);
    }

    #[test]
    fn hexadecimal_digits_are_read_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(unhex(&hex(&bytes)), Some(bytes));
        assert_eq!(unhex("abc"), None);
        assert_eq!(unhex("zz"), None);
    }
}
