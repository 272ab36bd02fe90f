//! What everybody who uses the local network shares: a directory that means nothing after a reboot, which ends all that
//! it speaks of.
//!
//! ```text
//! <state_dir>/boot           the boot of the host that all of this is of
//! <state_dir>/lock           held by whoever changes the bridge, the firewall or anything here
//! <state_dir>/network.json   what the bridge is; there before the bridge is, gone after it is
//! <state_dir>/last           the host number that was given away last
//! <state_dir>/leases/<ipv4>  whose that address is, and which ports of the host lead to it
//! ```
//!
//! The daemon and every `a3s-box run` have records of their own, but one bridge. A lease is there before
//! anything is made for it, and the firewall is made from the leases.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use a3s_box_core::BoxId;
use a3s_box_core::spec::PortMapping;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ports::Published;
use super::{LocalError, Subnet};

/// Longer than many set-ups that queue for the lock, and than one `nft` that hangs.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// What the bridge is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Network {
    pub(super) bridge: String,
    pub(super) subnet: Subnet,
    /// `None`: not wanted, or the host has no IPv6.
    pub(super) subnet6: Option<Subnet>,
}

/// An address and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    pub(super) box_id: BoxId,
    /// Namespace and name, for people.
    pub(super) pod: String,
    pub(super) v4: IpAddr,
    pub(super) v6: Option<IpAddr>,
    pub(super) ports: Vec<PortMapping>,
}

impl Lease {
    /// The ports of the host that lead to the box.
    pub(super) fn published(&self) -> Result<Vec<Published>, LocalError> {
        self.ports.iter().filter_map(|port| Published::read(port).transpose()).collect()
    }
}

/// The right to change things; it ends with its last copy, which `nft` may have.
#[derive(Debug)]
pub(super) struct Lock(File);

impl Lock {
    /// A copy to be inherited.
    pub(super) fn share(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

/// The shared directory.
#[derive(Debug, Clone)]
pub(super) struct State {
    dir: PathBuf,
}

impl State {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Whether anybody has used it since the host was booted.
    pub(super) fn exists(&self) -> bool {
        self.dir.exists()
    }

    /// Waits until nobody else is at work.
    pub(super) fn lock(&self) -> Result<Lock, LocalError> {
        let leases = self.leases_dir();
        let make = DirBuilder::new().recursive(true).mode(0o700).create(&leases);
        make.map_err(|e| io_error(&leases, "make the directory", e))?;
        let path = self.dir.join("lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| io_error(&path, "open it", e))?;
        let deadline = Instant::now() + LOCK_LIMIT;
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => return Err(LocalError::Busy { path, limit: LOCK_LIMIT }),
                Err(TryLockError::Error(e)) => return Err(io_error(&path, "lock it", e)),
            }
        }
        for dir in [&self.dir, &leases] {
            sweep(dir)?;
        }
        self.forget_other_boots()?;
        Ok(Lock(file))
    }

    /// The directory should be on a file system in memory. Where it is not, what it says ended with that boot all the same.
    fn forget_other_boots(&self) -> Result<(), LocalError> {
        if self.is_of_this_boot() {
            return Ok(());
        }
        let dir = self.leases_dir();
        for entry in fs::read_dir(&dir).map_err(|e| io_error(&dir, "list the directory", e))? {
            remove(&entry.map_err(|e| io_error(&dir, "list the directory", e))?.path())?;
        }
        remove(&self.network_path())?;
        // Last: what is left of an interrupted forgetting is forgotten by the next one.
        store(&self.boot_path(), boot().as_bytes())
    }

    fn is_of_this_boot(&self) -> bool {
        fs::read_to_string(self.boot_path()).is_ok_and(|noted| noted == boot())
    }

    /// What the bridge is, if it has been begun.
    pub(super) fn network(&self) -> Result<Option<Network>, LocalError> {
        if self.is_of_this_boot() { read(&self.network_path()) } else { Ok(None) }
    }

    /// Before the bridge is made.
    pub(super) fn begin(&self, network: &Network, _: &Lock) -> Result<(), LocalError> {
        store(&self.network_path(), &json(network))
    }

    /// After the bridge is gone.
    pub(super) fn end(&self, _: &Lock) -> Result<(), LocalError> {
        remove(&self.network_path())
    }

    /// All leases, in the order of addresses.
    pub(super) fn leases(&self) -> Result<Vec<Lease>, LocalError> {
        let dir = self.leases_dir();
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|e| io_error(&dir, "list the directory", e))?,
        };
        let mut leases: Vec<Lease> = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| io_error(&dir, "list the directory", e))?.path();
            if path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.parse::<IpAddr>().is_ok()) {
                leases.extend(read(&path)?);
            }
        }
        leases.sort_by_key(|lease| lease.v4);
        Ok(leases)
    }

    /// Gives the box the next address that is free.
    pub(super) fn allocate(
        &self,
        network: &Network,
        leases: &[Lease],
        holder: Holder,
        _: &Lock,
    ) -> Result<Lease, LocalError> {
        let taken = leases.iter().filter_map(|lease| network.subnet.number(lease.v4)).collect();
        let last = fs::read_to_string(self.last_path()).ok().and_then(|text| text.trim().parse().ok());
        let number = next_free(network.subnet, &taken, last.unwrap_or(0))
            .ok_or(LocalError::Exhausted { subnet: network.subnet, boxes: leases.len() })?;
        let Holder { box_id, pod, ports } = holder;
        let v4 = network.subnet.host(number).ip;
        let v6 = network.subnet6.map(|subnet| subnet.host(number).ip);
        let lease = Lease { box_id, pod, v4, v6, ports };
        claim(&self.lease_path(v4), &json(&lease))?;
        store(&self.last_path(), number.to_string().as_bytes())?;
        Ok(lease)
    }

    /// Takes an address back.
    pub(super) fn release(&self, lease: &Lease, _: &Lock) -> Result<(), LocalError> {
        remove(&self.lease_path(lease.v4))
    }

    fn network_path(&self) -> PathBuf {
        self.dir.join("network.json")
    }

    fn boot_path(&self) -> PathBuf {
        self.dir.join("boot")
    }

    fn last_path(&self) -> PathBuf {
        self.dir.join("last")
    }

    fn leases_dir(&self) -> PathBuf {
        self.dir.join("leases")
    }

    fn lease_path(&self, ip: IpAddr) -> PathBuf {
        self.leases_dir().join(ip.to_string())
    }
}

