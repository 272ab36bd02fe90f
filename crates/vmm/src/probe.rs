//! (next)
use std::fmt;
