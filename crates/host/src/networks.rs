//! Pod networking as the runtime wants it, by the network adapter.

use async_trait::async_trait;

use a3s_box_core::BoxId;
use a3s_box_core::network::{Address, InterfaceUsage, PodNamespace, PodNetwork};
use a3s_box_core::spec::BoxSpec;
use a3s_box_net::{
    Fallback, LocalConfig, NetConfig, NetMode, NetworkStatus, PodNetworking, Prepared, SetupRequest,
    TeardownError, TeardownRequest,
};
use a3s_box_runtime::network::{NetworkFault, PreparedNetwork};
use a3s_box_runtime::{NetworkReadiness, NetworkSetting, PodNetworks};

use a3s_box_vmm::BackendKind;

use crate::config::{Config, NetworkFallback, NetworkMode};

/// The network of a configuration, for the boxes of a hypervisor.
pub(crate) fn setting(config: &Config, backend: BackendKind) -> NetworkSetting {
    match config.network.mode {
        NetworkMode::None => NetworkSetting::None,
        NetworkMode::Cni | NetworkMode::Local => {
            let config = NetConfig { multi_queue: backend == BackendKind::Qemu, ..net_config(config) };
            NetworkSetting::Pods(std::sync::Arc::new(Networks(PodNetworking::new(config))))
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
        other_caches: config.root.join("standalone/run"),
        conf_template: config.network.conf_template.clone(),
        netns_dir: config.run_dir.join("netns"),
        plugin_timeout: config.network.plugin_timeout,
        redirect: config.network.redirect,
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
    async fn prepare(&self, id: &BoxId, spec: &BoxSpec) -> Result<Box<dyn PreparedNetwork>, NetworkFault> {
        match self.0.prepare(SetupRequest::of(id.clone(), spec)).await {
            Ok(prepared) => Ok(Box::new(InNamespace(prepared))),
            Err(error) => Err(NetworkFault(Box::new(error))),
        }
    }

    async fn teardown(&self, id: &BoxId, known: Option<&PodNetwork>) -> Result<(), NetworkFault> {
        let request = TeardownRequest { known: known.cloned(), ..TeardownRequest::of(id.clone()) };
        let errors = self.0.teardown(request).await;
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

    async fn check(&self, id: &BoxId) -> Result<(), NetworkFault> {
        self.0.check(id).await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn collect_garbage(&self) -> Result<(), NetworkFault> {
        self.0.collect_garbage().await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn assign_pod_cidrs(&self, cidrs: &[Address]) -> Result<(), NetworkFault> {
        self.0.assign_pod_cidrs(cidrs).await.map_err(|error| NetworkFault(Box::new(error)))
    }

    async fn readiness(&self) -> NetworkReadiness {
        match self.0.status().await {
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

struct InNamespace(Prepared);

#[async_trait]
impl PreparedNetwork for InNamespace {
    fn namespace(&self) -> &PodNamespace {
        self.0.namespace()
    }

    async fn connect(self: Box<Self>) -> Result<PodNetwork, NetworkFault> {
        self.0.connect().await.map_err(|error| NetworkFault(Box::new(error)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// As kubelet sees a node from its first minute on: no network, addresses, plugins that are not up yet, ready.
    #[tokio::test]
    async fn a_node_becomes_ready_with_its_addresses_and_its_plugins() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut config = Config::default().with_directories(at("root"), at("run"));
        config.network.conf_dir = at("net.d");
        config.network.bin_dirs = vec![at("bin")];
        config.network.conf_template = Some(at("template"));
        let template = r#"{ "cniVersion": "1.1.0", "name": "n", "plugins": [{ "type": "p", "subnet": "{{.PodCIDR}}" }] }"#;
        fs::write(at("template"), template).unwrap();
        fs::create_dir(at("bin")).unwrap();
        let plugin = "#!/bin/sh\n[ -e \"$0.up\" ] || { echo '{ \"code\": 50, \"msg\": \"agent is starting\" }'; exit 1; }\n";
        fs::write(at("bin/p"), plugin).unwrap();
        fs::set_permissions(at("bin/p"), fs::Permissions::from_mode(0o755)).unwrap();
        let NetworkSetting::Pods(pods) = setting(&config, BackendKind::Libkrun) else { panic!("no network") };

        let readiness = pods.readiness().await;
        assert!(!readiness.ready && readiness.message.contains("no CNI configuration"), "{readiness:?}");
        pods.assign_pod_cidrs(&[Address { ip: [10, 1, 2, 0].into(), prefix: 24 }]).await.unwrap();
        assert!(fs::read_to_string(at("net.d/10-a3s-box.conflist")).unwrap().contains("10.1.2.0/24"));
        let readiness = pods.readiness().await;
        assert_eq!((readiness.ready, readiness.reason.as_str()), (false, "NetworkPluginNotReady"));
        assert!(readiness.message.contains("agent is starting"), "{readiness:?}");
        fs::write(at("bin/p.up"), "").unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !pods.readiness().await.ready {
            assert!(std::time::Instant::now() < deadline);
            tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        }
    }
}