/// Another text after every boot of the host: random(4).
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Who wants an address.
#[derive(Debug, Clone)]
pub(super) struct Holder {
    pub(super) box_id: BoxId,
    pub(super) pod: String,
    pub(super) ports: Vec<PortMapping>,
}

/// The first free number after the last one given, round and round: who has just left may still be talked to.
fn next_free(subnet: Subnet, taken: &BTreeSet<u32>, last: u32) -> Option<u32> {
    let numbers = subnet.numbers();
    let (first, end) = (*numbers.start(), *numbers.end());
    let from = if (first..end).contains(&last) { last + 1 } else { first };
    (from..=end).chain(first..from).find(|number| !taken.contains(number))
}

fn json(value: &impl Serialize) -> Vec<u8> {
    // Maps with keys that are no text, the only thing that JSON cannot say, are not among the types here.
    serde_json::to_vec(value).unwrap_or_default()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, LocalError> {
    let bytes = match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(|e| io_error(path, "read it", e))?,
    };
    let unreadable = |source| LocalError::Unreadable { path: path.to_owned(), source };
    serde_json::from_slice(&bytes).map(Some).map_err(unreadable)
}

const UNFINISHED: &str = "new";

/// Removes what somebody who was killed has not finished writing. Only with the lock: others may be writing.
fn sweep(dir: &Path) -> Result<(), LocalError> {
    for entry in fs::read_dir(dir).map_err(|e| io_error(dir, "list the directory", e))? {
        let path = entry.map_err(|e| io_error(dir, "list the directory", e))?.path();
        if path.extension().is_some_and(|extension| extension == UNFINISHED) {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Puts a whole file beside `path`; `place` makes it appear there.
fn write_new(path: &Path, bytes: &[u8], place: fn(&Path, &Path) -> io::Result<()>) -> Result<(), LocalError> {
    let new = path.with_added_extension(UNFINISHED);
    let written = File::create_new(&new).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        place(&new, path)?;
        path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    });
    written.map_err(|e| io_error(path, "write it", e))
}

fn store(path: &Path, bytes: &[u8]) -> Result<(), LocalError> {
    write_new(path, bytes, |new, path| fs::rename(new, path))
}

/// As `O_EXCL`, but the file is never seen half-written: of two that want one name, lock or not, one fails.
fn claim(path: &Path, bytes: &[u8]) -> Result<(), LocalError> {
    write_new(path, bytes, |new, path| {
        fs::hard_link(new, path)?;
        fs::remove_file(new)
    })
}

fn remove(path: &Path) -> Result<(), LocalError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(path, "remove it", e)),
        _ => Ok(()),
    }
}

