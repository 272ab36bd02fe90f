//! The second half of a set-up: a pod that has its namespace gets its network.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::network::{PodNamespace, PodNetwork};
use a3s_box_core::spec::DnsSpec;

use crate::attach::{self, PodInterface, Way};
use crate::cni::{Attachment, CniResult};
use crate::local::{self, Wish};
use crate::nft::Nft;
use crate::pods::{PodNetworking, SetupError, SetupFailure, SetupRequest};
use crate::record::{CniConnection, Connection, Record};
use crate::turns::Turn;

/// A pod that has its namespace and is not connected yet. What it holds, only [`PodNetworking::teardown`] gives back.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) networking: PodNetworking,
    pub(crate) request: SetupRequest,
    pub(crate) record: Record,
    /// The resolver of pods that were given none.
    pub(crate) dns: Option<DnsSpec>,
    /// The egress policy, and what puts it in force.
    pub(crate) guard: Option<(EgressPolicy, Nft)>,
    pub(crate) way: Way,
    pub(crate) namespace: PodNamespace,
    pub(crate) turn: Turn,
}

impl Prepared {
    /// What the pod's VM needs to start.
    pub fn namespace(&self) -> &PodNamespace {
        &self.namespace
    }

    /// Connects the pod, by CNI's ADD or to the built-in bridge, and its taps to what that has made.
    pub async fn connect(self) -> Result<PodNetwork, SetupError> {
        let started = std::time::Instant::now();
        let box_id = self.request.box_id.clone();
        match self.attach().await {
            Ok(network) => {
                tracing::debug!(id = %box_id, took = ?started.elapsed(), "pod network is up");
                Ok(network)
            }
            Err(cause) => Err(SetupError { box_id, cause }),
        }
    }

    async fn attach(self) -> Result<PodNetwork, SetupFailure> {
        let Self { networking, request, mut record, dns, guard, way, namespace, turn } = self;
        let (id, netns) = (&request.box_id, namespace.netns);
        let interfaces = match &mut record.connection {
            None => Vec::new(),
            Some(Connection::Cni(connection)) => {
                let _pass = networking.exclusion.share().await;
                let result = networking.chain(connection).add(&connection.attachment).await?;
                connection.result = Some(result.for_next(connection.list.version));
                pod_interfaces(&result, &connection.attachment)
            }
            Some(Connection::Local { local }) => {
                let SetupRequest { box_id, identity, port_mappings, .. } = request.clone();
                local::connect(local, Wish { box_id, identity, port_mappings }, &netns, &turn).await?
            }
        };
        // Without this a crash during the next step would make DEL do without ADD's result.
        networking.records.write(id, &record, &turn).await?;
        networking.expected.learn(&record, interfaces.len());
        let interfaces = attach::attach(&netns, &turn, interfaces, networking.config.taps(), way).await?;
        if let Some((policy, nft)) = guard {
            networking.watchers.start(id, &netns, &turn, policy, nft).await?;
        }
        let network = PodNetwork { netns, interfaces, dns };
        record.network = Some(network.clone());
        networking.records.write(id, &record, &turn).await?;
        Ok(network)
    }
}

/// How many interfaces a pod gets is known only when it has them, but its VM starts before that: it is what the last pod
/// of the same network got.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expected(Arc<Mutex<BTreeMap<String, usize>>>);

impl Expected {
    pub(crate) fn interfaces(&self, connection: Option<&Connection>) -> usize {
        match connection {
            None => 0,
            Some(Connection::Local { .. }) => 1,
            Some(Connection::Cni(CniConnection { list, .. })) => {
                self.lock().get(&list.name).copied().unwrap_or(1)
            }
        }
    }

    fn learn(&self, record: &Record, interfaces: usize) {
        if let Some(Connection::Cni(CniConnection { list, .. })) = &record.connection {
            self.lock().insert(list.name.clone(), interfaces);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pod_interfaces(result: &CniResult, attachment: &Attachment) -> Vec<PodInterface> {
    let primary = attachment.interface.as_str();
    let describe =
        |name: String| PodInterface { addresses: result.addresses_of(&name, primary).collect(), name };
    result.pod_interfaces(primary).into_iter().map(describe).collect()
}
