//! A CNI configuration that keeps its state in our folder and leaves no bridge behind.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

/// Where Debian's containernetworking-plugins lie.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Writes a configuration list into `folder/conf`: one veth pair per pod, addresses by host-local. Returns that folder.
pub fn write_configuration(folder: &Path, name: &str, subnet: &str) -> Result<std::path::PathBuf> {
    let conf = folder.join("conf");
    fs::create_dir_all(&conf).with_context(|| format!("creating {}", conf.display()))?;
    let list = json!({
        "cniVersion": "1.0.0",
        "name": name,
        "plugins": [
            {
                "type": "ptp",
                "ipMasq": false,
                "ipam": {
                    "type": "host-local",
                    "dataDir": folder.join("addresses"),
                    "ranges": [[{ "subnet": subnet }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                },
            },
        ],
    });
    let file = conf.join("10-a3s-box.conflist");
    fs::write(&file, serde_json::to_vec_pretty(&list)?)
        .with_context(|| format!("writing {}", file.display()))?;
    Ok(conf)
}
