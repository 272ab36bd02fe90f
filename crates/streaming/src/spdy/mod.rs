//! SPDY/3.1, the side that accepts.
