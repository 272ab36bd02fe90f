//! From a started host to what the CRI services must know of it.

use std::collections::BTreeMap;

use a3s_box_cri::convert::resources::SizePolicy;
use a3s_box_cri::{CgroupDriver, Condition, CriSettings};
use a3s_box_host::{Config, Host, config};
use a3s_box_streaming::{ServerConfig, TlsFiles};
use serde_json::json;

/// The settings of the services.
pub(crate) fn settings(host: &Host) -> CriSettings {
    let config = &host.config;
    CriSettings {
        runtime_version: env!("CARGO_PKG_VERSION").to_owned(),
        runtime_handlers: config.runtime_handlers.clone(),
        cgroup_driver: match config.cgroup.driver {
            config::CgroupDriver::Systemd => CgroupDriver::Systemd,
            config::CgroupDriver::Cgroupfs => CgroupDriver::Cgroupfs,
        },
        size: SizePolicy { default: config.size, max_vcpus: node_cpus(), ..SizePolicy::default() },
        cluster_cidrs: config.network.cluster_cidrs.clone(),
        // A host that could not start boxes would not have come up.
        runtime_condition: Condition::met(),
        scratch_dir: config.root.join("boxes"),
        info: info(host),
    }
}

/// Where clients of exec, attach and port-forward come in.
pub(crate) fn streaming(config: &Config) -> anyhow::Result<ServerConfig> {
    let config::StreamingConfig { address, idle_timeout, creation_timeout, tls_certificate, tls_key } =
        config.streaming.clone();
    let tls = match (tls_certificate, tls_key) {
        (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
        (None, None) => None,
        (Some(_), None) | (None, Some(_)) => {
            anyhow::bail!("streaming.tls_certificate and streaming.tls_key go together: set both or neither")
        }
    };
    Ok(ServerConfig { tls, address, idle_timeout, creation_timeout })
}

fn node_cpus() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(cpus).unwrap_or(u8::MAX)
}

fn info(host: &Host) -> BTreeMap<String, String> {
    let hypervisor = json!({ "backend": host.choice.name(), "reason": host.choice.reason });
    BTreeMap::from([
        ("config".to_owned(), config_as_json(&host.config)),
        ("hypervisor".to_owned(), hypervisor.to_string()),
    ])
}

/// The effective configuration, section by section.
fn config_as_json(config: &Config) -> String {
    match config.render().parse::<toml::Table>() {
        Ok(table) => json!(table).to_string(),
        Err(error) => json!({ "error": error.to_string() }).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_shown_as_nested_json() {
        let shown: serde_json::Value = serde_json::from_str(&config_as_json(&Config::default())).unwrap();
        assert_eq!(shown["vmm"]["backend"], "auto");
        assert!(shown.get("error").is_none(), "{shown}");
    }
}
