//! User namespaces: KEP-127, user_namespaces(7).
//!
//! A pod has one, which all of its containers share; `hostUsers: false` asks for it. Like containerd and CRI-O
//! we take one range that begins with the container's root.

use a3s_box_core::spec::{IdRange, UserNamespace};

use super::InvalidRequest;
use crate::proto::{self, IdMapping, NamespaceMode};

/// The user namespace that a pod asks for, if it does.
pub fn user_namespace(
    options: Option<&proto::UserNamespace>,
    field: &str,
) -> Result<Option<UserNamespace>, InvalidRequest> {
    let Some(options) = options else { return Ok(None) };
    let mapped = !(options.uids.is_empty() && options.gids.is_empty());
    match NamespaceMode::try_from(options.mode) {
        // The zero of the enum, which is also what nobody has set.
        Ok(NamespaceMode::Pod) if mapped => {
            mapping(&options.uids, &options.gids, [&format!("{field}.uids"), &format!("{field}.gids")])
                .map(Some)
        }
        Ok(NamespaceMode::Node) if mapped => {
            let problem = "NODE has no mappings; leave uids and gids out, or use POD";
            Err(InvalidRequest::new(format!("{field}.mode"), problem))
        }
        Ok(NamespaceMode::Pod | NamespaceMode::Node) => Ok(None),
        Ok(NamespaceMode::Container | NamespaceMode::Target) => {
            let problem = "a pod's containers share one user namespace; use POD, or NODE for none";
            Err(InvalidRequest::new(format!("{field}.mode"), problem))
        }
        Err(_) => {
            let problem = format!("{} is not a namespace mode", options.mode);
            Err(InvalidRequest::new(format!("{field}.mode"), problem))
        }
    }
}

/// Refuses a container that wants other users than its pod. One that says nothing has the pod's.
pub fn check_container(
    options: Option<&proto::UserNamespace>,
    pod: Option<UserNamespace>,
    field: &str,
) -> Result<(), InvalidRequest> {
    if options.is_none() || user_namespace(options, field)? == pod {
        return Ok(());
    }
    Err(InvalidRequest::new(field, "differs from the pod's; give the container what the pod was given"))
}

/// The mapping of a mount, which is the pod's or none.
pub fn mount_mapping(
    mount: &proto::Mount,
    pod: Option<UserNamespace>,
    field: &str,
) -> Result<Option<UserNamespace>, InvalidRequest> {
    if mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
        return Ok(None);
    }
    let (uids, gids) = (format!("{field}.uidMappings"), format!("{field}.gidMappings"));
    let wanted = mapping(&mount.uid_mappings, &mount.gid_mappings, [&uids, &gids])?;
    if Some(wanted) != pod {
        return Err(InvalidRequest::new(uids, "differs from the pod's user namespace"));
    }
    Ok(pod)
}

/// As CRI says it.
pub fn to_cri(users: &UserNamespace) -> proto::UserNamespace {
    proto::UserNamespace {
        mode: NamespaceMode::Pod.into(),
        uids: vec![id_mapping(users.uids)],
        gids: vec![id_mapping(users.gids)],
    }
}

/// One range as CRI says it.
pub fn id_mapping(range: IdRange) -> IdMapping {
    IdMapping { host_id: range.start, container_id: 0, length: range.count }
}

fn mapping(
    uids: &[IdMapping],
    gids: &[IdMapping],
    [uid_field, gid_field]: [&str; 2],
) -> Result<UserNamespace, InvalidRequest> {
    Ok(UserNamespace { uids: range(uids, uid_field)?, gids: range(gids, gid_field)? })
}

