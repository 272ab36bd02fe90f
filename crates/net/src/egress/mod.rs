//! Egress policies: where a pod may open connections to, enforced outside of its guest.
//!
//! A pod with a policy has the [`rules`] of nftables where others have the plain redirection of `attach`. They live in the
//! pod's namespace, need no daemon and vanish with it. If the policy has names a [`watcher`] adds the addresses that
//! the pod is told for them: [`answers`].

mod answers;
mod rules;
mod watcher;

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use a3s_box_core::BoxId;
use a3s_box_core::egress::EgressPolicy;
use a3s_box_core::network::Interface;
use a3s_box_core::spec::DnsSpec;
use thiserror::Error;

use crate::netns::{self, NetnsError};
use crate::nft::{Nft, NftError};
use crate::turns::Turn;
use watcher::Watcher;

/// The tap that answers of name servers take, in the pod's namespace.
pub(crate) const DNS_TAP: &str = "a3s-dns";

/// Why a pod cannot be had with its egress policy.
#[derive(Debug, Error)]
pub enum EgressError {
    /// The rules are not in force.
    #[error(
        "the pod's egress policy is not in force, and without it the pod is not started (this needs the package nftables and \
         the kernel's nf_tables with NFT_FWD_NETDEV)"
    )]
    Rules(#[source] NftError),
    /// Names, and nobody to ask for them.
    #[error(
        "the pod's egress policy has names, and the pod no name server with an address: give it one, as with the pod's \
         dnsConfig, or list addresses"
    )]
    NoServer,
    /// The watcher cannot be started.
    #[error("the answers of the pod's name servers cannot be watched for the names of its egress policy")]
    Watch(#[source] io::Error),
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
}

/// A policy that can be put in force.
#[derive(Debug, Clone)]
pub(crate) struct Egress {
    policy: EgressPolicy,
    servers: Vec<IpAddr>,
    nft: Nft,
}

impl Egress {
    /// A policy for a pod that asks the servers of `dns`. Whatever it lacks is missed now, not when half a pod is there.
    pub(crate) fn new(policy: EgressPolicy, dns: Option<&DnsSpec>, nft: Nft) -> Result<Self, EgressError> {
        let servers = dns.into_iter().flat_map(|dns| &dns.servers).filter_map(|server| server.parse().ok());
        let servers: Vec<IpAddr> = servers.collect();
        if !policy.names.is_empty() && servers.is_empty() {
            return Err(EgressError::NoServer);
        }
        Ok(Self { policy, servers, nft })
    }

    /// Whether answers of name servers are watched.
    pub(crate) fn has_names(&self) -> bool {
        !self.policy.names.is_empty()
    }

    /// Connects the interfaces and their taps as the policy says. To be called in the pod's namespace, with the taps,
    /// [`DNS_TAP`] included where there are names, in place.
    pub(crate) fn enforce(&self, interfaces: &[Interface]) -> Result<(), EgressError> {
        let dns = self.has_names().then_some((DNS_TAP, self.servers.as_slice()));
        self.nft.run(&rules::ruleset(&self.policy, interfaces, dns), None).map_err(EgressError::Rules)
    }
}

/// The watchers of a daemon's pods.
#[derive(Debug, Clone, Default)]
pub(crate) struct Watchers(Arc<Mutex<HashMap<BoxId, Watcher>>>);

impl Watchers {
    /// Watches for the names of a policy that is in force in the namespace at `netns`. There already is success.
    pub(crate) async fn start(
        &self,
        id: &BoxId,
        netns: &Path,
        turn: &Turn,
        policy: EgressPolicy,
        nft: Nft,
    ) -> Result<(), EgressError> {
        if policy.names.is_empty() || self.lock().contains_key(id) {
            return Ok(());
        }
        let (watchers, id) = (self.clone(), id.clone());
        // Entered on the thread that has the turn: a teardown waits for it and finds the watcher, whoever gave up.
        let start = move || {
            let watcher = Watcher::start(&id, DNS_TAP, policy, nft).map_err(EgressError::Watch)?;
            watchers.lock().insert(id, watcher);
            Ok(())
        };
        netns::run_inside(netns, turn, start).await?
    }

    /// Ends the watcher of a pod, so that the pod's namespace can go. None there is success.
    pub(crate) async fn stop(&self, id: &BoxId, turn: &Turn) {
        let Some(watcher) = self.lock().remove(id) else { return };
        let turn = turn.clone();
        let stop = move || {
            watcher.stop();
            drop(turn);
        };
        if let Err(error) = tokio::task::spawn_blocking(stop).await {
            tracing::error!(%id, %error, "whether the watcher of a pod's names has ended is not known");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<BoxId, Watcher>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
