//! Whether pods can be connected: CRI's NetworkReady.

use crate::cni::{Chain, ConfError, NetworkList, PluginError, conf, exec};
use crate::config::{Fallback, NetConfig, NetMode};
use crate::health::Health;
use crate::local;

/// Whether pods can be connected now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkStatus {
    /// They can.
    Ready {
        /// By what: a sentence for people.
        detail: String,
    },
    /// They cannot.
    NotReady {
        /// Why: a sentence for people.
        reason: String,
        /// What the operator can do: a sentence for people.
        remedy: String,
    },
}

/// Looks at the files as they are now, so that a network that was installed or removed since is seen, and asks the plugins.
pub(crate) async fn look(config: &NetConfig, health: &Health) -> NetworkStatus {
    match config.mode {
        NetMode::None => NetworkStatus::Ready {
            detail: "network.mode is \"none\": pods get a loopback interface and no other".to_owned(),
        },
        NetMode::Local => local(config, ""),
        NetMode::Cni => match conf::discover(&config.conf_dir) {
            Err(ConfError::Missing { dir }) if config.fallback == Fallback::Local => {
                local(config, &format!(" (no CNI configuration in {})", dir.display()))
            }
            Err(error) => NetworkStatus::NotReady { reason: full(&error), remedy: remedy(&error, config) },
            Ok(list) => plugins(&list, config, health).await,
        },
    }
}

fn local(config: &NetConfig, why: &str) -> NetworkStatus {
    match local::examine(&config.local) {
        Ok(network) => NetworkStatus::Ready { detail: format!("{network}{why}") },
        Err(error) => NetworkStatus::NotReady {
            reason: full(&error),
            remedy: "otherwise install CNI plugins with a configuration, or set network.mode = \"none\" for pods without a \
                     network"
                .to_owned(),
        },
    }
}

async fn plugins(list: &NetworkList, config: &NetConfig, health: &Health) -> NetworkStatus {
    let network = format!("network {:?} ({})", list.name, list.source.display());
    if let Err(error) = exec::find_all(list, &config.bin_dirs) {
        return NetworkStatus::NotReady {
            reason: format!("{network}: {error}"),
            remedy: "install the plugin, for instance with the package containernetworking-plugins, or set \
                     network.bin_dirs to where it is"
                .to_owned(),
        };
    }
    let ready = NetworkStatus::Ready { detail: format!("CNI {network}") };
    let chain = Chain { list, bin_dirs: &config.bin_dirs, limit: config.plugin_timeout };
    if !chain.knows_status() {
        return ready;
    }
    match health.of(list, config).await {
        Some(Ok(())) => ready,
        Some(Err(error)) => NetworkStatus::NotReady {
            reason: format!("{network} cannot connect pods{}: {}", meaning(&error), full(&*error)),
            remedy: "see what the network add-on says: its agent on this node, its logs".to_owned(),
        },
        None => NetworkStatus::NotReady {
            reason: format!("{network}: its plugins have not answered STATUS yet"),
            remedy: "wait; when they do not answer in time the reason changes".to_owned(),
        },
    }
}

/// Specification 1.1, STATUS.
fn meaning(error: &PluginError) -> &'static str {
    match error {
        PluginError::Refused { code: 51, .. } => {
            ", and those that are connected may have limited connectivity"
        }
        _ => "",
    }
}

fn remedy(error: &ConfError, config: &NetConfig) -> String {
    match error {
        ConfError::Missing { .. } => format!(
            "install the cluster's network add-on, put a CNI configuration into {}, or set network.fallback = \"local\" \
             for the built-in bridge, or network.mode = \"none\" for pods without a network",
            config.conf_dir.display()
        ),
        ConfError::Read { path, .. } => format!("make {} readable", path.display()),
        ConfError::TooLarge { path } | ConfError::NotJson { path, .. } | ConfError::Invalid { path, .. } => {
            format!("correct {} or remove it: the lexically first file decides", path.display())
        }
    }
}

/// An error with its causes.
pub(crate) fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}
