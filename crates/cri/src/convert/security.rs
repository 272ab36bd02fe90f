//! Security contexts: users, capabilities, namespaces and profiles.
//!
//! SELinux labels and AppArmor's default profiles are accepted without effect, as on any node whose
//! kernel has neither: the guest's kernel is such a node. A profile by name cannot be honoured and is
//! refused.

use std::path::PathBuf;

use a3s_box_core::SessionId;
use a3s_box_core::seccomp::SeccompProfile;
use a3s_box_core::spec::{
    CapabilitySpec, IdRange, InitUser, PidNamespace, SeccompSpec, UserNamespace, UserSpec,
};

use super::{InvalidRequest, kernel_id, users};
use crate::proto::security_profile::ProfileType;
use crate::proto::{
    Int64Value, LinuxContainerSecurityContext, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    SecurityProfile, SupplementalGroupsPolicy,
};

/// Parts of /proc and /sys that no ordinary container sees: the OCI runtimes' common default.
pub const DEFAULT_MASKED_PATHS: [&str; 9] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];

/// Parts of /proc that no ordinary container writes: the OCI runtimes' common default.
pub const DEFAULT_READONLY_PATHS: [&str; 5] =
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const SANDBOX: &str = "config.linux.security_context";

/// Refuses pods that want what lies outside of their virtual machine, and answers with the user namespace of the
/// others. The rest of a sandbox' context is about a pause process; of that a box has no more than [`init_user`].
pub fn sandbox_context(
    context: &LinuxSandboxSecurityContext,
) -> Result<Option<UserNamespace>, InvalidRequest> {
    let Some(options) = &context.namespace_options else { return Ok(None) };
    check_namespaces(options, SANDBOX)?;
    // A pod has no other container yet whose processes it could join.
    if namespace(options.pid, &format!("{SANDBOX}.namespace_options.pid"))? == NamespaceMode::Target {
        let problem = "TARGET is for containers only";
        return Err(InvalidRequest::new(format!("{SANDBOX}.namespace_options.pid"), problem));
    }
    users::user_namespace(
        options.userns_options.as_ref(),
        &format!("{SANDBOX}.namespace_options.userns_options"),
    )
}

/// As whom process 1 of a pod runs whose containers share their processes.
pub fn init_user(
    context: &LinuxSandboxSecurityContext,
    users: Option<UserNamespace>,
) -> Result<Option<InitUser>, InvalidRequest> {
    let id = |value: &Option<Int64Value>, name: &str, range: Option<IdRange>| {
        let field = format!("{SANDBOX}.{name}");
        let Some(id) = value.as_ref().map(|id| kernel_id(id.value, &field)).transpose()? else {
            return Ok(None);
        };
        match range {
            Some(range) if id >= range.count => {
                let problem =
                    format!("{id} is not in the pod's user namespace, which has 0 to {}", range.count - 1);
                Err(InvalidRequest::new(field, problem))
            }
            Some(_) | None => Ok(Some(id)),
        }
    };
    let uid = id(&context.run_as_user, "run_as_user", users.map(|users| users.uids))?;
    let gid = id(&context.run_as_group, "run_as_group", users.map(|users| users.gids))?;
    match (uid, gid) {
        (None, None) => Ok(None),
        (Some(uid), gid) => Ok(Some(InitUser { uid, gid: gid.unwrap_or(0) })),
        (None, Some(_)) => Err(InvalidRequest::new(format!("{SANDBOX}.run_as_group"), "needs run_as_user")),
    }
}