fn range(mappings: &[IdMapping], field: &str) -> Result<IdRange, InvalidRequest> {
    let refused = |problem: String| Err(InvalidRequest::new(field, problem));
    let [mapping] = mappings else {
        return refused(format!("has {} mappings; one range is what a user namespace takes", mappings.len()));
    };
    if mapping.container_id != 0 {
        return refused(format!(
            "begins with id {}; the container's root must be mapped",
            mapping.container_id
        ));
    }
    // u32::MAX is nobody's id.
    match mapping.host_id.checked_add(mapping.length) {
        Some(end) if mapping.length > 0 && end < u32::MAX => {
            Ok(IdRange { start: mapping.host_id, count: mapping.length })
        }
        _ => refused(format!(
            "{} ids from {} on are not within 0 to 4294967294",
            mapping.length, mapping.host_id
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(host_id: u32, container_id: u32, length: u32) -> Vec<IdMapping> {
        vec![IdMapping { host_id, container_id, length }]
    }

    fn options(mode: NamespaceMode, ids: Vec<IdMapping>) -> proto::UserNamespace {
        proto::UserNamespace { mode: mode.into(), uids: ids.clone(), gids: ids }
    }

    fn users(start: u32) -> UserNamespace {
        let range = IdRange { start, count: 65536 };
        UserNamespace { uids: range, gids: range }
    }

    fn ask(options: &proto::UserNamespace) -> Result<Option<UserNamespace>, String> {
        user_namespace(Some(options), "u").map_err(|error| error.field)
    }

    #[test]
    fn a_pods_one_range_is_taken_and_nothing_is_none() {
        assert_eq!(ask(&options(NamespaceMode::Pod, one(65536, 0, 65536))), Ok(Some(users(65536))));
        assert_eq!(ask(&options(NamespaceMode::Pod, vec![])), Ok(None));
        assert_eq!(ask(&options(NamespaceMode::Node, vec![])), Ok(None));
        assert_eq!(user_namespace(None, "u"), Ok(None));
        assert_eq!(ask(&to_cri(&users(7))), Ok(Some(users(7))), "what we say is what we take");
    }

    #[test]
    fn other_modes_and_other_ranges_are_refused_by_name() {
        let two = [one(1000, 0, 10), one(2000, 10, 10)].concat();
        let refused = [
            (options(NamespaceMode::Container, vec![]), "u.mode"),
            (options(NamespaceMode::Target, vec![]), "u.mode"),
            (options(NamespaceMode::Node, one(0, 0, 1)), "u.mode"),
            (proto::UserNamespace { mode: 9, ..Default::default() }, "u.mode"),
            (options(NamespaceMode::Pod, two), "u.uids"),
            (options(NamespaceMode::Pod, one(1000, 1, 10)), "u.uids"),
            (options(NamespaceMode::Pod, one(1000, 0, 0)), "u.uids"),
            (options(NamespaceMode::Pod, one(u32::MAX - 1, 0, 1)), "u.uids"),
            (options(NamespaceMode::Pod, one(u32::MAX, 0, u32::MAX)), "u.uids"),
            (proto::UserNamespace { uids: one(5, 0, 5), ..Default::default() }, "u.gids"),
        ];
        for (options, field) in refused {
            assert_eq!(ask(&options), Err(field.to_owned()), "{options:?}");
        }
    }

    #[test]
    fn containers_and_mounts_have_their_pods_users_or_none() {
        let pod = Some(users(65536));
        let same = options(NamespaceMode::Pod, one(65536, 0, 65536));
        let other = options(NamespaceMode::Pod, one(131_072, 0, 65536));
        assert_eq!(check_container(Some(&same), pod, "c"), Ok(()));
        assert_eq!(check_container(None, pod, "c"), Ok(()));
        for (wanted, pod) in [(&other, pod), (&options(NamespaceMode::Node, vec![]), pod), (&same, None)] {
            assert_eq!(check_container(Some(wanted), pod, "c").unwrap_err().field, "c");
        }
        let mount = |ids: Vec<IdMapping>| proto::Mount {
            uid_mappings: ids.clone(),
            gid_mappings: ids,
            ..Default::default()
        };
        assert_eq!(mount_mapping(&mount(vec![]), pod, "m"), Ok(None));
        assert_eq!(mount_mapping(&mount(same.uids.clone()), pod, "m"), Ok(pod));
        for (ids, pod) in [(other.uids, pod), (same.uids, None)] {
            assert_eq!(mount_mapping(&mount(ids), pod, "m").unwrap_err().field, "m.uidMappings");
        }
    }
}
