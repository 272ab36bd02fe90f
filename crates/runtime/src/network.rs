//! The seam to whoever connects pods.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use a3s_box_core::BoxId;
use a3s_box_core::network::{Address, InterfaceUsage, PodNamespace, PodNetwork};
use a3s_box_core::spec::BoxSpec;

use crate::api::NetworkReadiness;

/// A network that could not be set up or taken down; carries the adapter's own error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NetworkFault(#[source] pub Box<dyn std::error::Error + Send + Sync>);

/// Connects and disconnects pods.
#[async_trait]
pub trait PodNetworks: Send + Sync + 'static {
    /// Makes what the VM of a box needs to start. Whatever becomes of it, [`PodNetworks::teardown`] undoes it.
    async fn prepare(&self, id: &BoxId, spec: &BoxSpec) -> Result<Box<dyn PreparedNetwork>, NetworkFault>;

    /// Takes up what goes on for a box that an earlier daemon has connected.
    async fn resume(&self, id: &BoxId) -> Result<(), NetworkFault>;

    /// Takes it away again. "Already gone" is success. `known` is what the caller remembers of it, should the adapter's own
    /// note be damaged.
    async fn teardown(&self, id: &BoxId, known: Option<&PodNetwork>) -> Result<(), NetworkFault>;

    /// Boxes of which something is set up, or is left of their set-up.
    async fn held(&self) -> Result<Vec<BoxId>, NetworkFault>;

    /// What the interfaces of a box have carried, in their order.
    async fn usage(&self, network: &PodNetwork) -> Result<Vec<InterfaceUsage>, NetworkFault>;

    /// Whether pods can be connected now. Answers within seconds.
    async fn readiness(&self) -> NetworkReadiness;

    /// Whether a box is still connected as it was set up.
    async fn check(&self, id: &BoxId) -> Result<(), NetworkFault>;

    /// Gives back what belongs to no box, of this instance or of another on this host. May wait for minutes until it can.
    async fn collect_garbage(&self) -> Result<(), NetworkFault>;

    /// What the cluster has assigned to this node's pods, one range of an address family each.
    async fn assign_pod_cidrs(&self, cidrs: &[Address]) -> Result<(), NetworkFault>;
}

/// A box that has a network namespace, and no network yet.
#[async_trait]
pub trait PreparedNetwork: Send + Sync {
    /// What its VM needs to start.
    fn namespace(&self) -> &PodNamespace;

    /// Gives the box its network. [`PodNetworks::teardown`] undoes it, also after a failure or half-way.
    async fn connect(self: Box<Self>) -> Result<PodNetwork, NetworkFault>;
}

/// Who connects pods.
#[derive(Clone, Default)]
pub enum NetworkSetting {
    /// The given adapter.
    Pods(Arc<dyn PodNetworks>),
    /// Nobody: every box has loopback only.
    #[default]
    None,
}

impl fmt::Debug for NetworkSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pods(_) => f.write_str("Pods"),
            Self::None => f.write_str("None"),
        }
    }
}