/// Network and IPC belong to the box as a whole, and no namespace is the host's.
fn check_namespaces(options: &NamespaceOption, context: &str) -> Result<(), InvalidRequest> {
    for (name, mode) in [("network", options.network), ("ipc", options.ipc)] {
        let field = format!("{context}.namespace_options.{name}");
        let problem = match namespace(mode, &field)? {
            NamespaceMode::Pod => continue,
            NamespaceMode::Node => {
                "NODE cannot be given to a box, which has a kernel of its own; \
                                    run pods that need the host's namespaces with another RuntimeClass"
            }
            NamespaceMode::Container | NamespaceMode::Target => {
                "a box shares it between all containers; use POD"
            }
        };
        return Err(InvalidRequest::new(field, problem));
    }
    let field = format!("{context}.namespace_options.pid");
    if namespace(options.pid, &field)? == NamespaceMode::Node {
        let problem = "NODE cannot be given to a box, which has a kernel of its own; \
                       run pods that need the host's processes with another RuntimeClass";
        return Err(InvalidRequest::new(field, problem));
    }
    Ok(())
}

fn namespace(mode: i32, field: &str) -> Result<NamespaceMode, InvalidRequest> {
    NamespaceMode::try_from(mode)
        .map_err(|_| InvalidRequest::new(field, format!("{mode} is not a namespace mode")))
}

/// Whose processes a container sees. A container without options shares the pod's, which is what the
/// zero of the enum says. `pod_users` is its pod's user namespace.
pub fn pid_namespace(
    context: &LinuxContainerSecurityContext,
    pod_users: Option<UserNamespace>,
    field: &str,
) -> Result<PidNamespace, InvalidRequest> {
    let options = context.namespace_options.clone().unwrap_or_default();
    check_namespaces(&options, field)?;
    let wanted = options.userns_options.as_ref();
    users::check_container(wanted, pod_users, &format!("{field}.namespace_options.userns_options"))?;
    let pid = format!("{field}.namespace_options.pid");
    match namespace(options.pid, &pid)? {
        NamespaceMode::Pod => Ok(PidNamespace::Pod),
        NamespaceMode::Container => Ok(PidNamespace::Session),
        NamespaceMode::Target => target(&options.target_id, field).map(PidNamespace::Target),
        // Refused above.
        NamespaceMode::Node => Err(InvalidRequest::new(pid, "NODE cannot be given to a box")),
    }
}

fn target(id: &str, field: &str) -> Result<SessionId, InvalidRequest> {
    id.parse().map_err(|error| {
        InvalidRequest::new(format!("{field}.namespace_options.target_id"), format!("{error}"))
    })
}

/// As whom a container runs: the client's words over the image's.
pub fn user(
    context: &LinuxContainerSecurityContext,
    image_user: &str,
    field: &str,
) -> Result<UserSpec, InvalidRequest> {
    let uid = context
        .run_as_user
        .as_ref()
        .map(|uid| kernel_id(uid.value, &format!("{field}.run_as_user")))
        .transpose()?;
    let user = match (uid, context.run_as_username.as_str()) {
        (Some(uid), _) => Some(uid.to_string()),
        (None, "") => None,
        (None, name) => Some(name.to_owned()),
    };
    let group = context
        .run_as_group
        .as_ref()
        .map(|gid| kernel_id(gid.value, &format!("{field}.run_as_group")))
        .transpose()?;
    if group.is_some() && user.is_none() {
        let problem = "needs run_as_user or run_as_username";
        return Err(InvalidRequest::new(format!("{field}.run_as_group"), problem));
    }
    let strict_groups = match SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy) {
        Ok(SupplementalGroupsPolicy::Merge) => false,
        Ok(SupplementalGroupsPolicy::Strict) => true,
        Err(_) => {
            let problem = format!("{} is not a policy", context.supplemental_groups_policy);
            return Err(InvalidRequest::new(format!("{field}.supplemental_groups_policy"), problem));
        }
    };
    let supplemental_groups = context
        .supplemental_groups
        .iter()
        .enumerate()
        .map(|(index, gid)| kernel_id(*gid, &format!("{field}.supplemental_groups[{index}]")))
        .collect::<Result<_, _>>()?;
    let user = user.unwrap_or_else(|| image_user.to_owned());
    Ok(UserSpec { user, group, supplemental_groups, strict_groups })
}

