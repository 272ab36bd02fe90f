//! `pull`, `images` and `rmi` on the store of `run`.

use std::time::{Duration, SystemTime};

use indicatif::{HumanBytes, HumanDuration};

use a3s_box_host::Config;
use a3s_box_image::ImageRecord;

use crate::cli::{ImagesArgs, PullArgs, RmiArgs};
use crate::progress::Show;
use crate::standalone::Standalone;
use crate::tell;
use crate::tell::note;

pub(crate) async fn pull(config: Config, args: PullArgs) -> anyhow::Result<u8> {
    let store = Standalone::open(&config, &args.registry.plain_http).await?;
    let show = if args.quiet { Show::Quiet } else { Show::Progress };
    let record = store.pull(&args.image, show).await?;
    if args.quiet {
        tell::out(format_args!("{}\n", record.id));
    } else {
        tell::out(format_args!("{} {} ({})\n", record.display_name(), record.id, HumanBytes(record.size)));
    }
    Ok(0)
}

pub(crate) async fn list(config: Config, args: ImagesArgs) -> anyhow::Result<u8> {
    let store = Standalone::open(&config, &[]).await?;
    let mut records = store.images.list();
    records.sort_by(|a, b| a.display_name().cmp(b.display_name()));
    if args.quiet {
        records.iter().for_each(|record| tell::out(format_args!("{}\n", record.id)));
    } else {
        tell::out(table(&records, SystemTime::now()));
    }
    Ok(0)
}

/// Removes all it can and fails if one could not be.
pub(crate) async fn remove(config: Config, args: RmiArgs) -> anyhow::Result<u8> {
    let store = Standalone::open(&config, &[]).await?;
    let mut code = 0;
    for name in &args.images {
        match store.images.remove(name).await {
            Ok(Some(record)) => {
                tell::out(format_args!("removed {} {}\n", record.display_name(), short(&record.id)))
            }
            Ok(None) => {
                note!("the image {name} is not here");
                code = 1;
            }
            Err(error) => {
                note!("could not remove the image {name}: {error}");
                code = 1;
            }
        }
    }
    Ok(code)
}

fn table(records: &[ImageRecord], now: SystemTime) -> String {
    let rows: Vec<[String; 4]> = records
        .iter()
        .map(|record| {
            let pulled = SystemTime::UNIX_EPOCH + Duration::from_secs(record.pulled_at);
            let age = now.duration_since(pulled).unwrap_or_default();
            [
                record.display_name().to_owned(),
                short(&record.id).to_owned(),
                HumanBytes(record.size).to_string(),
                format!("{} ago", HumanDuration(age)),
            ]
        })
        .collect();
    let heads = ["IMAGE", "ID", "SIZE", "PULLED"].map(str::to_owned);
    let widths: [usize; 4] = std::array::from_fn(|column| {
        rows.iter().chain([&heads]).map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in [&heads].into_iter().chain(&rows) {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The first twelve digits of an image's id.
fn short(id: &str) -> &str {
    let hex = id.split_once(':').map_or(id, |(_, hex)| hex);
    hex.get(..12).unwrap_or(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up() {
        let record = ImageRecord {
            id: format!("sha256:{}", "ab".repeat(32)),
            repo_tags: vec!["docker.io/library/busybox:1".to_owned()],
            repo_digests: Vec::new(),
            other_names: Vec::new(),
            manifest_digest: String::new(),
            size: 3 << 20,
            config: Default::default(),
            layers: Vec::new(),
            platform: String::new(),
            created: String::new(),
            annotations: Default::default(),
            pinned: false,
            pulled_at: 1000,
        };
        assert_eq!(
            table(&[record], SystemTime::UNIX_EPOCH + Duration::from_secs(1000 + 7200)),
            "IMAGE                        ID            SIZE      PULLED\n\
             docker.io/library/busybox:1  abababababab  3.00 MiB  2 hours ago\n"
        );
    }
}
