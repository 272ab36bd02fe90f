//! Durable records (redb) behind the Storage seam of core.