/// Capabilities relative to the default set.
pub fn capabilities(context: &LinuxContainerSecurityContext) -> CapabilitySpec {
    let capabilities = context.capabilities.clone().unwrap_or_default();
    CapabilitySpec {
        add: capabilities.add_capabilities,
        drop: capabilities.drop_capabilities,
        add_ambient: capabilities.add_ambient_capabilities,
    }
}

/// The file of the node that holds the container's system call filter, and the field that names it. Old clients
/// write `localhost/` before the path.
#[allow(deprecated)]
pub fn seccomp_file(context: &LinuxContainerSecurityContext, field: &str) -> Option<(String, PathBuf)> {
    if context.privileged {
        return None;
    }
    let (field, path) = match &context.seccomp {
        Some(profile) if profile.profile_type() == ProfileType::Localhost => {
            let path = profile.localhost_ref.as_str();
            (format!("{field}.seccomp.localhost_ref"), path.strip_prefix("localhost/").unwrap_or(path))
        }
        Some(_) => return None,
        None => (
            format!("{field}.seccomp_profile_path"),
            context.seccomp_profile_path.strip_prefix("localhost/")?,
        ),
    };
    Some((field, PathBuf::from(path)))
}

/// The system call filter. Without a word about it there is none: that is what the interface says, and
/// kubelet always says a word. `profile` is the content of the file that [`seccomp_file`] names.
pub fn seccomp(
    context: &LinuxContainerSecurityContext,
    profile: Option<SeccompProfile>,
    field: &str,
) -> Result<SeccompSpec, InvalidRequest> {
    if let Some(profile) = profile {
        return Ok(SeccompSpec::Profile(Box::new(profile)));
    }
    if context.privileged {
        return Ok(SeccompSpec::Unconfined);
    }
    match &context.seccomp {
        Some(profile) => match profile_type(profile, &format!("{field}.seccomp"))? {
            ProfileType::RuntimeDefault => Ok(SeccompSpec::RuntimeDefault),
            ProfileType::Unconfined => Ok(SeccompSpec::Unconfined),
            ProfileType::Localhost => Err(InvalidRequest::missing(format!("{field}.seccomp.localhost_ref"))),
        },
        #[allow(deprecated)]
        None => seccomp_by_path(&context.seccomp_profile_path, field),
    }
}

/// The field that clients older than Kubernetes 1.19 send.
fn seccomp_by_path(path: &str, field: &str) -> Result<SeccompSpec, InvalidRequest> {
    match path {
        "runtime/default" | "docker/default" => Ok(SeccompSpec::RuntimeDefault),
        "" | "unconfined" => Ok(SeccompSpec::Unconfined),
        other => {
            let problem = format!("{other:?} is none of runtime/default, unconfined and localhost/PATH");
            Err(InvalidRequest::new(format!("{field}.seccomp_profile_path"), problem))
        }
    }
}

/// Refuses AppArmor profiles by name: the guest's kernel has no AppArmor.
pub fn check_apparmor(context: &LinuxContainerSecurityContext, field: &str) -> Result<(), InvalidRequest> {
    let field = format!("{field}.apparmor");
    match &context.apparmor {
        Some(profile) => match profile_type(profile, &field)? {
            ProfileType::RuntimeDefault | ProfileType::Unconfined => Ok(()),
            ProfileType::Localhost => {
                let problem = "the kernel of a box has no AppArmor; use RuntimeDefault or Unconfined";
                Err(InvalidRequest::new(format!("{field}.localhost_ref"), problem))
            }
        },
        None => Ok(()),
    }
}

fn profile_type(profile: &SecurityProfile, field: &str) -> Result<ProfileType, InvalidRequest> {
    ProfileType::try_from(profile.profile_type).map_err(|_| {
        InvalidRequest::new(
            format!("{field}.profile_type"),
            format!("{} is not a profile type", profile.profile_type),
        )
    })
}

