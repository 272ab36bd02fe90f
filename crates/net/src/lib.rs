//! Pod networking: CNI execution, a bridge of our own for hosts without CNI, network namespaces, taps and traffic
//! redirection.
//!
//! ```text
//!   prepare:   record ──> netns ──> taps                             the VM may start
//!   connect:   CNI ADD … ADD, or local ──> redirect ──> record, PodNetwork
//!   teardown:  CNI DEL … DEL (reverse), or local ──> netns (and with it veth and tap) ──> record
//! ```
//!
//! Everything a pod holds on the host hangs on two things: what its CNI plugins or the
//! [`local`] network did, and its network namespace. Both are written down ([`NetConfig::cache_dir`]) before they are made, under
//! names that follow from the box id alone ([`names`]), so that [`PodNetworking::teardown`] needs
//! nothing but the id, whatever happened in between. The tap and the redirection live inside the
//! namespace and vanish with it.
//!
//! Threads: a thread that has changed its network namespace never goes back to other work. All
//! such work happens on threads of its own that end afterwards ([`netns`]).

mod assign;
mod attach;
pub mod cni;
mod config;
mod egress;
mod exclusion;
mod health;
pub mod local;
pub mod names;
mod netlink;
pub mod netns;
mod nft;
mod pods;
mod prepared;
mod record;
mod resolver;
mod status;
pub mod tap;
mod template;
mod turns;
mod upkeep;
mod usage;
mod view;

pub use assign::AssignError;
pub use attach::AttachError;
pub use config::{Fallback, NetConfig, NetMode, Redirect};
pub use egress::EgressError;
pub use local::{LocalConfig, LocalError, Subnet};
pub use nft::NftError;
pub use pods::{
    PodNetworking, ResumeError, SetupError, SetupFailure, SetupRequest, TeardownError, TeardownRequest,
};
pub use prepared::Prepared;
pub use record::RecordError;
pub use resolver::host_resolver;
pub use status::NetworkStatus;
pub use template::TemplateProblem;
pub use upkeep::{CheckError, GcError};
pub use usage::usage;
