//! The OCI adapter: references, registry client, content store, tar to EROFS.
