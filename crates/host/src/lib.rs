//! What both host programs share: configuration, installed layout, composition, doctor.
//!
//! [`Config`] says what the operator wants, [`Layout`] where the parts are, [`Host`] composes storage, images,
//! network, hypervisor and boxes of one instance, [`doctor`] says what is lacking.

pub mod backend;
pub mod config;
pub mod doctor;
mod host;
mod layout;
mod lock;
mod networks;

pub use a3s_box_net::host_resolver;
pub use backend::{BackendError, Choice};
pub use config::{Config, ConfigError, ConfigFlags};
pub use host::{Host, HostError, image_store_config, start_boxes};
pub use layout::{Layout, MissingPart, Part};
pub use lock::{InstanceLock, LockError, make_private_dir};
