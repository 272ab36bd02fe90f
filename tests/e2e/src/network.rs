//! A CNI configuration that keeps its state in our folder and leaves no bridge behind.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Where Debian's containernetworking-plugins lie.
pub const PLUGINS: &str = "/usr/lib/cni";

/// Writes a configuration list into `folder/conf`: one veth pair per pod, addresses by host-local. Returns that folder.
pub fn write_configuration(folder: &Path, name: &str, subnet: &str) -> Result<PathBuf> {
    write(folder, name, false, &[(subnet, "0.0.0.0/0")], &[])
}

/// The same with both families, masquerading and published ports.
pub fn write_dual_stack(folder: &Path, name: &str, subnet: &str, subnet6: &str) -> Result<PathBuf> {
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true } });
    write(folder, name, true, &[(subnet, "0.0.0.0/0"), (subnet6, "::/0")], &[portmap])
}

fn write(
    folder: &Path,
    name: &str,
    masquerade: bool,
    subnets: &[(&str, &str)],
    others: &[Value],
) -> Result<PathBuf> {
    let conf = folder.join("conf");
    fs::create_dir_all(&conf).with_context(|| format!("creating {}", conf.display()))?;
    let ptp = json!({
        "type": "ptp",
        "ipMasq": masquerade,
        "ipam": {
            "type": "host-local",
            "dataDir": folder.join("addresses"),
            "ranges": subnets.iter().map(|(subnet, _)| [json!({ "subnet": subnet })]).collect::<Vec<_>>(),
            "routes": subnets.iter().map(|(_, route)| json!({ "dst": route })).collect::<Vec<_>>(),
        },
    });
    let plugins = [&[ptp], others].concat();
    let list = json!({ "cniVersion": "1.0.0", "name": name, "plugins": plugins });
    let file = conf.join("10-a3s-box.conflist");
    fs::write(&file, serde_json::to_vec_pretty(&list)?)
        .with_context(|| format!("writing {}", file.display()))?;
    Ok(conf)
}
