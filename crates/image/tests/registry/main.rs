//! Pulls: over HTTP from a registry in this process, and from files.

mod archives;
mod cache;
mod common;
mod damage;
mod exports;
mod inputs;
mod lenient;
mod misbehaves;
mod pulls;
mod redirects;
mod tls;
mod together;