fn io_error(path: &Path, step: &'static str, source: io::Error) -> LocalError {
    LocalError::Io { path: path.to_owned(), step, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        Network {
            bridge: "br".into(),
            subnet: "10.9.8.0/28".parse().unwrap(),
            subnet6: Some("fd00:9::/64".parse().unwrap()),
        }
    }

    fn holder(n: u8) -> Holder {
        Holder { box_id: BoxId::from_random([n; 32]), pod: format!("default/{n}"), ports: Vec::new() }
    }

    fn allocate(state: &State, n: u8) -> Result<Lease, LocalError> {
        let lock = state.lock().unwrap();
        state.allocate(&network(), &state.leases().unwrap(), holder(n), &lock)
    }

    #[test]
    fn addresses_go_round_and_a_freed_one_waits_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().join("net"));
        let first = allocate(&state, 1).unwrap();
        assert_eq!((first.v4.to_string(), first.v6), ("10.9.8.2".into(), "fd00:9::2".parse().ok()));
        state.release(&first, &state.lock().unwrap()).unwrap();
        // A process that knows nothing of the first one's.
        let state = State::new(dir.path().join("net"));
        let rest: Vec<_> = (2..=13).map(|n| allocate(&state, n).unwrap().v4.to_string()).collect();
        assert_eq!(rest, (3..=14).map(|n| format!("10.9.8.{n}")).collect::<Vec<_>>());
        assert_eq!(allocate(&state, 14).unwrap().v4, first.v4, "round");
        let full = allocate(&state, 15).unwrap_err();
        assert!(matches!(full, LocalError::Exhausted { boxes: 13, .. }), "{full}");
        let lease = state.leases().unwrap().remove(4);
        state.release(&lease, &state.lock().unwrap()).unwrap();
        assert_eq!(allocate(&state, 15).unwrap().v4, lease.v4);
    }

    #[test]
    fn what_a_crash_left_half_written_is_no_lease_and_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().to_owned());
        drop(state.lock().unwrap());
        let torn = dir.path().join("leases/10.9.8.2.new");
        fs::write(&torn, "{\"box_id\":").unwrap();
        fs::write(dir.path().join("last"), "nonsense").unwrap();
        assert_eq!(state.leases().unwrap(), []);
        let lease = allocate(&state, 1).unwrap();
        assert_eq!(state.leases().unwrap(), [lease]);
        assert!(!torn.exists());
    }

    #[test]
    fn what_another_boot_of_the_host_left_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().to_owned());
        let lease = allocate(&state, 1).unwrap();
        state.begin(&network(), &state.lock().unwrap()).unwrap();
        assert_eq!(state.network().unwrap(), Some(network()));
        assert_eq!(state.leases().unwrap(), [lease]);
        fs::write(dir.path().join("boot"), "another").unwrap();
        assert_eq!(state.network().unwrap(), None, "seen without the lock too");
        drop(state.lock().unwrap());
        assert_eq!((state.network().unwrap(), state.leases().unwrap()), (None, Vec::new()));
        assert!(!dir.path().join("network.json").exists());
    }

    #[test]
    fn one_address_has_one_owner_even_without_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("10.9.8.2");
        claim(&path, b"first").unwrap();
        assert!(matches!(claim(&path, b"second"), Err(LocalError::Io { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn many_at_once_get_an_address_each() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().to_owned());
        let threads: Vec<_> = (1..=13)
            .map(|n| {
                let state = state.clone();
                std::thread::spawn(move || allocate(&state, n).unwrap().v4)
            })
            .collect();
        let addresses: BTreeSet<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(addresses.len(), 13);
    }
}

#[cfg(test)]
mod golden;