/// What is hidden and what is read-only. CRI cannot tell "none" from "not given", so an empty list means
/// the default; only a privileged container sees everything.
pub fn guarded_paths(context: &LinuxContainerSecurityContext) -> (Vec<String>, Vec<String>) {
    if context.privileged {
        return (Vec::new(), Vec::new());
    }
    let or_default = |paths: &[String], default: &[&str]| match paths {
        [] => default.iter().map(|path| (*path).to_owned()).collect(),
        paths => paths.to_vec(),
    };
    (
        or_default(&context.masked_paths, &DEFAULT_MASKED_PATHS),
        or_default(&context.readonly_paths, &DEFAULT_READONLY_PATHS),
    )
}

#[cfg(test)]
mod tests {
    use a3s_box_core::seccomp::SeccompAction;

    use super::*;

    fn with_options(options: NamespaceOption) -> LinuxContainerSecurityContext {
        LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() }
    }

    #[test]
    fn pid_modes_become_ours_and_the_hosts_is_refused() {
        let mode = |pid: NamespaceMode| {
            pid_namespace(&with_options(NamespaceOption { pid: pid.into(), ..Default::default() }), None, "c")
        };
        assert_eq!(mode(NamespaceMode::Pod), Ok(PidNamespace::Pod));
        assert_eq!(mode(NamespaceMode::Container), Ok(PidNamespace::Session));
        assert_eq!(mode(NamespaceMode::Node).unwrap_err().field, "c.namespace_options.pid");
        assert_eq!(mode(NamespaceMode::Target).unwrap_err().field, "c.namespace_options.target_id");
        assert_eq!(pid_namespace(&Default::default(), None, "c"), Ok(PidNamespace::Pod));
    }

    /// Process 1 of a pod whose containers share their processes was root, whoever the pod runs as.
    #[test]
    fn a_pods_process_1_is_its_user_and_one_that_the_pod_has() {
        let context = |uid: Option<i64>, gid: Option<i64>| LinuxSandboxSecurityContext {
            run_as_user: uid.map(|value| Int64Value { value }),
            run_as_group: gid.map(|value| Int64Value { value }),
            ..Default::default()
        };
        let range = IdRange { start: 100_000, count: 65_536 };
        let users = Some(UserNamespace { uids: range, gids: range });
        assert_eq!(init_user(&context(None, None), users), Ok(None));
        let user = |uid, gid| Ok(Some(InitUser { uid, gid }));
        assert_eq!(init_user(&context(Some(70_000), None), None), user(70_000, 0));
        assert_eq!(init_user(&context(Some(1000), Some(2000)), users), user(1000, 2000));
        let refused = |context| init_user(&context, users).unwrap_err().field;
        assert_eq!(refused(context(Some(70_000), None)), "config.linux.security_context.run_as_user");
        assert_eq!(refused(context(Some(1), Some(65_536))), "config.linux.security_context.run_as_group");
        assert_eq!(refused(context(None, Some(1))), "config.linux.security_context.run_as_group");
        assert_eq!(refused(context(Some(-1), None)), "config.linux.security_context.run_as_user");
    }

    #[test]
    fn the_clients_user_wins_over_the_images() {
        let mut context = LinuxContainerSecurityContext::default();
        assert_eq!(user(&context, "www:www", "c").unwrap().user, "www:www");
        context.run_as_username = "app".to_owned();
        assert_eq!(user(&context, "www:www", "c").unwrap().user, "app");
        context.run_as_user = Some(Int64Value { value: 0 });
        assert_eq!(user(&context, "www:www", "c").unwrap().user, "0");
    }

    #[test]
    fn ids_beyond_the_kernels_and_a_group_alone_are_refused() {
        let mut context =
            LinuxContainerSecurityContext { supplemental_groups: vec![1, -1], ..Default::default() };
        assert_eq!(user(&context, "", "c").unwrap_err().field, "c.supplemental_groups[1]");
        context.supplemental_groups.clear();
        context.run_as_group = Some(Int64Value { value: 5 });
        assert_eq!(user(&context, "", "c").unwrap_err().field, "c.run_as_group");
        context.run_as_user = Some(Int64Value { value: i64::from(u32::MAX) });
        assert_eq!(user(&context, "", "c").unwrap_err().field, "c.run_as_user");
        context.run_as_user = Some(Int64Value { value: 7 });
        assert_eq!(user(&context, "", "c").unwrap().group, Some(5));
    }

    #[test]
    fn containers_are_confined_as_they_say() {
        let mut context = LinuxContainerSecurityContext::default();
        assert_eq!(seccomp(&context, None, "c"), Ok(SeccompSpec::Unconfined));
        let profile = |kind: ProfileType| SecurityProfile { profile_type: kind.into(), ..Default::default() };
        context.seccomp = Some(profile(ProfileType::RuntimeDefault));
        assert_eq!(seccomp(&context, None, "c"), Ok(SeccompSpec::RuntimeDefault));
        context.seccomp = Some(profile(ProfileType::Unconfined));
        assert_eq!(seccomp(&context, None, "c"), Ok(SeccompSpec::Unconfined));
        context.seccomp = Some(profile(ProfileType::Localhost));
        assert_eq!(seccomp(&context, None, "c").unwrap_err().field, "c.seccomp.localhost_ref");
        let profile = SeccompProfile {
            path: "/p.json".into(),
            default_action: SeccompAction::Allow,
            rules: Vec::new(),
        };
        let expected = SeccompSpec::Profile(Box::new(profile.clone()));
        assert_eq!(seccomp(&context, Some(profile), "c"), Ok(expected));
        context.privileged = true;
        assert_eq!(seccomp(&context, None, "c"), Ok(SeccompSpec::Unconfined));
    }

    #[test]
    #[allow(deprecated)]
    fn a_profile_of_the_node_is_named_by_either_field_with_or_without_the_old_prefix() {
        let named = |path: &str| LinuxContainerSecurityContext {
            seccomp: Some(SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: path.to_owned(),
            }),
            ..Default::default()
        };
        let found = |field: &str| Some((format!("c.{field}"), PathBuf::from("/p.json")));
        assert_eq!(seccomp_file(&named("/p.json"), "c"), found("seccomp.localhost_ref"));
        assert_eq!(seccomp_file(&named("localhost//p.json"), "c"), found("seccomp.localhost_ref"));
        let old = |path: &str| LinuxContainerSecurityContext {
            seccomp_profile_path: path.to_owned(),
            ..Default::default()
        };
        assert_eq!(seccomp_file(&old("localhost//p.json"), "c"), found("seccomp_profile_path"));
        assert_eq!(seccomp_file(&old("runtime/default"), "c"), None);
        let privileged = LinuxContainerSecurityContext { privileged: true, ..named("/p.json") };
        assert_eq!(seccomp_file(&privileged, "c"), None);
    }

    #[test]
    fn a_named_apparmor_profile_is_refused_and_the_default_is_not() {
        let profile = |kind: ProfileType| LinuxContainerSecurityContext {
            apparmor: Some(SecurityProfile { profile_type: kind.into(), localhost_ref: "x".to_owned() }),
            ..Default::default()
        };
        assert!(check_apparmor(&profile(ProfileType::RuntimeDefault), "c").is_ok());
        let error = check_apparmor(&profile(ProfileType::Localhost), "c").unwrap_err();
        assert_eq!(error.field, "c.apparmor.localhost_ref");
    }

    #[test]
    fn only_privileged_containers_see_all_of_proc() {
        let mut context = LinuxContainerSecurityContext::default();
        let (masked, readonly) = guarded_paths(&context);
        assert!(masked.contains(&"/proc/kcore".to_owned()) && readonly.contains(&"/proc/sys".to_owned()));
        context.masked_paths = vec!["/proc/x".to_owned()];
        assert_eq!(guarded_paths(&context).0, ["/proc/x"]);
        context.privileged = true;
        assert_eq!(guarded_paths(&context), (vec![], vec![]));
    }
}
