//! Setting up and tearing down the network of one pod.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use a3s_box_core::BoxId;
use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::network::{PodNamespace, PodNetwork};
use a3s_box_core::spec::{BoxSpec, DnsSpec, NetworkMode, PodIdentity, PortMapping};
use thiserror::Error;

use crate::assign;
use crate::attach::{self, AttachError, Way};
use crate::cni::request::Offer;
use crate::cni::{AddError, Attachment, Chain, CniResult, ConfError, PluginError, RequestError, conf, exec};
use crate::config::{Fallback, NetConfig, NetMode};
use crate::egress::{Egress, EgressError, Watchers};
use crate::exclusion::Exclusion;
use crate::health::Health;
use crate::local::{self, LocalConfig, LocalError};
use crate::names;
use crate::netns::{self, NetnsError};
use crate::nft::Nft;
use crate::prepared::{Expected, Prepared};
use crate::record::{CniConnection, Connection, Record, RecordError, Records};
use crate::resolver::host_resolver;
use crate::status::{self, NetworkStatus, full};
use crate::turns::{Turn, Turns};

/// A pod to be connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetupRequest {
    /// Its box.
    pub box_id: BoxId,
    /// Whose it is.
    pub identity: PodIdentity,
    /// What the pod asks for; the node's configuration can only take away from it.
    pub mode: NetworkMode,
    /// Ports to publish on the host.
    pub port_mappings: Vec<PortMapping>,
    /// The resolver's configuration, for plugins that care.
    pub dns: Option<DnsSpec>,
    /// The pod's annotations, for plugins that care; those about bandwidth for the capability of that name.
    pub annotations: BTreeMap<String, String>,
    /// The pod's cgroup, for plugins that care.
    pub cgroup_parent: Option<String>,
    /// Where the pod may open connections to; without a policy everywhere.
    pub egress: Option<EgressPolicy>,
}

impl SetupRequest {
    /// What a box's specification says of its network.
    pub fn of(box_id: BoxId, spec: &BoxSpec) -> Self {
        Self {
            box_id,
            identity: spec.identity.clone(),
            mode: spec.network,
            port_mappings: spec.port_mappings.clone(),
            dns: spec.dns.clone(),
            annotations: spec.annotations.clone(),
            cgroup_parent: spec.cgroup_parent.clone(),
            egress: spec.egress.clone(),
        }
    }
}

/// A pod to be disconnected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TeardownRequest {
    /// Its box.
    pub box_id: BoxId,
    /// Forget the box even if a plugin could not undo what it did. Otherwise its namespace and
    /// record stay, so that a later call can try again with all that the plugin needs.
    pub abandon: bool,
    /// What the caller knows of the pod's network. It stands in for a record that is damaged: some plugins find what they
    /// made by the pod's addresses.
    pub known: Option<PodNetwork>,
}

impl TeardownRequest {
    /// A teardown that can be tried again.
    pub fn of(box_id: BoxId) -> Self {
        Self { box_id, abandon: false, known: None }
    }
}

/// A pod could not be connected. A teardown of the box is owed.
#[derive(Debug, Error)]
#[error("network set-up of box {} failed", box_id.short())]
pub struct SetupError {
    /// The box.
    pub box_id: BoxId,
    /// Where and why.
    #[source]
    pub cause: SetupFailure,
}

