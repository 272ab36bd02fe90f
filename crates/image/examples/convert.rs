//! How fast images become EROFS files, beside the floor: what inflating and hashing the same layers takes.
//!
//! ```sh
//! cargo run --profile quick -p a3s-box-image --example convert -- oci:DIR|REGISTRY/NAME [ROUNDS] [LAYERS AT ONCE]
//! ```
//!
//! The floor is only known for `oci:DIR`. Rates are megabytes of compressed layers per second.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use a3s_box_core::storage::{Change, Record, Storage, StorageError, Table};
use a3s_box_image::digest::{Algorithm, Hasher};
use a3s_box_image::{ImageStore, ImageStoreConfig};
use flate2::bufread::MultiGzDecoder;

/// Records that nobody needs afterwards.
#[derive(Default)]
struct Memory(Mutex<BTreeMap<(&'static str, String), Vec<u8>>>);

impl Storage for Memory {
    fn get(&self, table: Table, key: &str) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.0.lock().ok().and_then(|records| records.get(&(table.0, key.to_owned())).cloned()))
    }

    fn scan(&self, _: Table) -> Result<Vec<Record>, StorageError> {
        Ok(Vec::new())
    }

    fn commit(&self, changes: Vec<Change>) -> Result<(), StorageError> {
        let Ok(mut records) = self.0.lock() else { return Ok(()) };
        for change in changes {
            match change {
                Change::Put { table, key, value } => records.insert((table.0, key), value),
                Change::Delete { table, key } => records.remove(&(table.0, key)),
            };
        }
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let image = arguments.next().ok_or("name an image: oci:DIR or REGISTRY/NAME")?;
    let rounds: usize = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let parallel: Option<usize> = arguments.next().map(|text| text.parse()).transpose()?;
    let mut compressed = 0;
    if let Some(layout) = image.strip_prefix("oci:") {
        compressed = floor(Path::new(layout))?;
    }
    let idle = memory("VmRSS");
    for _ in 0..rounds {
        // Makes the peak start anew (proc(5)).
        fs::write("/proc/self/clear_refs", "5")?;
        let directory = tempfile::tempdir_in(".")?;
        let mut config = ImageStoreConfig::new(directory.path());
        config.max_parallel_layers = parallel.unwrap_or(config.max_parallel_layers);
        let store = ImageStore::open(config, Arc::new(Memory::default()))?;
        let (cpu, begun) = (cpu_time(), Instant::now());
        let record = store.pull(&image, None, None).await?;
        let (took, cpu) = (begun.elapsed(), cpu_time().saturating_sub(cpu));
        let peak = memory("VmHWM").saturating_sub(idle) / 1024;
        println!(
            "{:<24}{} {:>8.1} MB of EROFS, processor {} ms, {peak} MiB above idle",
            "pull",
            rate(compressed, took),
            record.size as f64 / 1e6,
            cpu.as_millis()
        );
        store.settle().await;
    }
    Ok(())
}

/// Each stage alone, one layer after the other on one thread.
fn floor(layout: &Path) -> Result<u64, Failure> {
    let mut blobs: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(layout.join("blobs/sha256"))? {
        let path = entry?.path();
        let mut head = [0; 2];
        if File::open(&path)?.read(&mut head)? == 2 && head == [0x1f, 0x8b] {
            blobs.push(path);
        }
    }
    let compressed = blobs.iter().map(|path| fs::metadata(path).map(|m| m.len())).sum::<io::Result<u64>>()?;
    let open = |path: &PathBuf| File::open(path).map(|file| BufReader::with_capacity(128 << 10, file));
    let stage = |name: &str, work: &dyn Fn(&PathBuf) -> io::Result<u64>| -> io::Result<()> {
        let begun = Instant::now();
        let bytes = blobs.iter().map(work).sum::<io::Result<u64>>()?;
        println!("{name:<24}{} {:>8.1} MB", rate(compressed, begun.elapsed()), bytes as f64 / 1e6);
        Ok(())
    };
    stage("read", &|path| io::copy(&mut open(path)?, &mut io::sink()))?;
    stage("sha256 of the blob", &|path| hash(open(path)?))?;
    stage("inflate", &|path| io::copy(&mut MultiGzDecoder::new(open(path)?), &mut io::sink()))?;
    stage("inflate, sha256", &|path| hash(MultiGzDecoder::new(open(path)?)))?;
    Ok(compressed)
}

fn hash(mut from: impl Read) -> io::Result<u64> {
    let (mut hasher, mut buffer, mut bytes) = (Hasher::new(Algorithm::Sha256), vec![0; 128 << 10], 0);
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            std::hint::black_box(hasher.finish());
            return Ok(bytes);
        }
        hasher.update(&buffer[..n]);
        bytes += n as u64;
    }
}

fn rate(bytes: u64, took: Duration) -> String {
    format!("{:>8.1} MB/s {:>6} ms", bytes as f64 / 1e6 / took.as_secs_f64(), took.as_millis())
}

/// A figure of this process in KiB.
fn memory(field: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// What this process used of the processors: user and system time, in ticks of 10 ms (proc(5)).
fn cpu_time() -> Duration {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> =
        text.rsplit(')').next().map(|rest| rest.split_whitespace().collect()).unwrap_or_default();
    let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    Duration::from_millis(ticks * 10)
}
