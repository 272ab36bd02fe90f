//! Pod networking as the runtime wants it, by the network adapter.

use async_trait::async_trait;

use a3s_box_core::BoxId;
use a3s_box_core::network::{InterfaceUsage, PodNetwork};
use a3s_box_core::spec::BoxSpec;
use a3s_box_net::{
    Fallback, LocalConfig, NetConfig, NetMode, NetworkStatus, PodNetworking, SetupRequest, TeardownError,
    TeardownRequest,
};
use a3s_box_runtime::network::NetworkFault;
use a3s_box_runtime::{NetworkReadiness, NetworkSetting, PodNetworks};

use crate::config::{Config, NetworkFallback, NetworkMode};

/// The network of a configuration.
pub(crate) fn setting(config: &Config) -> NetworkSetting {
    match config.network.mode {
        NetworkMode::None => NetworkSetting::None,
        NetworkMode::Cni | NetworkMode::Local => {
            NetworkSetting::Pods(std::sync::Arc::new(Networks(PodNetworking::new(net_config(config)))))
        }
    }
}

/// The settings of the network adapter.
pub(crate) fn net_config(config: &Config) -> NetConfig {
    NetConfig {
        mode: match config.network.mode {
            NetworkMode::Cni => NetMode::Cni,
            NetworkMode::Local => NetMode::Local,
            NetworkMode::None => NetMode::None,
        },
        fallback: match config.network.fallback {
            NetworkFallback::None => Fallback::None,
            NetworkFallback::Local => Fallback::Local,
        },
        local: LocalConfig {
            subnet: config.network.local_subnet,
            subnet6: config.network.local_subnet6,
            ..LocalConfig::default()
        },
        conf_dir: config.network.conf_dir.clone(),
        bin_dirs: config.network.bin_dirs.clone(),
        cache_dir: config.root.join("cni"),
        netns_dir: config.run_dir.join("netns"),
        plugin_timeout: config.network.plugin_timeout,
        ..NetConfig::default()
    }
}

struct Networks(PodNetworking);

/// All that a teardown could not undo.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
struct Failures(Vec<TeardownError>);

#[async_trait]
impl PodNetworks for Networks {
    async fn setup(&self, id: &BoxId, spec: &BoxSpec) -> Result<PodNetwork, NetworkFault> {
        self.0.setup(SetupRequest::of(id.clone(), spec)).await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn teardown(&self, id: &BoxId) -> Result<(), NetworkFault> {
        let errors = self.0.teardown(TeardownRequest::of(id.clone())).await;
        if errors.is_empty() { Ok(()) } else { Err(NetworkFault(Box::new(Failures(errors)))) }
    }

    async fn held(&self) -> Result<Vec<BoxId>, NetworkFault> {
        self.0.held().await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn resume(&self, id: &BoxId) -> Result<(), NetworkFault> {
        self.0.resume(id).await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn usage(&self, network: &PodNetwork) -> Result<Vec<InterfaceUsage>, NetworkFault> {
        a3s_box_net::usage(network).await.map_err(|error| NetworkFault(Box::new(error)))
    }

    fn readiness(&self) -> NetworkReadiness {
        match self.0.status() {
            NetworkStatus::Ready { detail } => {
                NetworkReadiness { ready: true, reason: String::new(), message: detail }
            }
            NetworkStatus::NotReady { reason, remedy } => NetworkReadiness {
                ready: false,
                reason: "NetworkPluginNotReady".to_owned(),
                message: format!("{reason}; {remedy}"),
            },
        }
    }
}
