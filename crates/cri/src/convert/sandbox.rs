//! `PodSandboxConfig` to [`BoxSpec`].

use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use a3s_box_core::bandwidth::Bandwidth;
use a3s_box_core::egress::{self, Cidr, EgressPolicy};
use a3s_box_core::network::{Address, NoAddress};
use a3s_box_core::spec::{BoxSpec, DnsSpec, NetworkMode, PodIdentity, PortMapping, PortProtocol};

use super::resources::{SizePolicy, box_size};
use super::{InvalidRequest, given, non_empty, required, security, sorted};
use crate::proto;

/// What `sethostname(2)` takes.
const HOSTNAME_MAX: usize = 64;

/// The longest label of a DNS name, which is where kubelet cuts.
const HOSTNAME_CUT: usize = 63;

/// The box that a RunPodSandbox request asks for. `handlers` are the names that may be asked for
/// besides the empty one, `cluster` are the networks of the cluster in egress policies.
pub fn box_spec(
    request: proto::RunPodSandboxRequest,
    handlers: &[String],
    policy: &SizePolicy,
    cluster: &[Cidr],
) -> Result<BoxSpec, InvalidRequest> {
    let handler = known_handler(request.runtime_handler, handlers)?;
    let config = required(request.config, "config")?;
    if config.windows.is_some() {
        return Err(InvalidRequest::new("config.windows", "boxes run Linux; remove the field"));
    }
    let linux = config.linux.unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    let user_namespace = security::sandbox_context(&context)?;
    let init_user = security::init_user(&context, user_namespace)?;
    let identity = identity(config.metadata)?;
    let hostname = hostname(config.hostname, &identity.name)?;
    let annotations = sorted(config.annotations);
    Bandwidth::of(&annotations).map_err(|bad| {
        InvalidRequest::new(format!("config.annotations[{:?}]", bad.annotation), bad.to_string())
    })?;
    let egress = annotations.get(egress::ANNOTATION).map(|text| egress_policy(text, cluster)).transpose()?;
    Ok(BoxSpec {
        identity,
        hostname,
        labels: sorted(config.labels),
        annotations,
        log_directory: log_directory(config.log_directory)?,
        runtime_handler: handler,
        cgroup_parent: given(linux.cgroup_parent),
        size: box_size(linux.resources.as_ref(), linux.overhead.as_ref(), policy),
        dns: config.dns_config.map(|dns| DnsSpec {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        port_mappings: port_mappings(config.port_mappings)?,
        sysctls: sorted(linux.sysctls.into_iter().map(sysctl).collect::<Result<_, _>>()?),
        network: NetworkMode::Pod,
        egress,
        user_namespace,
        init_user,
    })
}

fn egress_policy(text: &str, cluster: &[Cidr]) -> Result<EgressPolicy, InvalidRequest> {
    let field = || format!("config.annotations[{:?}]", egress::ANNOTATION);
    EgressPolicy::parse(text, cluster).map_err(|error| InvalidRequest::new(field(), error.to_string()))
}

fn known_handler(name: String, handlers: &[String]) -> Result<String, InvalidRequest> {
    if name.is_empty() || handlers.contains(&name) {
        return Ok(name);
    }
    let known: Vec<&str> = handlers.iter().map(String::as_str).filter(|name| !name.is_empty()).collect();
    let known = known.join(", ");
    let problem = format!("{name:?} is not a handler of this runtime; the RuntimeClass may name: {known}");
    Err(InvalidRequest::new("runtime_handler", problem))
}

fn identity(metadata: Option<proto::PodSandboxMetadata>) -> Result<PodIdentity, InvalidRequest> {
    let metadata = required(metadata, "config.metadata")?;
    Ok(PodIdentity {
        name: non_empty(metadata.name, "config.metadata.name")?,
        namespace: non_empty(metadata.namespace, "config.metadata.namespace")?,
        uid: non_empty(metadata.uid, "config.metadata.uid")?,
        attempt: metadata.attempt,
    })
}

/// A name that is given must fit; a pod's name, which stands in where none is, may be longer than a
/// host's and is cut as kubelet cuts it.
fn hostname(name: String, pod: &str) -> Result<String, InvalidRequest> {
    if name.is_empty() {
        let end = pod.floor_char_boundary(HOSTNAME_CUT);
        return Ok(pod[..end].trim_end_matches(['-', '.']).to_owned());
    }
    if name.len() > HOSTNAME_MAX || name.contains(['/', '\0', '\n']) {
        let problem = format!("{name:?} cannot be a host name: at most {HOSTNAME_MAX} bytes, without '/'");
        return Err(InvalidRequest::new("config.hostname", problem));
    }
    Ok(name)
}

/// A relative path begins at the host's root: that is the working directory of a runtime that systemd has started, from
/// which others take it. Where this daemon happens to have been started must not decide where logs are.
fn log_directory(path: String) -> Result<Option<PathBuf>, InvalidRequest> {
    let Some(path) = given(path) else { return Ok(None) };
    if Path::new(&path).components().any(|part| part == Component::ParentDir) {
        let problem = format!("{path:?} has \"..\" in it; give the path of the directory itself");
        return Err(InvalidRequest::new("config.log_directory", problem));
    }
    Ok(Some(Path::new("/").join(path)))
}

fn port_mappings(mappings: Vec<proto::PortMapping>) -> Result<Vec<PortMapping>, InvalidRequest> {
    let mut published = Vec::new();
    for (index, mapping) in mappings.into_iter().enumerate() {
        let field = |name: &str| format!("config.port_mappings[{index}].{name}");
        let protocol = match proto::Protocol::try_from(mapping.protocol) {
            Ok(proto::Protocol::Tcp) => PortProtocol::Tcp,
            Ok(proto::Protocol::Udp) => PortProtocol::Udp,
            Ok(proto::Protocol::Sctp) => PortProtocol::Sctp,
            Err(_) => return Err(InvalidRequest::new(field("protocol"), "is not TCP, UDP or SCTP")),
        };
        let host_port = port(mapping.host_port, &field("host_port"))?;
        let container_port = port(mapping.container_port, &field("container_port"))?;
        if !mapping.host_ip.is_empty() && mapping.host_ip.parse::<IpAddr>().is_err() {
            return Err(InvalidRequest::new(
                field("host_ip"),
                format!("{:?} is no address", mapping.host_ip),
            ));
        }
        // Kubelet lists every port of the pod; only those with a host port are to be published.
        if host_port == 0 {
            continue;
        }
        if container_port == 0 {
            return Err(InvalidRequest::missing(field("container_port")));
        }
        published.push(PortMapping { protocol, container_port, host_port, host_ip: mapping.host_ip });
    }
    Ok(published)
}

fn port(value: i32, field: &str) -> Result<u16, InvalidRequest> {
    u16::try_from(value)
        .map_err(|_| InvalidRequest::new(field, format!("{value} is not a port (0 to 65535)")))
}

/// The ranges of an UpdateRuntimeConfig; none given means that there is nothing to tell.
pub fn pod_cidrs(request: proto::UpdateRuntimeConfigRequest) -> Result<Vec<Address>, InvalidRequest> {
    let network = request.runtime_config.and_then(|config| config.network_config).unwrap_or_default();
    let parts = network.pod_cidr.split(',').map(str::trim).filter(|_| !network.pod_cidr.trim().is_empty());
    parts.map(pod_cidr).collect()
}

fn pod_cidr(text: &str) -> Result<Address, InvalidRequest> {
    text.parse().map_err(|NoAddress| {
        let shown: String = text.chars().take(80).collect();
        let problem = format!("{shown:?} is no network such as \"10.244.1.0/24\" or \"fd00:10:244:1::/64\"");
        InvalidRequest::new("runtime_config.network_config.pod_cidr", problem)
    })
}

/// The name becomes a path below /proc/sys in the guest.
fn sysctl((name, value): (String, String)) -> Result<(String, String), InvalidRequest> {
    let valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte));
    if name.is_empty() || !valid || name.contains("..") || name.starts_with('/') {
        let field = format!("config.linux.sysctls[{name:?}]");
        return Err(InvalidRequest::new(field, "is not the name of a kernel parameter"));
    }
    Ok((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption};

    fn request() -> proto::RunPodSandboxRequest {
        proto::RunPodSandboxRequest {
            config: Some(proto::PodSandboxConfig {
                metadata: Some(proto::PodSandboxMetadata {
                    name: "web".to_owned(),
                    uid: "u-1".to_owned(),
                    namespace: "shop".to_owned(),
                    attempt: 3,
                }),
                hostname: "web-0".to_owned(),
                log_directory: "/var/log/pods/shop_web_u-1".to_owned(),
                ..Default::default()
            }),
            runtime_handler: String::new(),
        }
    }

    fn config(request: &mut proto::RunPodSandboxRequest) -> &mut proto::PodSandboxConfig {
        request.config.as_mut().unwrap()
    }

    fn convert(request: proto::RunPodSandboxRequest) -> Result<BoxSpec, InvalidRequest> {
        box_spec(request, &["a3s-box".to_owned()], &SizePolicy::default(), &[])
    }

    fn refused_field(request: proto::RunPodSandboxRequest) -> String {
        convert(request).expect_err("the request is refused").field
    }

    #[test]
    fn a_plain_pod_becomes_a_box_with_the_same_identity() {
        let spec = convert(request()).unwrap();
        let identity =
            PodIdentity { name: "web".into(), namespace: "shop".into(), uid: "u-1".into(), attempt: 3 };
        assert_eq!(spec.identity, identity);
        assert_eq!(spec.hostname, "web-0");
        assert_eq!(spec.log_directory, Some(PathBuf::from("/var/log/pods/shop_web_u-1")));
        assert_eq!(spec.cgroup_parent, None);
        assert_eq!(spec.network, NetworkMode::Pod);
    }

    #[test]
    fn the_pods_name_stands_in_for_a_host_name_as_far_as_it_fits() {
        let named = |hostname: &str, name: String| {
            let mut named = request();
            config(&mut named).hostname = hostname.to_owned();
            config(&mut named).metadata.as_mut().unwrap().name = name;
            named
        };
        assert_eq!(convert(named("", "web".to_owned())).unwrap().hostname, "web");
        let long = format!("{}-{}", "a".repeat(62), "b".repeat(30));
        assert_eq!(convert(named("", long)).unwrap().hostname, "a".repeat(62));
        assert_eq!(refused_field(named(&"h".repeat(65), "web".to_owned())), "config.hostname");
    }

    #[test]
    fn a_pod_without_identity_is_refused_by_the_missing_field() {
        let mut without = request();
        without.config = None;
        assert_eq!(refused_field(without), "config");
        let mut without = request();
        config(&mut without).metadata = None;
        assert_eq!(refused_field(without), "config.metadata");
        for (field, clear) in [
            ("config.metadata.name", (|m| m.name.clear()) as fn(&mut proto::PodSandboxMetadata)),
            ("config.metadata.namespace", |m| m.namespace.clear()),
            ("config.metadata.uid", |m| m.uid.clear()),
        ] {
            let mut without = request();
            clear(config(&mut without).metadata.as_mut().unwrap());
            assert_eq!(refused_field(without), field);
        }
    }

    #[test]
    fn an_unknown_runtime_handler_is_refused_and_the_known_ones_are_named() {
        let mut unknown = request();
        unknown.runtime_handler = "runc".to_owned();
        let error = convert(unknown).unwrap_err();
        assert_eq!(error.field, "runtime_handler");
        assert!(error.problem.contains("a3s-box"), "{error}");
        let mut known = request();
        known.runtime_handler = "a3s-box".to_owned();
        assert_eq!(convert(known).unwrap().runtime_handler, "a3s-box");
    }

    #[test]
    fn namespaces_of_the_host_are_refused_by_name() {
        for (name, options) in [
            ("network", NamespaceOption { network: NamespaceMode::Node.into(), ..Default::default() }),
            ("pid", NamespaceOption { pid: NamespaceMode::Node.into(), ..Default::default() }),
            ("ipc", NamespaceOption { ipc: NamespaceMode::Node.into(), ..Default::default() }),
        ] {
            let mut host = request();
            config(&mut host).linux = Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(options),
                    ..Default::default()
                }),
                ..Default::default()
            });
            let expected = format!("config.linux.security_context.namespace_options.{name}");
            assert_eq!(refused_field(host), expected);
        }
    }

    #[test]
    fn only_ports_with_a_host_port_are_published() {
        let mut ports = request();
        let mapping = |host_port| proto::PortMapping { container_port: 80, host_port, ..Default::default() };
        config(&mut ports).port_mappings = vec![mapping(0), mapping(8080)];
        let published = convert(ports).unwrap().port_mappings;
        assert_eq!(published.len(), 1);
        assert_eq!((published[0].container_port, published[0].host_port), (80, 8080));
    }

    #[test]
    fn ports_and_addresses_out_of_range_are_refused_by_index() {
        let mut ports = request();
        config(&mut ports).port_mappings = vec![
            proto::PortMapping::default(),
            proto::PortMapping { host_port: 65_536, ..Default::default() },
        ];
        assert_eq!(refused_field(ports), "config.port_mappings[1].host_port");
        let mut ports = request();
        config(&mut ports).port_mappings =
            vec![proto::PortMapping { host_ip: "example".to_owned(), ..Default::default() }];
        assert_eq!(refused_field(ports), "config.port_mappings[0].host_ip");
    }

    #[test]
    fn an_annotation_that_says_no_bandwidth_is_refused_by_its_key() {
        let mut limited = request();
        config(&mut limited).annotations =
            [("kubernetes.io/egress-bandwidth".to_owned(), "10M".to_owned())].into();
        assert!(convert(limited.clone()).is_ok());
        config(&mut limited).annotations =
            [("kubernetes.io/egress-bandwidth".to_owned(), "fast".to_owned())].into();
        assert_eq!(refused_field(limited), "config.annotations[\"kubernetes.io/egress-bandwidth\"]");
    }

    #[test]
    fn pod_cidrs_are_networks_separated_by_commas() {
        let read = |text: &str| {
            let network_config = Some(proto::NetworkConfig { pod_cidr: text.to_owned() });
            let runtime_config = Some(proto::RuntimeConfig { network_config });
            pod_cidrs(proto::UpdateRuntimeConfigRequest { runtime_config })
        };
        let shown = |text: &str| {
            let cidrs = read(text).unwrap();
            cidrs.iter().map(Address::to_string).collect::<Vec<_>>()
        };
        assert_eq!(shown("10.1.0.0/24, fd00::/64"), ["10.1.0.0/24", "fd00::/64"]);
        assert_eq!(shown(""), [""; 0]);
        assert_eq!(pod_cidrs(proto::UpdateRuntimeConfigRequest::default()), Ok(Vec::new()));
        for text in [
            "10.1.0.0",
            "10.1.0.0/33",
            "fd00::/129",
            "x/24",
            "10.1.0.0/24,",
            ",",
            "10.1.0.0/-1",
            "10.1.0.0/24\"}",
        ] {
            let error = read(text).unwrap_err();
            assert_eq!(error.field, "runtime_config.network_config.pod_cidr", "{text}");
        }
    }

    #[test]
    fn a_sysctl_cannot_climb_out_of_proc_sys() {
        for name in ["../../etc/passwd", "/etc/passwd", "", "net.ipv4 x"] {
            let mut climbing = request();
            config(&mut climbing).linux = Some(LinuxPodSandboxConfig {
                sysctls: [(name.to_owned(), "1".to_owned())].into(),
                ..Default::default()
            });
            assert_eq!(refused_field(climbing), format!("config.linux.sysctls[{name:?}]"));
        }
    }

    #[test]
    fn an_egress_policy_is_read_from_its_annotation_or_refused_by_its_name() {
        let annotated = |text: &str| {
            let mut annotated = request();
            config(&mut annotated).annotations = [(egress::ANNOTATION.to_owned(), text.to_owned())].into();
            annotated
        };
        assert_eq!(convert(request()).unwrap().egress, None);
        assert_eq!(convert(annotated("none")).unwrap().egress, Some(EgressPolicy::default()));
        let spec = convert(annotated("192.0.2.0/24 pypi.org")).unwrap();
        assert_eq!(spec.egress, Some(EgressPolicy::parse("192.0.2.0/24 pypi.org", &[]).unwrap()));
        assert_eq!(spec.annotations[egress::ANNOTATION], "192.0.2.0/24 pypi.org");
        for text in ["", "clutser", "10.0.0.1/8", "cluster"] {
            assert_eq!(refused_field(annotated(text)), "config.annotations[\"a3s.box/egress\"]", "{text:?}");
        }
    }

    /// containerd takes it from its working directory, which is the root; here such a pod was refused.
    #[test]
    fn a_relative_log_directory_begins_at_the_root() {
        let mut relative = request();
        config(&mut relative).log_directory = "./logs/web".to_owned();
        assert_eq!(convert(relative).unwrap().log_directory, Some(PathBuf::from("/./logs/web")));
    }

    #[test]
    fn a_log_directory_that_climbs_and_windows_pods_are_refused() {
        let mut climbing = request();
        config(&mut climbing).log_directory = "logs/../../etc".to_owned();
        assert_eq!(refused_field(climbing), "config.log_directory");
        let mut windows = request();
        config(&mut windows).windows = Some(Default::default());
        assert_eq!(refused_field(windows), "config.windows");
    }
}
