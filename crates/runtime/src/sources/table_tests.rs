use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn key(inode: u64) -> SourceKey {
    SourceKey { device: 8, inode, readonly_on_host: false, users: None, tree: Tree::Single }
}

fn session(number: u8) -> SessionId {
    SessionId::from_random([number; 32])
}

fn source(name: &str, key: SourceKey, location: &str) -> Source {
    Source::new(name.to_owned(), key, "/host".into(), Some(location.into()))
}

fn held(name: &str, key: SourceKey, location: &str) -> Sources {
    let mut sources = Sources::default();
    sources.add(source(name, key, location));
    sources.hold(name, &session(1), Access::Writable);
    sources
}

#[test]
fn the_host_refuses_writes_until_the_first_writer_comes_and_again_when_the_last_has_gone() {
    let mut sources = Sources::default();
    sources.add(source("v", key(1), "/v"));
    sources.hold("v", &session(1), Access::ReadOnly);
    assert_eq!(sources.due("v"), Some(Due::Attach(Access::ReadOnly)));
    sources.is_attached("v", Access::ReadOnly);
    assert_eq!(sources.due("v"), None);
    for access in [Access::Writable, Access::ReadOnly] {
        sources.hold("v", &session(2), access);
    }
    assert_eq!(sources.due("v"), Some(Due::Open), "one of its mounts may be written");
    sources.is_attached("v", Access::Writable);
    assert!(sources.release(&session(2)));
    assert_eq!(sources.due_after_release(), [("v".to_owned(), Due::Close)]);
    sources.is_attached("v", Access::ReadOnly);
    assert!(sources.release(&session(1)) && !sources.release(&session(1)));
    assert_eq!(sources.due_after_release(), [("v".to_owned(), Due::Detach)]);
}

#[test]
fn what_the_host_has_read_only_is_never_opened() {
    let fixed = SourceKey { readonly_on_host: true, ..key(1) };
    let mut sources = held("v", fixed, "/v");
    assert_eq!(sources.due("v"), Some(Due::Attach(Access::ReadOnly)));
    sources.is_attached("v", Access::ReadOnly);
    assert_eq!(sources.due("v"), None);
}

#[test]
fn a_source_is_known_by_its_whole_key() {
    let sources = held("v", key(1), "/v");
    assert_eq!(sources.whole(&key(1)).unwrap().name, "v");
    let users = a3s_box_core::spec::IdRange { start: 7, count: 9 };
    let users = Some(UserNamespace { uids: users, gids: users });
    let several = Tree::Several { mount: 3, readonly: false, recursive_readonly: false, propagate: true };
    for other in [
        key(2),
        SourceKey { device: 9, ..key(1) },
        SourceKey { readonly_on_host: true, ..key(1) },
        SourceKey { users, ..key(1) },
        SourceKey { tree: several, ..key(1) },
    ] {
        assert!(sources.whole(&other).is_none(), "{other:?}");
        assert!(other.inode == 2 || sources.around(&other, Path::new("/v/part")).is_empty(), "{other:?}");
    }
}

#[test]
fn a_part_is_looked_for_in_the_nearest_source_around_it_and_a_whole_in_none_of_its_parts() {
    let mut sources = held("outer", key(1), "/srv");
    for (name, inode, location) in [("inner", 2, "/srv/a"), ("beside", 3, "/srv/ab"), ("idle", 4, "/srv/a/b")]
    {
        sources.add(source(name, key(inode), location));
    }
    for name in ["inner", "beside"] {
        sources.hold(name, &session(1), Access::ReadOnly);
    }
    let around = |location: &str| -> Vec<(String, PathBuf)> {
        let found = sources.around(&key(9), Path::new(location)).into_iter();
        found.map(|(source, inside)| (source.name.clone(), inside)).collect()
    };
    assert_eq!(
        around("/srv/a/b/c"),
        [("inner".to_owned(), "b/c".into()), ("outer".to_owned(), "a/b/c".into())]
    );
    assert_eq!(around("/srv"), []);
    assert_eq!(around("/"), []);
}

/// Guards: a volume of the daemon before was taken for attached although that one had died before it did so, and one that
/// nobody holds any more was given to a new container.
#[test]
fn after_a_restart_everything_is_seen_to_again_and_what_is_on_its_way_out_is_not_used() {
    let mut sources = held("v", key(1), "/v");
    sources.is_attached("v", Access::Writable);
    let mut sources: Sources = serde_json::from_slice(&serde_json::to_vec(&sources).unwrap()).unwrap();
    assert_eq!(sources.due("v"), Some(Due::Attach(Access::Writable)));
    assert_eq!(sources.due_after_release(), [], "whoever still has it keeps it");
    assert!(sources.keep_holders(|id| *id != session(1)));
    assert!(!sources.keep_holders(|_| false), "nobody is left");
    assert!(sources.whole(&key(1)).is_none());
    assert_eq!(sources.due_after_release(), [("v".to_owned(), Due::Detach)]);
}

