//! What no pull can beat here: downloading the same blobs and inflating or hashing them to nothing.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use a3s_box_e2e::image::Image;
use a3s_box_image::digest::{Algorithm, Hasher};
use anyhow::{Context, Result, bail};
use flate2::bufread::GzDecoder;

const LIMIT: Duration = Duration::from_secs(30);

/// What happens to the bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Work {
    Inflate,
    Hash,
}

/// Time for all layers, on as many threads as there are processors.
pub(crate) fn measure(host: &str, repository: &str, image: &Image, work: Work) -> Result<Duration> {
    // The last blob is the configuration.
    let layers = &image.blobs[..image.blobs.len().saturating_sub(1)];
    let next = AtomicUsize::new(0);
    let start = Instant::now();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..thread::available_parallelism()?.get())
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while let Some(blob) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                        read(host, repository, &blob.digest, work).context(blob.digest.clone())?;
                    }
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a thread of the floor panicked"))??;
        }
        Ok(start.elapsed())
    })
}

fn read(host: &str, repository: &str, digest: &str, work: Work) -> Result<()> {
    let mut stream = TcpStream::connect(host).with_context(|| format!("connecting to {host}"))?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(
        stream,
        "GET /v2/{repository}/blobs/{digest} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut body = BufReader::with_capacity(256 * 1024, stream);
    let mut line = String::new();
    body.read_line(&mut line)?;
    if line.split(' ').nth(1) != Some("200") {
        bail!("the registry answered {line:?}");
    }
    while line != "\r\n" {
        line.clear();
        if body.read_line(&mut line)? == 0 {
            bail!("the answer ends in its headers");
        }
    }
    match work {
        Work::Inflate => io::copy(&mut GzDecoder::new(body), &mut io::sink()).map(drop)?,
        Work::Hash => {
            let (mut hash, mut buffer) = (Hasher::new(Algorithm::Sha256), vec![0; 256 * 1024]);
            loop {
                let count = body.read(&mut buffer)?;
                if count == 0 {
                    break;
                }
                hash.update(&buffer[..count]);
            }
            let found = hash.finish().to_string();
            if digest != found {
                bail!("the bytes have the digest {found}");
            }
        }
    }
    Ok(())
}
