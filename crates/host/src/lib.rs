//! What both host programs share: configuration, installed layout, composition, doctor.

pub mod config;

pub use config::{Config, ConfigError, ConfigFlags};