/// One thing that happens to a box.
#[derive(Debug, Clone)]
enum Step {
    /// A session shows a source.
    Show { session: u8, inode: u64, access: Access },
    /// A session is removed.
    Remove { session: u8 },
    /// Another daemon takes over.
    Restart,
    /// The host refuses the next detach.
    Stuck,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let access = prop_oneof![Just(Access::ReadOnly), Just(Access::Writable)];
    let step = prop_oneof![
        4 => (0..4_u8, 0..3_u64, access).prop_map(|(session, inode, access)| Step::Show { session, inode, access }),
        3 => (0..4_u8).prop_map(|session| Step::Remove { session }),
        1 => Just(Step::Restart),
        1 => Just(Step::Stuck),
    ];
    prop::collection::vec(step, 0..60)
}

/// The host's side: what is attached, and whether writes pass.
#[derive(Default)]
struct Host {
    attached: BTreeMap<String, Access>,
    stuck: bool,
}

impl Host {
    fn perform(&mut self, sources: &mut Sources, name: &str, due: Due) {
        match due {
            Due::Attach(access) => {
                self.attached.insert(name.to_owned(), access);
                sources.is_attached(name, access);
            }
            Due::Open => {
                assert_eq!(self.attached.insert(name.to_owned(), Access::Writable), Some(Access::ReadOnly));
                sources.is_attached(name, Access::Writable);
            }
            Due::Close => {
                assert!(self.attached.insert(name.to_owned(), Access::ReadOnly).is_some());
                sources.is_attached(name, Access::ReadOnly);
            }
            Due::Detach if std::mem::take(&mut self.stuck) => {}
            Due::Detach => {
                self.attached.remove(name);
                sources.is_detached(name);
            }
        }
    }
}

proptest! {
    /// Whatever the order in which sessions come and go: attached is exactly what is in use, each source once, writable
    /// wherever somebody may write; and at the end nothing is left.
    #[test]
    fn exactly_what_is_used_is_attached(steps in steps()) {
        let (mut sources, mut host) = (Sources::default(), Host::default());
        let mut model: BTreeMap<u8, BTreeMap<u64, Access>> = BTreeMap::new();
        let mut names = 0;
        for step in steps {
            match step {
                Step::Show { session: who, inode, access } => {
                    let known = sources.whole(&key(inode)).map(|source| source.name.clone());
                    let name = known.unwrap_or_else(|| {
                        names += 1;
                        let name = format!("{names}");
                        sources.add(source(&name, key(inode), "/v"));
                        name
                    });
                    sources.hold(&name, &session(who), access);
                    if let Some(due) = sources.due(&name) {
                        host.perform(&mut sources, &name, due);
                    }
                    let held = model.entry(who).or_default().entry(inode).or_insert(access);
                    *held = access.max(*held);
                }
                Step::Remove { session: who } => {
                    model.remove(&who);
                    sources.release(&session(who));
                    for (name, due) in sources.due_after_release() {
                        host.perform(&mut sources, &name, due);
                    }
                }
                Step::Restart => {
                    sources = serde_json::from_slice(&serde_json::to_vec(&sources).unwrap()).unwrap();
                }
                Step::Stuck => host.stuck = true,
            }
            let used: BTreeMap<u64, Access> = model.values().flatten().fold(BTreeMap::new(), |mut used, (inode, access)| {
                let most = used.entry(*inode).or_insert(*access);
                *most = (*access).max(*most);
                used
            });
            for (inode, access) in &used {
                let attached = &host.attached[&sources.whole(&key(*inode)).unwrap().name];
                prop_assert!(attached >= access, "inode {inode} is {attached:?} and must be {access:?}");
            }
            let whole: BTreeSet<_> =
                used.keys().map(|inode| sources.whole(&key(*inode)).unwrap().name.clone()).collect();
            let idle = host.attached.keys().filter(|name| !whole.contains(*name)).count();
            let owed = sources.0.iter().filter(|source| source.holders.is_empty()).count();
            prop_assert_eq!(idle, owed, "what is attached and unused is what could not be detached");
        }
        host.stuck = false;
        for who in 0..4 {
            sources.release(&session(who));
        }
        for (name, due) in sources.due_after_release() {
            host.perform(&mut sources, &name, due);
        }
        prop_assert!(host.attached.is_empty() && sources.0.is_empty());
    }
}
