//! `pull`, `images` and `rmi` on the store of `run`.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use indicatif::{HumanBytes, HumanDuration};

use a3s_box_host::Config;
use a3s_box_image::{ImageRecord, Verified};

use crate::cli::{ImagesArgs, ImagesCommand, LoginArgs, PullArgs, RmiArgs, VerifyArgs};
use crate::credentials::Login;
use crate::progress::Show;
use crate::standalone::Standalone;
use crate::tell;
use crate::tell::note;

pub(crate) async fn pull(config: Config, args: PullArgs) -> anyhow::Result<u8> {
    let login = Login::new(&args.login)?;
    let store = Standalone::open(&config, &args.registry.plain_http).await?;
    let show = if args.quiet { Show::Quiet } else { Show::Progress };
    let record = store.pull(&args.image, show, &login).await?;
    // This process ends without waiting for what runs beside.
    store.images.settle().await;
    if args.quiet {
        tell::out(format_args!("{}\n", record.id));
    } else {
        tell::out(format_args!("{} {} ({})\n", record.display_name(), record.id, HumanBytes(record.size)));
    }
    Ok(0)
}

pub(crate) async fn list(config: Config, args: ImagesArgs) -> anyhow::Result<u8> {
    if let Some(ImagesCommand::Verify(args)) = args.command {
        return verify(config, args).await;
    }
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

/// Fails if something is damaged at the end.
async fn verify(config: Config, args: VerifyArgs) -> anyhow::Result<u8> {
    let plain_http = &args.registry.plain_http;
    let store = match args.daemon {
        true => Standalone::open_daemons(&config, plain_http).await?,
        false => Standalone::open(&config, plain_http).await?,
    };
    let mut verified = store.images.verify().await?;
    tell::out(findings(&verified, &store.images.list()));
    if args.repair && !verified.damaged.is_empty() {
        // One password is not for all registries: what docker keeps is by registry.
        let login = Login::new(&LoginArgs { authfile: args.authfile, ..LoginArgs::default() })?;
        let mut credentials = HashMap::new();
        for name in store.images.needing_repair(&verified).iter().flat_map(|record| &record.repo_digests) {
            // One registry without credentials does not keep the others from being asked.
            match login.for_image(name).await {
                Ok(Some(auth)) => drop(credentials.insert(name.clone(), auth)),
                Ok(None) => {}
                Err(error) => note!("no credentials for {name}: {error:#}"),
            }
        }
        for (record, error) in store.images.repair(&verified, &credentials).await? {
            note!("could not repair the image {}: {error}", record.display_name());
        }
        verified = store.images.verify().await?;
        tell::out(format_args!("after the repair: {}", findings(&verified, &store.images.list())));
    }
    Ok(u8::from(!verified.damaged.is_empty()))
}

fn findings(verified: &Verified, records: &[ImageRecord]) -> String {
    let Verified { good, bytes, unmeasured, damaged } = verified;
    let mut text = format!(
        "{} read: {good} files good, {} damaged, {} not measured yet\n",
        HumanBytes(*bytes),
        damaged.len(),
        unmeasured.len()
    );
    for file in unmeasured {
        text.push_str(&format!("not measured yet (it is now, for the next time): {file}\n"));
    }
    for damage in damaged {
        let needed = records.iter().filter(|record| damage.images.contains(&record.id));
        let names: Vec<_> = needed.map(ImageRecord::display_name).collect();
        let by = if names.is_empty() { "no image".to_owned() } else { names.join(", ") };
        text.push_str(&format!("damaged: {}: {}; needed by {by}\n", damage.file, damage.problem));
    }
    text
}

/// What an image is shown as: by each of its tags, or else by the best of its other names.
fn names(record: &ImageRecord) -> Vec<&str> {
    match record.repo_tags.is_empty() {
        true => vec![record.display_name()],
        false => record.repo_tags.iter().map(String::as_str).collect(),
    }
}

/// A row for each name.
fn table(records: &[ImageRecord], now: SystemTime) -> String {
    let mut shown: Vec<_> =
        records.iter().flat_map(|record| names(record).into_iter().map(move |name| (name, record))).collect();
    shown.sort_by_key(|(name, _)| *name);
    let rows: Vec<[String; 4]> = shown
        .into_iter()
        .map(|(name, record)| {
            let pulled = SystemTime::UNIX_EPOCH + Duration::from_secs(record.pulled_at);
            let age = now.duration_since(pulled).unwrap_or_default();
            [
                name.to_owned(),
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
    use a3s_box_image::{Damage, Problem};

    use super::*;

    #[test]
    fn findings_name_the_file_the_problem_and_what_is_not_known() {
        let damage = Damage {
            file: "erofs/00.erofs".to_owned(),
            problem: Problem::Missing,
            images: Default::default(),
        };
        let verified = Verified {
            good: 2,
            bytes: 1 << 20,
            unmeasured: vec!["erofs/01.erofs".to_owned()],
            damaged: vec![damage],
        };
        assert_eq!(
            findings(&verified, &[]),
            "1.00 MiB read: 2 files good, 1 damaged, 1 not measured yet\n\
             not measured yet (it is now, for the next time): erofs/01.erofs\n\
             damaged: erofs/00.erofs: it is missing; needed by no image\n"
        );
    }

    #[test]
    fn the_table_lines_up_and_shows_every_tag() {
        let record = ImageRecord {
            id: format!("sha256:{}", "ab".repeat(32)),
            repo_tags: ["docker.io/library/busybox:1", "team.example/own:2"].map(str::to_owned).to_vec(),
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
             docker.io/library/busybox:1  abababababab  3.00 MiB  2 hours ago\n\
             team.example/own:2           abababababab  3.00 MiB  2 hours ago\n"
        );
    }
}