/// Where a set-up failed.
#[derive(Debug, Error)]
pub enum SetupFailure {
    /// The node has no usable network configuration.
    #[error(transparent)]
    Configuration(#[from] ConfError),
    /// A plugin of the node's network is not installed.
    #[error(transparent)]
    Plugins(#[from] PluginError),
    /// The pod cannot be described to plugins.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The intent could not be written down.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The namespace could not be made.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A plugin failed.
    #[error(transparent)]
    Cni(#[from] AddError),
    /// The built-in network failed.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The last metre failed.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The pod cannot be had with its egress policy.
    #[error(transparent)]
    Egress(#[from] EgressError),
    /// A previous set-up of this box could not be undone.
    #[error("what a previous set-up of the box left could not be undone{}", first(errors))]
    Stale {
        /// All that went wrong.
        errors: Vec<TeardownError>,
    },
}

fn first(errors: &[TeardownError]) -> String {
    errors.first().map(|error| format!(": {}", full(error))).unwrap_or_default()
}

/// The work for a pod of an earlier daemon could not be taken up.
#[derive(Debug, Error)]
pub enum ResumeError {
    /// Its record could not be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The names of its egress policy are not watched for.
    #[error(transparent)]
    Egress(#[from] EgressError),
}

/// Something that a teardown could not do.
#[derive(Debug, Error)]
pub enum TeardownError {
    /// A plugin's DEL failed.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The built-in network could not let it go.
    #[error(transparent)]
    Local(#[from] LocalError),
    /// The namespace could not be removed.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The record could not be read or removed.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// The network adapter of a daemon. Clones are the same adapter.
///
/// Calls for different boxes run side by side; calls for one box take turns.
#[derive(Debug, Clone)]
pub struct PodNetworking {
    pub(crate) config: Arc<NetConfig>,
    pub(crate) records: Records,
    pub(crate) turns: Turns,
    pub(crate) exclusion: Exclusion,
    health: Health,
    pub(crate) watchers: Watchers,
    pub(crate) expected: Expected,
}

impl PodNetworking {
    /// An adapter with these settings. Touches nothing.
    pub fn new(config: NetConfig) -> Self {
        let records = Records::new(config.cache_dir.clone());
        let exclusion = Exclusion::new(config.gc_lock.clone());
        Self {
            config: Arc::new(config),
            records,
            turns: Turns::default(),
            exclusion,
            health: Health::default(),
            watchers: Watchers::default(),
            expected: Expected::default(),
        }
    }

    /// Whether pods can be connected, as the node's files are now and as its plugins said a short while ago.
    /// Answers within seconds, whatever plugins do.
    pub async fn status(&self) -> NetworkStatus {
        status::look(&self.config, &self.health).await
    }

    /// Boxes for which this daemon holds something, for reconciliation at start.
    pub async fn held(&self) -> Result<Vec<BoxId>, RecordError> {
        self.records.ids().await
    }

    /// The network of a box that was set up, if its namespace still exists.
    pub async fn existing(&self, box_id: &BoxId) -> Result<Option<PodNetwork>, RecordError> {
        let network = self.records.read(box_id).await?.and_then(|record| record.network);
        Ok(network.filter(|network| netns::exists(&network.netns)))
    }

    /// Takes up what a daemon does for a pod that an earlier one has connected: the names of its egress policy. What it may
    /// reach by address needs no daemon.
    pub async fn resume(&self, box_id: &BoxId) -> Result<(), ResumeError> {
        let turn = self.turns.take(box_id).await;
        let Some(Record { egress: Some(policy), network: Some(network), .. }) =
            self.records.read(box_id).await?
        else {
            return Ok(());
        };
        if policy.names.is_empty() || network.interfaces.is_empty() {
            return Ok(());
        }
        let nft = self.nft()?;
        Ok(self.watchers.start(box_id, &network.netns, &turn, policy, nft).await?)
    }

    fn nft(&self) -> Result<Nft, EgressError> {
        Nft::find(&self.config.local.nft, self.config.local.nft_limit).map_err(EgressError::Rules)
    }

    /// Makes what the VM of a pod needs to start: the namespace with its taps. Nobody is asked for an address yet, so that
    /// the guest can boot while [`Prepared::connect`] does that.
    ///
    /// [`PodNetworking::teardown`] undoes it, also when this fails, when the future is dropped half-way, or when the
    /// daemon dies.
    pub async fn prepare(&self, request: SetupRequest) -> Result<Prepared, SetupError> {
        let box_id = request.box_id.clone();
        let turn = self.turns.take(&box_id).await;
        self.make_namespace(request, turn).await.map_err(|cause| SetupError { box_id, cause })
    }

    /// Whatever this makes, the record it writes first tells [`Self::teardown`] of.
    async fn make_namespace(&self, request: SetupRequest, turn: Turn) -> Result<Prepared, SetupFailure> {
        let id = &request.box_id;
        self.clear_stale(id, &turn).await?;
        let netns = names::netns_path(&self.config.netns_dir, id);
        let connection = self.connection(&request, &netns)?;
        let dns = match &connection {
            Some(Connection::Local { .. }) if request.dns.is_none() => resolver(id),
            Some(_) | None => None,
        };
        let taps: Vec<String> = (0..self.expected.interfaces(connection.as_ref())).map(names::tap).collect();
        let mut record = Record::intent(netns.clone(), connection);
        // Without an interface there is nothing to keep a pod from.
        record.egress = request.egress.clone().filter(|_| record.connection.is_some());
        let guard = match record.egress.clone() {
            Some(policy) => Some((policy, self.nft()?)),
            None => None,
        };
        let way = match guard.clone() {
            Some((policy, nft)) => {
                Way::Guarded(Egress::new(policy, request.dns.as_ref().or(dns.as_ref()), nft)?)
            }
            None => {
                let LocalConfig { nft, nft_limit, .. } = self.config.local.clone();
                Way::Open { redirect: self.config.redirect, nft, nft_limit }
            }
        };
        self.records.write(id, &record, &turn).await?;
        netns::create(&netns, &turn).await?;
        attach::make_taps(&netns, &turn, taps.clone(), self.config.taps()).await?;
        let namespace = PodNamespace { netns, taps };
        Ok(Prepared { networking: self.clone(), request, record, dns, guard, way, namespace, turn })
    }

    async fn clear_stale(&self, box_id: &BoxId, turn: &Turn) -> Result<(), SetupFailure> {
        if let Ok(None) = self.records.read(box_id).await {
            return Ok(());
        }
        let errors = self.undo(&TeardownRequest::of(box_id.clone()), turn).await;
        if errors.is_empty() { Ok(()) } else { Err(SetupFailure::Stale { errors }) }
    }

    fn connection(&self, request: &SetupRequest, netns: &Path) -> Result<Option<Connection>, SetupFailure> {
        match (self.config.mode, request.mode) {
            (NetMode::None, _) | (_, NetworkMode::None) => Ok(None),
            (NetMode::Local, NetworkMode::Pod) => Ok(Some(self.local())),
            (NetMode::Cni, NetworkMode::Pod) => {
                let list = match conf::discover(&self.config.conf_dir) {
                    Err(ConfError::Missing { .. }) if self.config.fallback == Fallback::Local => {
                        return Ok(Some(self.local()));
                    }
                    other => other?,
                };
                exec::find_all(&list, &self.config.bin_dirs)?;
                let ranges = if list.wants("ipRanges") { assign::assigned(&self.config) } else { Vec::new() };
                let offer = Offer {
                    port_mappings: &request.port_mappings,
                    dns: request.dns.as_ref(),
                    annotations: &request.annotations,
                    cgroup_path: request.cgroup_parent.as_deref(),
                    ip_ranges: &ranges,
                };
                let attachment =
                    Attachment::new(&request.box_id, netns.to_owned(), &request.identity, offer)?;
                for (capability, lacks) in attachment.unheard(&list) {
                    tracing::warn!(
                        network = list.name,
                        capability,
                        "no plugin of the network has this capability: {lacks}"
                    );
                }
                Ok(Some(Connection::Cni(CniConnection { list, attachment, result: None })))
            }
        }
    }

    fn local(&self) -> Connection {
        Connection::Local { local: self.config.local.clone() }
    }

    pub(crate) fn chain<'a>(&'a self, connection: &'a CniConnection) -> Chain<'a> {
        Chain { list: &connection.list, bin_dirs: &self.config.bin_dirs, limit: self.config.plugin_timeout }
    }

    /// Disconnects a pod: idempotent, and every plugin is called whatever became of the others. The VMM must be gone.
    ///
    /// An empty list means that nothing is left.
    pub async fn teardown(&self, request: TeardownRequest) -> Vec<TeardownError> {
        let turn = self.turns.take(&request.box_id).await;
        self.undo(&request, &turn).await
    }

    async fn undo(&self, request: &TeardownRequest, turn: &Turn) -> Vec<TeardownError> {
        let id = &request.box_id;
        let mut errors = Vec::new();
        self.watchers.stop(id, turn).await;
        let record = match self.records.read(id).await {
            Ok(record) => record,
            Err(RecordError::Unreadable { path, source }) => {
                tracing::warn!(%id, path = %path.display(), %source, "network record is damaged: going by the node's configuration");
                // It may have been of either kind: the local network knows its boxes by id.
                errors.extend(disconnect_locally(&self.config.local, request, turn).await);
                self.guess(request)
            }
            Err(error) => {
                errors.push(error.into());
                None
            }
        };
        let netns = record.as_ref().map(|r| r.netns.clone());
        let netns = netns.unwrap_or_else(|| names::netns_path(&self.config.netns_dir, id));
        if let Some(connection) = record.and_then(|record| record.connection) {
            errors.extend(self.disconnect(&connection, &netns, request, turn).await);
        }
        if !errors.is_empty() && !request.abandon {
            return errors;
        }
        self.forget(id, netns, turn, &mut errors).await;
        errors
    }

    /// What a damaged record may have said. DEL with the configuration of today and what the caller knows is the best
    /// there is; plugins find most of what they hold by the container id.
    fn guess(&self, request: &TeardownRequest) -> Option<Record> {
        let id = &request.box_id;
        let netns = names::netns_path(&self.config.netns_dir, id);
        let list = conf::discover(&self.config.conf_dir).ok()?;
        let attachment = Attachment::anonymous(id, netns.clone());
        let result = request.known.as_ref().map(|network| CniResult::of(network).for_next(list.version));
        let connection = CniConnection { list, attachment, result };
        Some(Record::intent(netns, Some(Connection::Cni(connection))))
    }

    async fn disconnect(
        &self,
        connection: &Connection,
        netns: &Path,
        request: &TeardownRequest,
        turn: &Turn,
    ) -> Vec<TeardownError> {
        match connection {
            Connection::Local { local } => disconnect_locally(local, request, turn).await,
            Connection::Cni(connection) => {
                let _pass = self.exclusion.share().await;
                let present = netns::exists(netns).then_some(netns);
                let chain = self.chain(connection);
                let errors = chain.del(&connection.attachment, present, connection.result.as_ref()).await;
                errors.into_iter().map(TeardownError::from).collect()
            }
        }
    }

    /// The record goes last: as long as anything is left there is a note of it.
    async fn forget(&self, id: &BoxId, netns: PathBuf, turn: &Turn, errors: &mut Vec<TeardownError>) {
        if let Err(error) = netns::remove(&netns, turn).await {
            errors.push(error.into());
            return;
        }
        if let Err(error) = self.records.remove(id, turn).await {
            errors.push(error.into());
        }
    }
}

fn resolver(id: &BoxId) -> Option<DnsSpec> {
    let found = host_resolver();
    if found.is_none() {
        tracing::warn!(%id, "the host has no name server that a box could reach: names are not resolved in this pod");
    }
    found
}

async fn disconnect_locally(
    local: &LocalConfig,
    request: &TeardownRequest,
    turn: &Turn,
) -> Vec<TeardownError> {
    let errors = local::disconnect(local, &request.box_id, request.abandon, turn).await;
    errors.into_iter().map(TeardownError::from).collect()
}
