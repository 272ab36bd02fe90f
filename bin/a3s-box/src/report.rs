//! `doctor`: the checks as a table or as JSON.

use std::io::IsTerminal;

use a3s_box_cri::client::Client;
use a3s_box_host::Config;
use a3s_box_host::doctor::{self, Check, Report, Verdict};

use crate::tell;

/// The exit code says whether pods can run: 0 or 1.
pub(crate) async fn doctor(config: Config, json: bool) -> anyhow::Result<u8> {
    let mut report = doctor::examine(&config).await;
    report.checks.extend(complaints(&config).await);
    if json {
        tell::out(format_args!("{}\n", serde_json::to_string_pretty(&report)?));
    } else {
        tell::out(render(&report, std::io::stdout().is_terminal()));
    }
    Ok(if report.pods_can_run { 0 } else { 1 })
}

/// What a running daemon complains of. Whether one runs is another check.
async fn complaints(config: &Config) -> Vec<Check> {
    let asked = async { Client::connect(&config.socket(), None).await?.complaints().await };
    let remedy = "see the daemon's log, and docs/troubleshooting.md";
    let complaints = asked.await.unwrap_or_default().into_iter();
    complaints.map(|(name, found)| Check::lacking(&name, Verdict::Warn, found, remedy)).collect()
}

fn render(report: &Report, colours: bool) -> String {
    let width = report.checks.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for check in &report.checks {
        let verdict = mark(check.verdict, colours);
        let found = shortened(&check.found);
        text.push_str(&format!("{verdict}  {:<width$}  {found}\n", check.name));
        if let Some(remedy) = &check.remedy {
            text.push_str(&format!("      {:<width$}  -> {remedy}\n", ""));
        }
    }
    text.push_str(if report.pods_can_run {
        "\nPods can run on this machine.\n"
    } else {
        "\nPods cannot run on this machine yet: see the lines marked FAIL.\n"
    });
    text
}

/// A guest's last words are long and `--json` has them whole.
fn shortened(found: &str) -> String {
    const LONGEST: usize = 200;
    match found.char_indices().nth(LONGEST) {
        Some((at, _)) => format!("{} …", found[..at].trim_end()),
        None => found.to_owned(),
    }
}

fn mark(verdict: Verdict, colours: bool) -> String {
    let (word, colour) = match verdict {
        Verdict::Ok => ("ok  ", "32"),
        Verdict::Warn => ("warn", "33"),
        Verdict::Fail => ("FAIL", "31"),
    };
    if colours { format!("\x1b[{colour}m{word}\x1b[0m") } else { word.to_owned() }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn every_lack_is_followed_by_its_remedy() {
        let report = Report {
            pods_can_run: false,
            checks: vec![
                Check::ok("memory", "9 GiB available"),
                Check::lacking("pod network", Verdict::Fail, "no configuration", "install one"),
            ],
        };
        assert_eq!(
            render(&report, false),
            "ok    memory       9 GiB available\n\
             FAIL  pod network  no configuration\n\
             \x20                  -> install one\n\
             \n\
             Pods cannot run on this machine yet: see the lines marked FAIL.\n"
        );
    }

    #[test]
    fn json_says_all_that_the_table_says() {
        let report = Report {
            pods_can_run: true,
            checks: vec![Check::lacking("daemon", Verdict::Warn, "silent", "start it")],
        };
        assert_eq!(
            serde_json::to_value(&report).unwrap(),
            serde_json::json!({
                "pods_can_run": true,
                "checks": [{"name": "daemon", "verdict": "warn", "found": "silent", "remedy": "start it"}],
            })
        );
    }
}
